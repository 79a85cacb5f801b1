"""Whether a head's update keeps its direction from one comparison to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..signals.direction import direction_overlap
from ..signals.spike import persistent_spike


@dataclass(frozen=True)
class _Seen:
    iteration: int
    direction: torch.Tensor
    outliers: torch.Tensor
    streak: torch.Tensor


class Persistence:
    """Remembers the leading direction of each head, window by window.

    Only comparisons that share no training step are held against each other: overlapping ones have
    steps in common, and agree by that alone.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], _Seen] = {}

    def update(
        self,
        batch: int,
        window: int,
        period: int,
        iteration: int,
        direction: torch.Tensor,
        outliers: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take in one comparison, and hold it against the one of ``period`` iterations ago.

        Args:
            batch, window: whose it is.
            direction: [H, 2, 2, D], leading directions of each head's update.
            outliers: [H], outlying singular values of each head's update.

        Returns:
            (overlap [H], persistent [H]): |cos| of the two planes, and the number of
            comparisons in a row, this one included, that had an outlying value and the direction of
            the one before. None where there is nothing to hold it against.
        """
        before = self._seen.get((batch, window))
        if before is None or before.iteration != iteration - period:
            answer, streak = None, torch.zeros_like(outliers)
        else:
            overlap = direction_overlap(direction, before.direction)
            both = torch.stack([before.outliers, outliers])
            streak = (before.streak + 1) * persistent_spike(both, overlap[None])
            answer = overlap, streak
        self._seen[batch, window] = _Seen(iteration, direction, outliers, streak)
        return answer
