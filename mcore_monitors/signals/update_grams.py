"""Gram matrices of what queries and keys were and of what they became.

All that :mod:`.update_spectra` needs of the weights, in one pass over them. Shape names as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of a widened piece of weights. A call over all heads of a large model must not hold a
#: widened copy of all its weights; on a CPU a piece that stays in the cache is also faster.
_PIECE_BYTES = {"cpu": 2**20}
_PIECE_BYTES_ELSEWHERE = 256 * 2**20

#: Elements after each widened row. Rows whose distance is a power of two fall on the same few lines
#: of the cache: without the gap the products take a twentieth longer on a CPU.
_GAP = 64
#: Elements of a row that is too short for that.
_SHORT = 4 * _GAP

#: Rows of a matrix up to which calls cost more than the work in them. MKL's Cholesky takes ten
#: times as long for 128 as for 64.
SMALL = 64


class Gram(NamedTuple):
    """Gram matrices of [ΔW; W] in three blocks, float64, with W the old weight [n, d, D]."""

    update: Tensor
    """[n, d, d], ΔW ΔWᵀ."""
    cross: Tensor
    """[n, d, d], ΔW Wᵀ."""
    weight: Tensor
    """[n, d, d], W Wᵀ."""

    @property
    def channels(self) -> int:
        """d."""
        return self.update.shape[1]

    def whole(self, *, update_first: bool) -> Tensor:
        """[n, 2d, 2d]: X Xᵀ for X = [ΔW; W], or for [W; ΔW]."""
        if update_first:
            rows = [self.update, self.cross], [self.cross.mT, self.weight]
        else:
            rows = [self.weight, self.cross.mT], [self.cross, self.update]
        return torch.cat([torch.cat(row, dim=2) for row in rows], dim=1)


class WholeGram(NamedTuple):
    """As :class:`Gram`, each in one piece; blocks are views."""

    matrix: Tensor
    """[n, 2d, 2d], X Xᵀ for X = [ΔW; W]."""

    @property
    def channels(self) -> int:
        """d."""
        return self.matrix.shape[1] // 2

    @property
    def update(self) -> Tensor:
        """[n, d, d], ΔW ΔWᵀ."""
        return self.matrix[:, : self.channels, : self.channels]

    @property
    def cross(self) -> Tensor:
        """[n, d, d], ΔW Wᵀ."""
        return self.matrix[:, : self.channels, self.channels :]

    @property
    def weight(self) -> Tensor:
        """[n, d, d], W Wᵀ."""
        return self.matrix[:, self.channels :, self.channels :]

    def whole(self, *, update_first: bool) -> Tensor:
        """As :meth:`Gram.whole`; with ``update_first`` it is the matrix itself."""
        if update_first:
            return self.matrix
        d = self.channels
        return self.matrix.view(-1, 2, d, 2, d).flip(1, 3).view(-1, 2 * d, 2 * d)


class UpdateGrams(NamedTuple):
    """Gram matrices of what a head's queries and keys were and became."""

    query: Gram | WholeGram
    """n = H."""
    key: Gram | WholeGram
    """n = G."""


@torch.no_grad()
def update_grams(
    wq_old: Tensor,
    wk_old: Tensor,
    wq_new: Tensor,
    wk_new: Tensor,
    *,
    gram_dtype: torch.dtype = torch.float64,
) -> UpdateGrams:
    """The two Gram matrices, in one pass over the weights; arguments as :func:`update_spectra`."""
    check_shapes(wq_old, wk_old, wq_new, wk_new)
    with _no_reduced_precision() if gram_dtype == torch.float32 else nullcontext():
        return UpdateGrams(_gram(wq_old, wq_new, gram_dtype), _gram(wk_old, wk_new, gram_dtype))


@torch.no_grad()
def stacked_grams(olds: Sequence[Tensor], new: Tensor, heads: int) -> UpdateGrams:
    """As :func:`update_grams` in float64, for weights that stand in one tensor.

    Args:
        olds: earlier weights, each [H + G, d, D]: query projections and then key projections.
        new: [H + G, d, D], what all of them are compared with.
        heads: H.

    Returns:
        Gram matrices of len(olds) × H heads and as many groups, one comparison after the other.
    """
    grams = [_gram(old, new, torch.float64) for old in olds]
    form, sizes = type(grams[0]), [heads, len(new) - heads]
    # of each comparison the blocks of its queries and those of its keys
    found = [zip(*(x.split_with_sizes(sizes) for x in gram), strict=True) for gram in grams]
    if len(found) == 1:
        query, key = found[0]
        return UpdateGrams(form(*query), form(*key))
    sides = (map(torch.cat, zip(*side, strict=True)) for side in zip(*found, strict=True))
    return UpdateGrams(*(form(*blocks) for blocks in sides))


def of_heads(block: Tensor, heads: int) -> Tensor:
    """Each head's own: [heads, d, d] from one a group."""
    repeats = heads // len(block)
    return block if repeats == 1 else block.repeat_interleave(repeats, dim=0)


def check_shapes(wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor) -> None:
    """Raise ValueError unless queries are [H, d, D] and keys [G, d, D] with H a multiple of G."""
    shapes = [tuple(w.shape) for w in (wq_old, wk_old, wq_new, wk_new)]
    good = (
        all(len(s) == 3 for s in shapes)
        and shapes[0] == shapes[2]
        and shapes[1] == shapes[3]
        and shapes[0][1:] == shapes[1][1:]
        and shapes[1][0] > 0
        and shapes[0][0] % shapes[1][0] == 0
    )
    if not good:
        raise ValueError(
            "query projections must be [H, d, D] and key projections [G, d, D] with H a multiple "
            f"of G, old and new alike; got W_q {shapes[0]} and {shapes[2]}, "
            f"W_k {shapes[1]} and {shapes[3]}"
        )


@contextmanager
def _no_reduced_precision() -> Iterator[None]:
    """Keep TF32 and bf16 out of float32 GEMMs, whatever the training has switched on."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _gram(old: Tensor, new: Tensor, dtype: torch.dtype) -> Gram | WholeGram:
    """Gram matrices of [ΔW; W], W the old weight."""
    n, d, hidden = old.shape
    limit = _PIECE_BYTES.get(old.device.type, _PIECE_BYTES_ELSEWHERE)
    fitting, step = limit // max(1, 2 * d * hidden * dtype.itemsize), n
    if n > fitting:
        step = max(1, fitting)
        while n % step:
            step -= 1
    # Filled in place, and one buffer for all pieces: fresh temporaries of this size would cost as
    # much time as the product.
    gap = _GAP if hidden > _SHORT else 0
    both = torch.empty(step, 2 * d, hidden + gap, dtype=dtype, device=old.device)
    if gap:
        both = both[:, :, :hidden]
    elif 2 * d <= SMALL:
        return _whole_gram(old, new, both)
    # The upper half of [ΔW; W][ΔW; W]ᵀ, and its lower right block.
    upper = both.new_empty(n, d, 2 * d)
    lower = both.new_empty(n, d, d)
    pieces, multiply = [tensor.split(step) for tensor in (old, new, upper, lower)], torch.bmm
    if step == 1:  # a plain product is a little faster than a batch of one
        both, multiply = both[0], torch.mm
        pieces = [tensor.unbind() for tensor in (old, new, upper, lower)]
    update, weight = both.tensor_split(2, dim=-2)
    both_t, weight_t = both.mT, weight.mT
    for before, now, first, second in zip(*pieces, strict=True):
        weight.copy_(before)
        update.copy_(now).sub_(weight)
        multiply(update, both_t, out=first)
        multiply(weight, weight_t, out=second)
    upper = upper.double()
    return Gram(upper[:, :, :d], upper[:, :, d:], lower.double())


def _whole_gram(old: Tensor, new: Tensor, both: Tensor) -> WholeGram:
    """Small Gram matrices: a third more to multiply, and half of the calls.

    Args:
        old, new: [n, d, D], weights.
        both: [step, 2d, D], a buffer for so many of them at a time.
    """
    (n, d, _), step = old.shape, len(both)
    update, weight = both.split_with_sizes([d, d], dim=1)
    both_t, whole = both.mT, both.new_empty(n, 2 * d, 2 * d)
    tensors = old, new, whole
    pieces = [tensors] if step == n else zip(*(t.split(step) for t in tensors), strict=True)
    for before, now, product in pieces:
        weight.copy_(before)
        update.copy_(now).sub_(weight)
        torch.bmm(both, both_t, out=product)
    return WholeGram(whole.double())
