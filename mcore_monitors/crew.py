"""All monitors of a rank together: their hooks, and a sample from collecting to readings.

None of them breaks a run: an error in a hook, in collecting or in reading is kept, and at the next
sample all ranks learn how many of them have one and drop that monitor together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import parallel
from .monitors.base import Monitor, Readings, StepState

#: field of the packed buffer, a row a monitor: on how many ranks it failed
_ERRORS = "errors"


class Failed(NamedTuple):
    """A monitor that failed on some ranks and is off on all of them."""

    monitor: str
    ranks: int
    error: str | None
    """What happened on this rank, if it did here."""


class Crew:
    """This rank's monitors, and the packed buffer of a sample.

    Args:
        monitors: every rank has the same ones in the same order.
        device: where the model's parameters live.
        state: tells the hooks whether the step in progress is sampled.
        others: fields of the buffer that are not the monitors': name to shape.

    Attributes:
        monitors: those that are on.
        fields: views of the buffer, to be added to until :meth:`reduce`.
    """

    def __init__(
        self,
        monitors: Sequence[Monitor],
        device: torch.device,
        state: StepState,
        others: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._device, self._state, self._others = device, state, dict(others)
        self._errors: dict[str, str] = {}
        self.keep(monitors)

    def keep(self, monitors: Sequence[Monitor]) -> None:
        """Go on with these monitors, in a buffer of their own."""
        self.monitors = list(monitors)
        schema = self._others | {_ERRORS: (len(self.monitors),)}
        #: monitor to its fields: as it calls them, and in the packed buffer
        self._names: dict[str, dict[str, str]] = {}
        for monitor in self.monitors:
            own = self._names[monitor.name] = {}
            for name, shape in monitor.schema().items():
                own[name] = f"{monitor.name}/{name}"
                schema[own[name]] = shape
        self._packed = parallel.Packed(schema, self._device)
        self.fields = self._packed.fields

    def restart(self) -> None:
        """Training goes on from another state."""
        for monitor in self.monitors:
            monitor.restart()

    def guarded(
        self, monitor: Monitor, call: Callable[..., None], *, every_step: bool = False
    ) -> Callable[..., None]:
        """Wrap a monitor's hook: an error in it is kept for the next sample, never raised.

        The hook does nothing after its first error and, unless ``every_step``, on steps that are
        not sampled.
        """

        state, errors, name = self._state, self._errors, monitor.name

        def hook(*args: Any, **kwargs: Any) -> None:
            if not (every_step or state.armed) or name in errors:
                return
            try:
                call(*args, **kwargs)
            except Exception as error:  # a monitor never breaks a run
                errors[name] = _words(error)

        return hook

    def collect(self, iteration: int) -> None:
        """Let every monitor add this rank's share into the buffer."""
        stuck = self._would_wait_for_a_failed_rank()
        with torch.no_grad():
            for place, monitor in enumerate(self.monitors):
                name = monitor.name
                try:
                    if name not in self._errors and name not in stuck:
                        monitor.collect(iteration, self._of(monitor, self.fields))
                except Exception as error:  # a monitor never breaks a run
                    self._errors[name] = _words(error)
                if name in self._errors:
                    self.fields[_ERRORS][place] += 1

    def _would_wait_for_a_failed_rank(self) -> set[str]:
        """Monitors whose ``collect`` waits for other ranks, one of which has failed already.

        That rank will not take part, so nobody may wait; the sample turns them off everywhere.
        """
        return {
            m.name
            for m in self.monitors
            if m.collective and parallel.any_rank(m.name in self._errors, self._device)
        }

    def _of(
        self, monitor: Monitor, fields: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {name: fields[full] for name, full in self._names[monitor.name].items()}

    def reduce(self) -> dict[str, torch.Tensor]:
        """Add the buffer up over all ranks (:meth:`.Packed.reduce`)."""
        return self._packed.reduce()

    def drop_failed(self, reduced: Mapping[str, torch.Tensor]) -> list[Failed]:
        """Drop the monitors that failed on any rank, on all ranks together."""
        ranks = dict(zip(self.monitors, reduced[_ERRORS].tolist(), strict=True))
        failed = [monitor for monitor, count in ranks.items() if count > 0]
        if failed:
            self.keep([m for m in self.monitors if m not in failed])
        return [Failed(m.name, int(ranks[m]), self._errors.get(m.name)) for m in failed]

    def read(self, reduced: Mapping[str, torch.Tensor]) -> Readings:
        """All readings of a sample."""
        readings: Readings = {}
        for monitor in self.monitors:
            try:
                readings |= monitor.read(self._of(monitor, reduced))
            except Exception as error:  # off at the next sample
                self._errors[monitor.name] = _words(error)
        return readings


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
