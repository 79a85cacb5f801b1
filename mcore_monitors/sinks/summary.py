"""What a person looks at first in a sample: the few numbers that console and W&B share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The values of one layer, NaN left out."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """A value and where it was read."""

    value: float
    layer: int
    unit: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return smallest, median and largest of the finite values; None when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    return Spread(low=min(finite), middle=median(finite), high=max(finite))


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


def find(sample: Sample, base: str) -> tuple[str, Mapping[int, Sequence[float]]] | None:
    """Return a signal of this base name (the longest window where there are several)."""
    names = [name for name in sample.signals if base_name(name) == base]
    if not names:
        return None
    name = max(names, key=lambda name: int("0" + name.partition("@")[2]))
    return name, sample.signals[name]
