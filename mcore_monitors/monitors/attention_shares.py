"""Which heads' query and key weights fall to this rank, batched by equal shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..views import AttentionView


@dataclass(frozen=True)
class Piece:
    """What of one view falls to this rank: query groups, or some of the heads of a group.

    Attributes:
        units: (local group, number of the slice of its heads) of each.
        heads_per_unit: heads of a slice; all of the group where it is not cut.
    """

    view: AttentionView
    units: list[tuple[int, int]]
    heads_per_unit: int

    @property
    def heads(self) -> list[int]:
        """Global numbers of the query heads, in the order in which they are read."""
        n = self.heads_per_unit
        firsts = [self.view.head(group) + n * cut for group, cut in self.units]
        return [first + i for first in firsts for i in range(n)]

    @property
    def keys(self) -> list[int]:
        """Global numbers of the query groups, one a unit."""
        return [self.view.first_group + group for group, _ in self.units]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q [units × heads_per_unit, d, D] and W_k [units, d, D]."""
        groups = sorted({group for group, _ in self.units})
        query, key = self.view.take(groups)
        if self.heads_per_unit == self.view.heads_per_group or not groups:
            return query, key
        cuts = query.unflatten(0, (-1, self.heads_per_unit))
        of_group = self.view.heads_per_group // self.heads_per_unit
        places = [(groups.index(group), cut) for group, cut in self.units]
        rows = [cuts[place * of_group + cut] for place, cut in places]
        return torch.cat(rows), torch.stack([key[place] for place, _ in places])


@dataclass(frozen=True)
class Batch:
    """Heads of equal shape over all layers, and where their values stand.

    Attributes:
        part: as :class:`.AttentionView` has it.
        members: numbers of the pieces, in their order.
        heads: [H] place of each head in a flat [layers × heads].
        groups: [G] place of each query group in a flat [layers × groups].
    """

    part: str
    members: list[int]
    heads: torch.Tensor
    groups: torch.Tensor


def share_out(views: list[AttentionView]) -> list[Piece]:
    """This rank's share, dealt out in turn over the ranks that hold the same weights.

    Whole query groups, so that a key is read and kept once; where there are more ranks than groups
    of a part, slices of a group's heads (a key that all heads of a layer share would otherwise
    leave all of them to one rank). A view whose reading needs all ranks is in the list even where
    nothing of it falls to this one.
    """
    groups = Counter()
    for view in views:
        groups[view.part] += view.groups
    pieces, dealt = [], 0
    for view in views:
        cuts = _cuts(view.heads_per_group, view.replica.size / groups[view.part])
        units = [(group, cut) for group in range(view.groups) for cut in range(cuts)]
        mine = [unit for i, unit in enumerate(units) if view.replica.owns(dealt + i)]
        dealt += len(units)
        if mine or view.collective:
            pieces.append(Piece(view, mine, view.heads_per_group // cuts))
    return pieces


def _cuts(heads: int, wanted: float) -> int:
    """The fewest equal slices of ``heads``, ``wanted`` or more of them where that can be."""
    return min(n for n in range(1, heads + 1) if heads % n == 0 and n >= min(wanted, heads))


def batches(
    pieces: list[Piece],
    read: list[tuple[torch.Tensor, torch.Tensor]],
    heads: int,
    groups: int,
) -> list[Batch]:
    """Put pieces of equal shape and number format together.

    Args:
        pieces: this rank's share.
        read: what reading each of them gave.
        heads, groups: of a layer of the whole model.
    """
    alike: dict[tuple, list[int]] = {}
    for i, (piece, (query, key)) in enumerate(zip(pieces, read, strict=True)):
        if piece.units:
            shape = piece.heads_per_unit, *key.shape[1:], query.dtype, key.dtype
            alike.setdefault((piece.view.part, shape), []).append(i)
    return [
        Batch(
            part,
            members,
            _places(((pieces[i].view.layer, pieces[i].heads) for i in members), heads, read),
            _places(((pieces[i].view.layer, pieces[i].keys) for i in members), groups, read),
        )
        for (part, _), members in alike.items()
    ]


def _places(
    units: Iterator[tuple[int, list[int]]], width: int, read: list[tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    places = [(layer - 1) * width + unit for layer, numbers in units for unit in numbers]
    return torch.tensor(places).to(read[0][0].device, non_blocking=True)
