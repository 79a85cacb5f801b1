"""The sinks: the local history, the event log, the console and W&B, behind one object.

Nothing heavy is imported here; wandb only when a W&B sink is opened.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mcore_monitors.messages import say
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventFollower, EventWriter, stamp
from mcore_monitors.sinks.history import HistoryWriter, effective_history

if TYPE_CHECKING:
    from mcore_monitors.config import Config

__all__ = ["Sink", "Sinks", "effective_history", "open_sinks"]


class Sink(Protocol):
    """What a sink can be told."""

    def sample(self, sample: Sample) -> None:
        """Take a sample."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event."""

    def close(self, exit_code: int = 0) -> None:
        """Write out what is left."""


class Sinks:
    """Hands every sample and event to all its parts; with no part it does nothing.

    A part that fails is turned off with one loud message, and training goes on.

    Args:
        parts: the sinks of this rank.
        strict: raise instead.
    """

    def __init__(self, parts: Sequence[Sink] = (), *, strict: bool = False) -> None:
        self._parts = list(parts)
        self._strict = strict
        self._at = {"iteration": 0, "attempt": 0}

    @property
    def parts(self) -> tuple[Sink, ...]:
        """The sinks that are still on."""
        return tuple(self._parts)

    def sample(self, sample: Sample) -> None:
        """Write a sample everywhere."""
        self._at = {"iteration": sample.iteration, "attempt": sample.attempt}
        self._each(lambda part: part.sample(sample))

    def event(self, event: Mapping[str, Any]) -> None:
        """Write an event everywhere, after giving it version and time.

        Args:
            event: kind, iteration, attempt and the kind's own fields (see ``events.KINDS``).
        """
        record = stamp(event)
        self._each(lambda part: part.event(record))

    def close(self, exit_code: int = 0) -> None:
        """Close every part; a second call does nothing."""
        self._each(lambda part: part.close(exit_code))
        self._parts.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for part in list(self._parts):
            try:
                call(part)
            except Exception as error:
                if self._strict:
                    raise
                self._parts.remove(part)
                name, why = type(part).__name__, f"{type(error).__name__}: {error}"
                say(f"the sink {name} failed and is off from here on; training goes on. {why}")
                traceback.print_exc(file=sys.stderr)
                fields = {"monitor": f"sinks/{name}", "error": why}
                self.event({"kind": "monitor_disabled", **self._at, **fields})


def open_sinks(config: Config, *, local: bool, wandb: bool, wandb_run: Any = None) -> Sinks:
    """Return the sinks of this rank.

    Args:
        config: the settings; ``run_dir`` must be the same folder on every rank that writes.
        local: whether this rank writes history, events and console (global rank 0, and only it).
        wandb: whether this rank writes to W&B: the one that holds the host's W&B run (Megatron's
            last), else global rank 0; at most one. Where that is not the rank of the files, it
            reads the events from the run folder.
        wandb_run: that run, or the initialised ``wandb`` module.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    parts: list[Sink] = []
    if local:
        parts += [HistoryWriter(config.run_dir), EventWriter(config.run_dir)]
        if config.console:
            from mcore_monitors.sinks.console import Console

            parts.append(Console(windows=config.detection.windows))
    if wandb and config.wandb.enabled:
        from mcore_monitors.sinks.wandb_sink import open_wandb

        sink = open_wandb(
            config.wandb,
            config.run_dir,
            say=say,
            writer=wandb_run,
            windows=config.detection.windows,
        )
        if sink is not None:
            parts.append(sink if local else EventFollower(sink, config.run_dir))
    return Sinks(parts, strict=config.strict)
