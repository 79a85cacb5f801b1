"""What the patched DeepSpeed calls, and nothing else.

Each function stands behind one added line in DeepSpeed (``docs/patches.md``) and is only reached
with the key ``"mcore_monitors"`` in its JSON. The settings there are those of the YAML file.
"""

from __future__ import annotations

import os
from typing import Any

from .attach import monitors_of, start, told_by_patch


def on_engine(engine: Any) -> None:
    """An engine with the key ``mcore_monitors`` is built."""
    start(engine, told_by_patch(engine), None)


def on_step(engine: Any) -> None:
    """The optimizer step of a full batch is done, on every rank."""
    monitors_of(engine).on_step()


def on_checkpoint(engine: Any, save_dir: str, tag: str) -> None:
    """A checkpoint is complete on disk, on every rank."""
    monitors_of(engine).on_checkpoint(os.path.join(save_dir, str(tag)))


def on_load(engine: Any, load_path: str | None) -> None:
    """A checkpoint was loaded: go on from its iteration."""
    ours = monitors_of(engine)
    if ours is not None:
        ours.on_load(load_path)
