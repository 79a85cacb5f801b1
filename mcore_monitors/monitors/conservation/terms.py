"""Terms of residuals that are only complete when all shards and micro-batches are in.

A sum over a sequence is spread over context-parallel ranks, a sum over the vocabulary over
tensor-parallel ones, and a norm or an absolute value may only be taken of the whole. So the hooks
leave their terms here, and one collective a sample completes all of them together; where nothing
is spread, none is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from ...parallel import GroupSum

#: sums [B, ...] of one call, the signed residual first and its scale second
Terms = tuple[torch.Tensor, ...]


class PendingTerms:
    """Holds the terms of one sample, and nothing between samples.

    Args:
        group: adds up over the ranks that hold the other shards.
    """

    def __init__(self, group: GroupSum) -> None:
        self.group = group
        self._terms: dict[tuple[str, int], list[Terms]] = {}

    def add(self, signal: str, layer: int, terms: Terms) -> None:
        """Take in the terms of one micro-batch."""
        self._terms.setdefault((signal, layer), []).append(terms)

    def clear(self) -> None:
        """Forget them."""
        self._terms.clear()

    def complete(self) -> Iterator[tuple[str, list[int], Terms]]:
        """Empty it: (signal, layers, terms), a layer's calls behind one another.

        Layers with terms of one shape come together, [layers, B, ...]. Every rank of the group
        calls it with terms of the same signals, layers and shapes, in any order of arrival.
        """
        keys = sorted(self._terms)
        # micro-batches need not be of one size
        whole = [
            tuple(torch.cat(parts) for parts in zip(*calls, strict=True))
            if len(calls := self._terms[key]) > 1
            else calls[0]
            for key in keys
        ]
        self._terms.clear()
        if self.group.size > 1 and whole:
            flat = [part for terms in whole for part in terms]
            total = self.group(torch.cat([part.flatten() for part in flat]))
            pieces = iter(total.split([part.numel() for part in flat]))
            whole = [tuple(next(pieces).view_as(part) for part in terms) for terms in whole]
        alike = sorted(zip(keys, whole, strict=True), key=_kind)
        for (signal, _), items in groupby(alike, key=_kind):
            listed = list(items)
            stacked = tuple(torch.stack(t) for t in zip(*(t for _, t in listed), strict=True))
            yield signal, [layer for (_, layer), _ in listed], stacked


def _kind(item: tuple[tuple[str, int], Terms]) -> tuple[str, tuple[int, ...]]:
    (signal, _), terms = item
    return signal, tuple(terms[0].shape)
