"""Which heads' query and key weights fall to this rank, batched by equal shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def _sliced(self) -> bool:
        return self.heads_per_unit < self.view.heads_per_group

    @cached_property
    def _whole(self) -> bool:
        every = len(self.units) == self.view.groups
        return every and not self._sliced and self.view.read_groups is None

    def read(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views on the live W_q [heads, d, D] and W_k [keys, d, D], one after the other."""
        if self._whole:
            query, key = self.view.read()
            return [query], [key]
        groups = sorted({group for group, _ in self.units})
        query, key = self.view.take(groups)
        if not self._sliced or not groups:
            return [query], [key]
        cuts = query.unflatten(0, (-1, self.heads_per_unit))
        of_group = self.view.heads_per_group // self.heads_per_unit
        places = [(groups.index(group), cut) for group, cut in self.units]
        return (
            [cuts[place * of_group + cut] for place, cut in places],
            [key[place : place + 1] for place, _ in places],
        )


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
    """This rank's share of what is dealt out over the ranks that hold the same weights.

    Each gets as many as the others, of layers that follow one another: it then reads few layers,
    most of them whole. Whole query groups, so that a key is read and kept once; where there are
    more ranks than groups of a part, slices of a group's heads (a key that all heads of a layer
    share would otherwise leave all of them to one rank). A view whose reading needs all ranks is in
    the list even where nothing of it falls to this one.
    """
    groups = Counter()
    for view in views:
        groups[view.part] += view.groups
    cuts = [_cuts(v.heads_per_group, v.replica.size / groups[v.part]) for v in views]
    total = Counter()
    for view, n in zip(views, cuts, strict=True):
        total[view.part] += view.groups * n
    pieces, dealt = [], Counter()
    for view, n in zip(views, cuts, strict=True):
        units = [(group, cut) for group in range(view.groups) for cut in range(n)]
        first, rank, size = dealt[view.part], view.replica.rank, view.replica.size
        mine = [
            unit
            for i, unit in enumerate(units, start=first)
            if i * size // total[view.part] == rank
        ]
        dealt[view.part] += len(units)
        if mine or view.collective:
            pieces.append(Piece(view, mine, view.heads_per_group // n))
    return pieces


def _cuts(heads: int, wanted: float) -> int:
    """The fewest equal slices of ``heads``, ``wanted`` or more of them where that can be."""
    return min(n for n in range(1, heads + 1) if heads % n == 0 and n >= min(wanted, heads))


def batches(
    pieces: list[Piece],
    read: list[tuple[list[torch.Tensor], list[torch.Tensor]]],
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
    device = read[0][0][0].device
    for i, (piece, ((query, *_), (key, *_))) in enumerate(zip(pieces, read, strict=True)):
        if piece.units:
            # queries and keys stand in one tensor: the wider of two formats holds both
            dtype = torch.promote_types(query.dtype, key.dtype)
            shape = piece.heads_per_unit, *key.shape[1:], dtype
            alike.setdefault((piece.view.part, shape), []).append(i)
    return [
        Batch(
            part,
            members,
            _places(((pieces[i].view.layer, pieces[i].heads) for i in members), heads, device),
            _places(((pieces[i].view.layer, pieces[i].keys) for i in members), groups, device),
        )
        for (part, _), members in alike.items()
    ]


def _places(
    units: Iterator[tuple[int, list[int]]], width: int, device: torch.device
) -> torch.Tensor:
    places = [(layer - 1) * width + unit for layer, numbers in units for unit in numbers]
    return torch.tensor(places).to(device, non_blocking=True)
