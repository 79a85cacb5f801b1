"""What every monitor answers to.

A monitor owns its taps and snapshots. Between samples its hooks only add into buffers that were
allocated when it was made; at a sample it writes sums into its fields of the packed buffer, and
after the collective turns the reduced sums into readings. It talks to no other rank and decides
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

#: signal name -> layer -> one value per unit (head, query group, or the layer itself)
Readings = dict[str, dict[int, list[float]]]


@dataclass
class StepState:
    """Where the training step in progress stands; shared by all taps, written by the runtime.

    Attributes:
        iteration: the absolute iteration in progress, counted from 1.
        armed: whether that iteration is sampled.
    """

    iteration: int = 1
    armed: bool = False


class Rhythm:
    """The samples of a run in turn, told by absolute iterations: a resumed run goes on with them.

    Args:
        interval: iterations between samples.
        every: what no rule judges is read at one sample out of this many, the first one included.
    """

    def __init__(self, interval: int = 1, every: int = 1) -> None:
        self._interval, self._every = interval, every

    def turn(self, iteration: int) -> int:
        """Number, from 1, of the sample that an iteration leads to or is sampled in."""
        return -(-iteration // self._interval)

    def is_whole(self, iteration: int) -> bool:
        """Whether all is read at that sample."""
        return (self.turn(iteration) - 1) % self._every == 0


class Monitor(ABC):
    """One family of signals on one rank."""

    #: name in the configuration and in events
    name: str
    #: whether ``collect`` waits for other ranks; then it runs on all of them or on none
    collective: bool = False

    def restart(self) -> None:  # noqa: B027 (most have nothing to forget)
        """Training goes on from another state: forget what was added up since the last sample."""

    @abstractmethod
    def schema(self) -> dict[str, tuple[int, ...]]:
        """Fields of the packed buffer, the same on every rank: name to shape."""

    @abstractmethod
    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        """Add this rank's share into ``fields`` and clear the accumulators. No host sync."""

    @abstractmethod
    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        """Turn reduced sums (float64, on the CPU) into readings."""


def mean_by_layer(total: torch.Tensor, count: torch.Tensor) -> dict[int, list[float]]:
    """Divide sums by counts; layers that nobody counted are left out.

    Args:
        total, count: [layers, units], on the host.

    Returns:
        layer number (from 1) to one mean per unit; a unit without a count is NaN.
    """
    sums, counts = total.numpy(), count.numpy()  # a third of PyTorch's time on a few numbers
    seen = (counts != 0).any(axis=1).tolist()  # true for NaN: broken must not pass as empty
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (sums / counts).tolist()
    return {i + 1: values for i, values in enumerate(mean) if seen[i]}
