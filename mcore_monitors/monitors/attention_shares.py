"""Which heads' query and key weights fall to this rank, batched by equal shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..views import AttentionView


@dataclass(frozen=True)
class Piece:
    """The query groups of one view that fall to this rank, by their local numbers."""

    view: AttentionView
    groups: list[int]

    @property
    def heads(self) -> list[int]:
        """Global numbers of the query heads, in the order in which they are read."""
        firsts = [self.view.head(g) for g in self.groups]
        return [first + i for first in firsts for i in range(self.view.heads_per_group)]

    @property
    def keys(self) -> list[int]:
        """Global numbers of the query groups."""
        return [self.view.first_group + g for g in self.groups]


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
    """This rank's share of the query groups, dealt out in turn over the ranks that hold them.

    A view whose reading needs all ranks is in the list even where no group of it falls to this one.
    """
    pieces, dealt = [], 0
    for view in views:
        mine = [g for g in range(view.groups) if view.replica.owns(dealt + g)]
        dealt += view.groups
        if mine or view.collective:
            pieces.append(Piece(view, mine))
    return pieces


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
        if piece.groups:
            shape = piece.view.heads_per_group, *key.shape[1:], query.dtype, key.dtype
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
