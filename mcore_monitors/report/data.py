"""What the report draws and tells of a run, and its curves as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mcore_monitors.recovery.ledger import Plan
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.history import Segment

CRITICAL = "critical"


@dataclass(kw_only=True)
class AlarmGroup:
    """All alarms that one signal raised at one iteration, over layers and heads."""

    signal: str
    iteration: int
    attempt: int
    severity: str
    """``critical`` or ``warning``."""
    onset: int
    """Earliest onset among them."""
    layers: list[int] = field(default_factory=list)
    """Sorted, each once; empty for a signal of the whole model."""
    units: int = 0
    """Number of heads or query groups; 0 for a signal with one value a layer."""
    worst: Mapping[str, Any] = field(default_factory=dict)
    """The event that is farthest from its bound."""

    @property
    def critical(self) -> bool:
        """Whether recovery may act on it."""
        return self.severity == CRITICAL


@dataclass(kw_only=True)
class Mark:
    """A checkpoint as the events and the ledger know it."""

    iteration: int
    attempt: int
    status: str
    reason: str = ""
    path: str = ""


@dataclass(kw_only=True)
class Run:
    """One run, read."""

    name: str
    """Folder name."""
    path: Path
    parts: list[Segment]
    """Stretches between two starts, in the order of the file."""
    events: list[dict[str, Any]]
    alarms: list[AlarmGroup]
    """In the order of happening."""
    drills: list[dict[str, Any]]
    """Each injected fault once, however often the run was started."""
    checkpoints: list[Mark]
    """In the order of writing, with their latest status; those that were written again included."""
    plans: list[Plan]
    gave_up: str | None
    """Why the run gave up."""

    @property
    def samples(self) -> list[Sample]:
        """The course that the present weights have been through; ends at the newest sample."""
        return [sample for part in self.parts for sample in part.samples[: part.kept]]

    @property
    def abandoned(self) -> list[list[Sample]]:
        """The stretches that a rollback left behind, each with the last kept step before it."""
        left = []
        for part in self.parts:
            if part.kept < len(part.samples):
                before = [_last_step(sample) for sample in part.samples[: part.kept][-1:]]
                left.append([*before, *part.samples[part.kept :]])
        return left

    @property
    def first_alarms(self) -> list[AlarmGroup]:
        """The first alarm of each attempt that recovery could act on; the others follow from it."""
        first: dict[int, AlarmGroup] = {}
        for group in self.alarms:
            if group.critical:
                first.setdefault(group.attempt, group)
        return list(first.values())

    @property
    def last_iteration(self) -> int:
        """The farthest iteration that any stretch reached."""
        return max(part.samples[-1].iteration for part in self.parts)

    @property
    def first_iteration(self) -> int:
        """The first step on record."""
        return min(part.samples[0].first_step for part in self.parts)

    @property
    def judged_windows(self) -> list[int] | None:
        """Windows of the update signals that were judged; None where the run doesn't say."""
        return (self.last_event("start") or {}).get("windows")

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """Return the newest event of a kind."""
        return next((e for e in reversed(self.events) if e["kind"] == kind), None)


def _last_step(sample: Sample) -> Sample:
    loss, norm = sample.loss[-1:], sample.grad_norm[-1:]
    return replace(sample, first_step=sample.iteration, loss=loss, grad_norm=norm)


def steps(samples: list[Sample], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return iterations [N] and the per-step values [N] of ``loss`` or ``grad_norm``.

    NaN where a value is unknown or was not finite.
    """
    x = [s.first_step + i for s in samples for i in range(len(getattr(s, column)))]
    y = [np.nan if v is None else v for s in samples for v in getattr(s, column)]
    return np.array(x, dtype=float), np.array(y, dtype=float)


def readings(
    samples: list[Sample], signal: str, layer: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return iterations [N] and the values [N, units] of a signal in one layer, or in all.

    NaN where a value is missing; N counts only the samples that hold the signal.
    """
    x, rows = [], []
    for sample in samples:
        layers = sample.signals.get(signal, {})
        row = [v for key in sorted(layers) if layer in (None, key) for v in layers[key]]
        if row:
            x.append(sample.iteration)
            rows.append(row)
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    return np.array(x, dtype=float), values
