"""One sample: what the monitors read at one iteration, as every reader sees it.

A sample is made once per interval, after the reduction over ranks, and is what detection judges and
what every sink writes. This module imports neither torch nor a host, so that a recorded run can be
read and judged anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from mcore_monitors.errors import MonitorsError

#: Version of the history record; a reader refuses any other.
RECORD_VERSION = 1
#: Significant digits kept in a record: what fp32 can hold, and lines stay short.
RECORD_DIGITS = 7
_FORMAT = f".{RECORD_DIGITS}g"


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    value = float(value)
    return float(f"{value:.{RECORD_DIGITS}g}") if value else 0.0


def _column(values: Iterable[float | None]) -> list[float | None]:
    """As :func:`_finite`, in the few operations that a hundred thousand values leave time for."""
    # x − x is zero for a finite x only; adding 0.0 makes zero of its negative
    return [
        None if x is None or x - x != 0 else float(format(x, _FORMAT)) + 0.0 for x in values
    ]


@cache
def _row_format(n: int) -> str:
    return ",".join([f"%{_FORMAT}"] * n)


def _text(values: Sequence[float]) -> str | None:
    """Finite values in seven digits, a comma between two; None where one is not a finite number.

    One operation, however many there are.
    """
    try:
        text = _row_format(len(values)) % tuple(values)
    except TypeError:
        return None
    return None if "n" in text else text  # as in nan and inf


def _row(layer: int, values: Sequence[float], text: str | None) -> str:
    """A layer's values in JSON, as :func:`_column` has them; ``text`` is that of :func:`_text`."""
    if text is None:
        text = ",".join(["null" if x - x != 0 else format(x, _FORMAT) for x in values])
    return f'"{layer}":[{text}]'


def _rounded(values: Sequence[float], text: str | None) -> list[float]:
    """Values as they come back from a record: seven digits, NaN for what is not finite.

    Args:
        text: of :func:`_text`.
    """
    if text:
        return [float(x) + 0.0 for x in text.split(",")]
    return [math.nan if x is None else x for x in _column(values)]


#: text of a record without spaces
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_key = cache(_ENCODER.encode)


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
    #: rows as text, since judging and then recording take the same digits; not of a sample that was
    #: read back, of which there are as many as a run has
    _texts: dict[tuple[str, int], str | None] | None = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def _row_text(self, name: str, layer: int) -> str | None:
        if self._texts is None:
            return _text(self.signals[name][layer])
        key = name, layer
        if key not in self._texts:
            self._texts[key] = _text(self.signals[name][layer])
        return self._texts[key]

    def recorded(self, wanted: Callable[[str], bool]) -> Sample:
        """The sample as its record holds it: seven digits; None or NaN for what is not finite.

        Args:
            wanted: whether to keep a signal.
        """
        return replace(
            self,
            loss=_column(self.loss),
            grad_norm=_column(self.grad_norm),
            learning_rate=_finite(self.learning_rate),
            signals={
                name: {
                    layer: _rounded(values, self._row_text(name, layer))
                    for layer, values in layers.items()
                }
                for name, layers in self.signals.items()
                if wanted(name)
            },
        )

    def to_record(self) -> dict[str, Any]:
        """Return the history record: JSON-ready, null for what is not finite, seven digits."""
        head, tail = self._around_signals()
        signals = {
            name: {str(layer): _column(values) for layer, values in layers.items()}
            for name, layers in self.signals.items()
        }
        return {**head, "signals": signals, **tail}

    def _around_signals(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What stands in a record before its signals, and behind them."""
        head = {
            "v": RECORD_VERSION,
            "iteration": int(self.iteration),
            "attempt": int(self.attempt),
            "time": round(float(self.time), 3),
            "consumed_samples": int(self.consumed_samples),
            "first_step": int(self.first_step),
            "loss": _column(self.loss),
            "grad_norm": _column(self.grad_norm),
            "learning_rate": _finite(self.learning_rate),
        }
        return head, {"cost_seconds": _finite(self.cost_seconds)}

    def to_json(self) -> str:
        """Return the text of :meth:`to_record`: its numbers are not read back in between."""
        head, tail = map(_ENCODER.encode, self._around_signals())
        signals = ",".join(
            f"{_key(name)}:{{"
            + ",".join(_row(n, row, self._row_text(name, n)) for n, row in layers.items())
            + "}"
            for name, layers in self.signals.items()
        )
        return f'{head[:-1]},"signals":{{{signals}}},{tail[1:]}'

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
            sample = cls(
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
            sample._texts = None
            return sample
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MonitorsError(
                f"not a history record of version {RECORD_VERSION}: {type(error).__name__} {error}"
            ) from error
