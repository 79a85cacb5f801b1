"""What detection hands out: alarms, a diagnosis, and the verdict that carries them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CRITICAL = "critical"
WARNING = "warning"

#: Causes that a diagnosis may name; recovery has one remedy for each.
CAUSES = (
    "attention_numerics",
    "router_numerics",
    "kernel_numerics",
    "router_or_learning_rate",
    "combined",
    "data",
    "unknown",
)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One cell (signal, layer, unit) that left its healthy course for long enough."""

    signal: str
    """Name with window, e.g. ``attention/delta2_effective_rank@50``."""
    layer: int
    """1-based global layer number."""
    unit: int | None
    """Index of the head or query group; None for a signal with one value a layer."""
    iteration: int
    """Iteration at which the rule fired."""
    onset_iteration: int
    """Iteration of the first sample of the deviation."""
    severity: str
    """``critical`` (recovery may act on it) or ``warning``."""
    rule: str
    """``limit`` or ``band``."""
    value: float
    """The value that made the rule fire."""
    limit: float | None = None
    """Limit rule: the limit that was passed."""
    band: dict[str, float | None] | None = None
    """Band rule: ``median``, ``low``, ``high`` (None on the side that is not watched) in the
    signal's own unit, and ``z``, the deviation in robust standard deviations."""
    evidence: str = ""
    """The finding in words."""

    def to_event(self) -> dict[str, Any]:
        """Return the fields of the ``alarm`` event (without kind, iteration, attempt, time)."""
        fields = asdict(self)
        del fields["iteration"]
        for name in ("limit", "band"):
            if fields[name] is None:
                del fields[name]
        return fields


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the active alarms together say about the cause."""

    cause: str
    """One of :data:`CAUSES`."""
    confidence: float
    """From 0 to 1: how firmly the rule table holds the cause, not a calibrated probability."""
    severity: str
    """``critical`` if any alarm behind it is."""
    onset_iteration: int
    """Earliest onset among the alarms of that severity."""
    signals: tuple[str, ...]
    """Signals that speak for it, without windows."""
    sentence: str
    """For the person who is woken up: where, what, since when, the likely fault, and why."""
    site: str = ""
    """Where a conservation identity is broken: which one, in which layer and head, in which pass,
    and what that says of the kernel; empty where none is."""

    def to_event(self) -> dict[str, Any]:
        """Return the fields of the ``diagnosis`` event."""
        return {**asdict(self), "signals": list(self.signals)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one sample changed."""

    alarms: tuple[Alarm, ...] = ()
    """Alarms raised by this sample; a cell that stays bad is not repeated."""
    active: tuple[Alarm, ...] = ()
    """Every alarm whose cell has not calmed down yet, the new ones included."""
    diagnosis: Diagnosis | None = None
    """Given when the cause, its confidence or its severity is new; None when nothing changed."""
    standing: Diagnosis | None = None
    """What the active alarms say now, new or not; None when there are none."""
