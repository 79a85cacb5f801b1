"""Tensors of many places that are alike, worked on together: fewer and larger operations.

A norm of 32 tokens costs two dozen operations that each take longer to start than to run. So what
was taken of it waits for that of the others, but only as long as all that waits is small.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

#: elements that may wait: a few megabytes
MOST = 2**21


class AlikeRows:
    """Holds tensors until many can be worked on at once, and nothing between samples.

    Args:
        work: called with (key, places, tensors of all calls stacked [calls, ...]).
    """

    def __init__(
        self, work: Callable[[Hashable, tuple[int, ...], list[torch.Tensor]], None]
    ) -> None:
        self._work = work
        self._waiting: dict[Hashable, list[tuple[int, tuple[torch.Tensor, ...]]]] = {}
        self._elements = 0

    def add(self, kind: Hashable, place: int, *tensors: torch.Tensor) -> None:
        """Take in the tensors of one call at a place; they are worked on with others of the kind.

        Args:
            kind: what ``work`` has to know; the same shapes are seen to here.
            place: number that ``work`` is given for it.
        """
        key = (kind, *(x.shape for x in tensors))
        self._waiting.setdefault(key, []).append((place, tensors))
        self._elements += sum(x.numel() for x in tensors)
        if self._elements > MOST:
            self.flush()

    def flush(self) -> None:
        """Work on all that waits."""
        for (kind, *_), calls in self._waiting.items():
            stacked = [torch.stack(one) for one in zip(*(t for _, t in calls), strict=True)]
            self._work(kind, tuple(place for place, _ in calls), stacked)
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self._waiting.clear()
        self._elements = 0
