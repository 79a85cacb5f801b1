"""Monitors for Megatron-core and DeepSpeed that see an instability in the module where it starts.

Importing this package is light: no torch, no host. See ``README.md`` for how to turn it on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .hosts.deepspeed.engine import EngineMonitors

__version__ = "0.1.0"
__all__ = ["attach"]


def attach(
    engine: Any, config: Any = None, *, on_rollback: Callable[[int], None] | None = None
) -> EngineMonitors:
    """Watch a DeepSpeed engine. To be called on every rank, right after ``deepspeed.initialize``.

    Needed only where DeepSpeed is not patched, or to give ``on_rollback``: on an engine that has
    monitors already, by the key ``"mcore_monitors"``, it adds that and changes nothing else.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        config: the settings as a dict, or the path of a YAML file or of DeepSpeed's JSON; None
            takes the key ``"mcore_monitors"`` of DeepSpeed's JSON.
        on_rollback: called on every rank when the run has gone back in place, with the number of
            sequences of the whole run that are then behind it (``engine.global_samples``); has to
            let the data go on from there.

    Returns:
        the engine's monitors; ``position()`` says where in the data the run stands.

    Raises:
        SystemExit: 78 after one sentence where a setting, a model or the recovery state can't be
            used; 86 where the run has given up.
    """
    from .hosts.deepspeed.attach import attach as attach_to_engine

    return attach_to_engine(engine, config, on_rollback=on_rollback)
