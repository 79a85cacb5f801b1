"""Who is looked at in a sample: places in turn, and closely what does not look right.

A residual is broken from the first faulty step on, so a place need not be looked at all the time:
an attention is at every other sample, all else at every third, and each at every sample as long as
it is dubious: a residual of it, or evidence, over half its limit. So a fault is met at the third
sample at the latest; two readings in a row over a limit, which make an alarm, are there one sample
later.

Data replicas run the same kernels, so one of two looks: they are even and odd ones, each at its
share of what is due, the other share when it is due again. What is dubious all of them look at.

Who is looked at follows from the number of the sample, the place of the replica and from readings
that all ranks have alike: tensor- and context-parallel ranks look at the same, and nobody has to be
told.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from ...catalogue.conservation import NORMS
from ...views import Replica
from ..base import Readings, Rhythm, StepState

#: a place is looked at in one sample of so many
_STRIDE, _OF_ATTENTION = 3, 2
#: data replicas share what is due out over so many
_SHARES = 2
#: share of a limit from which on a place is dubious
_DUBIOUS = 0.5

#: kind and number
_Place = tuple[str, int]


def norm_place(layer: int, unit: int) -> int:
    """The number of a norm in a row of all layers'; ``unit`` is its place in ``NORMS``."""
    return (layer - 1) * len(NORMS) + unit


def stride_of(kind: str) -> int:
    """Places of a kind are looked at in one sample of so many."""
    return _OF_ATTENTION if kind == "attention" else _STRIDE


class Turns:
    """Says which places are due, and which sequences or tokens of them.

    A *place* is a number among places of one kind: a layer, for norms that of :func:`norm_place`.
    A kind is the first word of a signal's name.

    Args:
        rhythm, state: tell the sample in progress.
        limits: signal to limit, the same on every rank.
        data: this rank among the data replicas.
        whole: everything of every place is due at every sample.
    """

    def __init__(
        self,
        rhythm: Rhythm,
        state: StepState,
        limits: Mapping[str, float],
        data: Replica,
        *,
        whole: bool,
    ) -> None:
        self._rhythm, self._state, self._whole = rhythm, state, whole
        shares = min(data.size, _SHARES)
        self._share = Replica(rank=data.rank % shares, size=shares)
        self._dubious_from = {signal: _DUBIOUS * limit for signal, limit in limits.items()}
        self._dubious: set[_Place] = set()

    @property
    def _turn(self) -> int:
        return self._rhythm.turn(self._state.iteration)

    def is_due(self, kind: str, place: int) -> bool:
        """Whether this rank looks at a place in the sample in progress."""
        if self._whole or (kind, place) in self._dubious:
            return True
        stride, turn = stride_of(kind), self._turn
        # of what is due each share has its part: ranks wait for the one with most to do
        in_turn = place % stride == turn % stride
        return in_turn and self._share.owns(place // stride + turn // stride)

    def some(self, kind: str, one_in: int) -> slice:
        """Every so-and-so-many-th, others at the next turn; of a sequence the same on all ranks."""
        if self._whole or one_in == 1:
            return slice(None)
        look = self._turn // (stride_of(kind) * self._share.size)
        return slice(look % one_in, None, one_in)

    def heed(self, readings: Readings) -> None:
        """Take note of a sample's readings, which are the same on all ranks."""
        read: set[_Place] = set()
        dubious: set[_Place] = set()
        for signal, layers in readings.items():
            bound, kind = self._dubious_from.get(signal), signal.partition("/")[0]
            if bound is None:
                continue
            for layer, values in layers.items():
                for unit, value in enumerate(values):
                    if not isfinite(value):
                        continue  # not looked at, or a step that overflowed
                    place = kind, norm_place(layer, unit) if kind == "norm" else layer
                    read.add(place)
                    if value > bound:
                        dubious.add(place)
        self._dubious = self._dubious - read | dubious

    def restart(self) -> None:
        """Nothing is known of any place."""
        self._dubious.clear()
