"""Attach monitors to a built engine, with or without the patch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config import Config, from_dict, load
from ...errors import ConfigError
from ..attach import check_run_dir
from ..refusal import refusing
from .engine import EngineMonitors

#: attribute of an engine that holds its monitors
_OURS = "_mcore_monitors"


def monitors_of(engine: Any) -> EngineMonitors | None:
    """The monitors of an engine, None where it has none (yet)."""
    return vars(engine).get(_OURS)


def told_by_patch(engine: Any) -> Any:
    """The key ``mcore_monitors`` where the patched DeepSpeed acts on it, else None."""
    return getattr(engine._config, "mcore_monitors", None)


def start(
    engine: Any, settings: Any, on_rollback: Callable[[int], None] | None
) -> EngineMonitors:
    """Read the settings and start the monitors, or end the process with one sentence."""
    with refusing():
        config = _config(settings)
        check_run_dir(config.run_dir)
        ours = EngineMonitors(engine, config, on_rollback)
    setattr(engine, _OURS, ours)
    return ours


def _config(settings: Any) -> Config:
    if isinstance(settings, Config):
        return settings
    if isinstance(settings, (str, Path)):
        if Path(settings).suffix != ".json":
            return load(settings)
        try:
            settings = json.loads(Path(settings).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError("config", str(settings), "a JSON file", f"{error}.") from None
        if isinstance(settings, dict):  # DeepSpeed's own file, or the settings alone
            settings = settings.get("mcore_monitors", settings)
    return from_dict(settings, source="mcore_monitors")


def attach(
    engine: Any, config: Any = None, *, on_rollback: Callable[[int], None] | None = None
) -> EngineMonitors:
    """See :func:`mcore_monitors.attach`."""
    ours = monitors_of(engine)
    key = engine._config._param_dict.get("mcore_monitors")
    with refusing():
        if config is not None and (key is not None or ours is not None):
            raise ConfigError(
                "config of mcore_monitors.attach",
                config,
                "nothing for this engine: its settings are given already",
                'They stand under "mcore_monitors" in DeepSpeed\'s JSON, or in an earlier call.',
            )
        if config is None and key is None and ours is None:
            raise ConfigError(
                "config of mcore_monitors.attach",
                None,
                'settings, the path of a file with them, or the key "mcore_monitors" in '
                "DeepSpeed's JSON",
            )
    if ours is None:
        ours = start(engine, key if config is None else config, on_rollback)
        _watch(engine, ours)
    elif on_rollback is not None:
        ours.on_rollback = on_rollback
    return ours


def _watch(engine: Any, ours: EngineMonitors) -> None:
    """Do on this engine what the patch's lines do on every one."""
    step, save = engine.step, engine.save_checkpoint
    commit = engine._commit_decoupled_checkpoint

    def watched_step(*args: Any, **kwargs: Any) -> None:
        before = engine.global_steps
        step(*args, **kwargs)
        if engine.global_steps != before:
            ours.on_step()

    def watched_save(save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        saved = save(save_dir, tag, *args, **kwargs)
        if not engine.checkpoint_engine.is_decoupled():
            name = f"global_step{engine.global_steps}" if tag is None else str(tag)
            ours.on_checkpoint(os.path.join(save_dir, name))
        return saved

    def watched_commit() -> None:
        # a decoupled engine has only begun to write in save_checkpoint
        info = engine.checkpoint_engine.get_commit_info()
        commit()
        if info is not None:
            ours.on_checkpoint(os.path.join(info.save_dir, info.tag))

    engine.step, engine.save_checkpoint = watched_step, watched_save
    engine._commit_decoupled_checkpoint = watched_commit
    ours.checkpoints.tell = ours.on_load
