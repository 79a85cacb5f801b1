"""What a person looks at first in a sample: the few numbers that console and W&B share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mcore_monitors.catalogue import SIGNALS, base_name, is_judged
from mcore_monitors.sample import Sample
from mcore_monitors.windows import window_of


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The values of one layer, NaN left out."""

    low: float
    #: a quarter, half and three quarters of the values lie below
    quarter: float
    middle: float
    three_quarters: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A value and where it was read."""

    value: float
    layer: int
    unit: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return smallest, quartiles and largest of the finite values; None when there is none."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return None
    return Spread(
        low=ordered[0],
        quarter=_quantile(ordered, 0.25),
        middle=_quantile(ordered, 0.5),
        three_quarters=_quantile(ordered, 0.75),
        high=ordered[-1],
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of values in rising order, linear between two of them."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values; None when there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def largest(values: Sequence[float | None]) -> float | None:
    """Return the largest of the known values; None when there is none."""
    return max((value for value in values if value is not None), default=None)


def watches_low(signal: str) -> bool:
    """Whether a low value of the signal speaks for a fault."""
    info = SIGNALS.get(base_name(signal))
    return info is not None and info.watch == "low"


def worst(signal: str, layers: Mapping[int, Sequence[float]]) -> Place | None:
    """Return the value nearest to trouble over all layers and heads; None when none is finite."""
    places = [
        Place(value=value, layer=layer, unit=unit)
        for layer, values in layers.items()
        for unit, value in enumerate(values)
        if math.isfinite(value)
    ]
    if not places:
        return None
    pick = min if watches_low(signal) else max
    return pick(places, key=lambda place: place.value)


def find(
    sample: Sample, base: str, windows: Collection[int] | None = None
) -> tuple[str, Mapping[int, Sequence[float]]] | None:
    """Return a signal of this base name.

    Args:
        sample: where to look.
        base: name without window and part.
        windows: those that are judged (None: all); of several the longest is taken, and one that is
            not judged only where there is no other.
    """
    names = [name for name in sample.signals if base_name(name) == base]
    if not names:
        return None
    name = max(names, key=lambda name: (is_judged(name, windows), window_of(name) or 0))
    return name, sample.signals[name]
