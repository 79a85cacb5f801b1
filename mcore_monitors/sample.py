"""One sample: what the monitors read at one iteration, and the names a signal may have.

A sample is made once per interval, after the reduction over ranks, and is what detection judges and
what every sink writes. This module imports neither torch nor a host, so that a recorded run can be
read and judged anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mcore_monitors.errors import MonitorsError

#: Version of the history record; a reader refuses any other.
RECORD_VERSION = 1
#: Significant digits kept in a record: what fp32 can hold, and lines stay short.
RECORD_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class SignalInfo:
    """What a signal measures and how to read it."""

    name: str
    """Name without a window, e.g. ``attention/delta2_effective_rank``."""
    family: str
    """``weights``, ``activations`` or ``conservation``."""
    unit: str
    """What one value of a layer stands for: ``head``, ``query group`` or ``layer``."""
    healthy: str
    """Course in a healthy run: ``stable``, ``drifts`` or ``low`` (at the round-off floor)."""
    watch: str
    """Side that speaks for a fault: ``low``, ``high``, ``both``, or ``limit`` (a fixed limit)."""
    formula: str
    """The definition, in one line."""
    source: str
    """Paper, equation or derivation."""


_MDM = "arXiv 2606.28116 (Mechanism-Driven Monitors)"

#: Every signal there is, by base name. Frozen: dashboards and recorded runs rely on these names.
SIGNALS: Mapping[str, SignalInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            SignalInfo(
                name="attention/key_shift",
                family="conservation",
                unit="query group",
                healthy="low",
                watch="limit",
                formula="mean over sequences of ‖Σ_j dK_j‖ / Σ_j ‖dK_j‖ (no unit; exactly 0 in "
                "exact arithmetic, because softmax ignores one vector added to all keys)",
                source="own derivation from the softmax Jacobian; what breaks it: arXiv 2510.04212",
            ),
            SignalInfo(
                name="attention/delta2_effective_rank",
                family="weights",
                unit="head",
                healthy="stable",
                watch="low",
                formula="exp(−Σ p ln p), p_i = s_i²/Σ s_j² over the singular values s of "
                "ΔW_q W_kᵀ + W_q ΔW_kᵀ; Δ over W iterations (from 1 to 2 × head dimension)",
                source=f"{_MDM}, first-order attention update",
            ),
            SignalInfo(
                name="router/weight_similarity",
                family="weights",
                unit="layer",
                healthy="drifts",
                watch="both",
                formula="mean over expert pairs i ≠ j of cos(w_i, w_j), w the router's rows "
                "(from −1/(E − 1) to 1)",
                source=f"{_MDM}, equation 7",
            ),
            SignalInfo(
                name="router/centred_conditioning",
                family="weights",
                unit="layer",
                healthy="drifts",
                watch="both",
                formula="max_i ‖w_i − w̄‖ / ‖w̄‖; small means that the common mode dominates",
                source=_MDM,
            ),
            SignalInfo(
                name="router/routing_entropy",
                family="activations",
                unit="layer",
                healthy="drifts",
                watch="both",
                formula="mean over tokens of −Σ_e p_e ln p_e, p over all experts before top-k "
                "(nats, from 0 to ln E)",
                source=f"{_MDM}, equation 8",
            ),
            SignalInfo(
                name="router/routing_entropy_normalised",
                family="activations",
                unit="layer",
                healthy="drifts",
                watch="both",
                formula="routing entropy divided by ln E (from 0 to 1)",
                source=f"{_MDM}, equation 8",
            ),
        )
    }
)


def base_name(signal: str) -> str:
    """Return a signal's name without its window: ``a/b@50`` gives ``a/b``."""
    return signal.split("@", 1)[0]


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    value = float(value)
    return float(f"{value:.{RECORD_DIGITS}g}") if value else 0.0


def _column(values: Iterable[float | None]) -> list[float | None]:
    return [_finite(value) for value in values]


@dataclass(kw_only=True)
class Sample:
    """Everything read at one iteration, reduced over all ranks."""

    iteration: int
    """Absolute iteration, the last one that this sample covers."""
    attempt: int
    """Number of rollbacks before it."""
    time: float
    """Seconds since the epoch."""
    consumed_samples: int
    """Training samples (sequences) consumed so far."""
    first_step: int
    """Iteration of ``loss[0]`` and ``grad_norm[0]``."""
    loss: list[float | None]
    """Training loss in nats, one a step; None where unknown or not finite."""
    grad_norm: list[float | None]
    """Global gradient norm before clipping, one a step; None where unknown or not finite."""
    learning_rate: float | None
    """Learning rate of the last step."""
    signals: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    """Signal name → 1-based global layer number → one value a unit; may hold NaN in memory."""
    cost_seconds: float = 0.0
    """Wall time that monitoring took since the last sample."""

    def to_record(self) -> dict[str, Any]:
        """Return the history record: JSON-ready, null for what is not finite, seven digits."""
        return {
            "v": RECORD_VERSION,
            "iteration": int(self.iteration),
            "attempt": int(self.attempt),
            "time": round(float(self.time), 3),
            "consumed_samples": int(self.consumed_samples),
            "first_step": int(self.first_step),
            "loss": _column(self.loss),
            "grad_norm": _column(self.grad_norm),
            "learning_rate": _finite(self.learning_rate),
            "signals": {
                name: {str(layer): _column(values) for layer, values in layers.items()}
                for name, layers in self.signals.items()
            },
            "cost_seconds": _finite(self.cost_seconds),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sample:
        """Return the sample of a history record; null signal values become NaN.

        Raises:
            MonitorsError: a field is missing or of the wrong kind, or the version is not ours.
        """
        try:
            if record["v"] != RECORD_VERSION:
                raise MonitorsError(
                    f"history record of version {record['v']!r}; this release reads version "
                    f"{RECORD_VERSION}"
                )
            return cls(
                iteration=int(record["iteration"]),
                attempt=int(record["attempt"]),
                time=float(record["time"]),
                consumed_samples=int(record["consumed_samples"]),
                first_step=int(record["first_step"]),
                loss=_column(record["loss"]),
                grad_norm=_column(record["grad_norm"]),
                learning_rate=_finite(record["learning_rate"]),
                signals={
                    str(name): {
                        int(layer): [math.nan if x is None else float(x) for x in values]
                        for layer, values in layers.items()
                    }
                    for name, layers in record["signals"].items()
                },
                cost_seconds=float(record["cost_seconds"] or 0.0),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MonitorsError(
                f"not a history record of version {RECORD_VERSION}: {type(error).__name__} {error}"
            ) from error
