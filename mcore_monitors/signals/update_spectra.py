"""Spectra of what training did to the queries and keys of an attention head.

Training moves W_q and W_k; attention sees only their product. Between two samples it moved by

    Δ2 = ΔW_qᵀ W_k + W_qᵀ ΔW_k   (first order, rank ≤ 2d, W at the earlier sample)
    Δ3 = ΔW_qᵀ ΔW_k              (second order, rank ≤ d)

both [D, D], and when the update turns coherent, step after step in the same few directions, their
spectra and those of ΔW_q and ΔW_k narrow long before the loss moves (arXiv 2606.28116). Biases of
queries and keys are left out.

Shape names: ``H`` query heads, ``G`` query groups (key heads), ``d`` head dimension, ``D`` hidden
size. A projection is [H, d, D]: its rows are head channels. Query head h uses key head h // (H/G).

No [D, D] matrix is ever formed. Two Gram matrices of size 2d hold everything:

    A = [ΔW_q; W_q],   A Aᵀ = [ΔW_q ΔW_qᵀ  ΔW_q W_qᵀ;  ·  W_q W_qᵀ]
    B = [W_k; ΔW_k],   B Bᵀ = [W_k W_kᵀ  ·;  ΔW_k W_kᵀ  ΔW_k ΔW_kᵀ]

each symmetric, so three [d, d] blocks are formed of either (:class:`Gram`); where there is little
to multiply they are formed whole, in fewer calls (:class:`WholeGram`). Δ2 = Aᵀ B has as squared
singular values the eigenvalues of (A Aᵀ)(B Bᵀ), Δ3 those of the product of the two blocks ΔW ΔWᵀ,
and ΔW_q and ΔW_k those of one block each. With A Aᵀ = Uᵀ U, U upper triangular, the first is the
symmetric U (B Bᵀ) Uᵀ, and the leading block of the same U is the factor that Δ3 needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_monitors.signals.eigenvalues import symmetric_eigenvalues

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
_SMALL = 64

#: Relative spacing of the formats of a Gram product.
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


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


class UpdateSpectra(NamedTuple):
    """Squared singular values, descending, float64; NaN where a weight is not finite."""

    delta2: Tensor
    """[H, 2d], of ΔW_qᵀ W_k + W_qᵀ ΔW_k."""
    delta3: Tensor
    """[H, d], of ΔW_qᵀ ΔW_k."""
    query: Tensor
    """[H, d], of ΔW_q."""
    key: Tensor
    """[G, d], of ΔW_k."""


@torch.no_grad()
def update_spectra(
    wq_old: Tensor,
    wk_old: Tensor,
    wq_new: Tensor,
    wk_new: Tensor,
    *,
    gram_dtype: torch.dtype = torch.float64,
) -> UpdateSpectra:
    """Squared singular values of Δ2, Δ3, ΔW_q and ΔW_k of each head.

    Args:
        wq_old, wq_new: [H, d, D], query projection at the earlier and the later sample.
        wk_old, wk_new: [G, d, D], key projection.
        gram_dtype: working precision of the differences and of the Gram GEMMs, float64 or float32;
            what float32 costs in accuracy is measured in docs/attention_update.md. The
            eigenproblems are always float64.

    Returns:
        Spectra on the inputs' device. All zero for a matrix that did not move; all NaN for a matrix
        with a non-finite weight (with grouped queries: Δ2 and Δ3 of all heads that share the key).

    Raises:
        ValueError: the shapes do not fit together.

    Give all heads, and where possible all windows and layers of equal shape, to one call: on a CUDA
    device their eigenproblems are solved side by side. Nothing waits for the device.
    """
    grams = update_grams(wq_old, wk_old, wq_new, wk_new, gram_dtype=gram_dtype)
    return spectra_from_grams(grams, gram_dtype=gram_dtype)


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


@torch.no_grad()
def spectra_from_grams(
    grams: UpdateGrams, *, gram_dtype: torch.dtype = torch.float64
) -> UpdateSpectra:
    """The spectra that two Gram matrices hold.

    Args:
        grams: of :func:`update_grams`.
        gram_dtype: precision in which the Gram matrices were made.
    """
    delta2, singles = map(gram_eigenvalues, products(grams, gram_dtype=gram_dtype))
    heads = len(delta2)
    query, key, delta3 = singles.split([heads, len(singles) - 2 * heads, heads])
    return UpdateSpectra(delta2, delta3, query, key)


def products(
    grams: UpdateGrams, *, gram_dtype: torch.dtype = torch.float64, delta2_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Positive matrices whose eigenvalues are the squared singular values; lower triangles.

    Args:
        grams, gram_dtype: as :func:`spectra_from_grams` has them.
        delta2_only: leave the others out; the Gram matrices may be overwritten.

    Returns:
        [H, 2d, 2d], of Δ2; and [2 H + G, d, d], those of ΔW_q, of ΔW_k and of Δ3, one after the
        other.
    """
    factor, delta2 = _delta2(grams, gram_dtype, overwrite=delta2_only)
    if delta2_only:
        return delta2, delta2[:0]
    query, key = (side.update for side in grams)
    heads, d = query.shape[:2]
    first = factor[:, :d, :d]
    delta3 = torch.bmm(torch.bmm(first, of_heads(key, heads)), first.mT)
    return delta2, torch.cat([query, key, delta3])


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
    elif 2 * d <= _SMALL:
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


def _delta2(grams: UpdateGrams, dtype: torch.dtype, overwrite: bool) -> tuple[Tensor, Tensor]:
    """U or its leading block [H, d, d], and U (B Bᵀ) Uᵀ [H, 2d, 2d], which has Δ2's eigenvalues.

    Of the second only the lower triangle need be filled in. Small matrices are taken as a whole,
    in a third of the calls, larger ones block by block: U has no lower left block, and half of what
    is symmetric is enough.
    """
    query, key = grams
    heads, d = len(query[0]), query.channels
    # A rank-deficient A (an update of rank one, D < 2d) has eigenvalues that round-off makes
    # negative, seen down to −n·eps/3 of the GEMM's format and a few n·eps of this one, with rows of
    # unit length; Cholesky needs them lifted over zero.
    lift = 2 * d * (_EPS[dtype] + 4 * _EPS[torch.float64])
    if 2 * d <= _SMALL:
        matrix = query.whole(update_first=True)
        factor, absent = _factor(matrix if overwrite else matrix.clone(), lift)
        _without_ones(factor, absent)
        # The halves of B Bᵀ as it is held stand the other way round: taken crosswise, not copied.
        inner = of_heads(key.whole(update_first=True), heads)
        left, right = factor.split_with_sizes([d, d], dim=2)
        update, weight = inner.split_with_sizes([d, d], dim=1)
        product = torch.baddbmm(torch.bmm(left, weight), right, update)
        update, weight = product.split_with_sizes([d, d], dim=2)
        return factor, torch.baddbmm(torch.bmm(weight, left.mT), update, right.mT)

    first, still = _factor(query.update.clone(), lift)
    across = torch.linalg.solve_triangular(first.mT, query.cross, upper=False)
    rest = torch.baddbmm(query.weight, across.mT, across, alpha=-1)
    last, absent = _factor(rest, lift, query.weight)
    _without_ones(first, still)
    _without_ones(last, absent)

    blocks = key.update, key.cross, key.weight
    update, cross, weight = (of_heads(block, heads) for block in blocks)
    left = torch.baddbmm(first @ weight, across, cross)
    right = torch.baddbmm(first @ cross.mT, across, update)
    delta2 = torch.empty(heads, 2 * d, 2 * d, dtype=left.dtype, device=left.device)
    torch.baddbmm(left @ first.mT, right, across.mT, out=delta2[:, :d, :d])
    torch.bmm(last, right.mT, out=delta2[:, d:, :d])
    torch.bmm(last @ update, last.mT, out=delta2[:, d:, d:])
    return first, delta2


def of_heads(block: Tensor, heads: int) -> Tensor:
    """Each head's own: [heads, d, d] from one a group."""
    repeats = heads // len(block)
    return block if repeats == 1 else block.repeat_interleave(repeats, dim=0)


def _factor(
    matrix: Tensor, lift: float, of: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Upper Cholesky factor of matrices [n, m, m], lifted by so much of the diagonal of ``of``.

    Relative to each row, because rows of ΔW and of W are of very unlike size; ``of`` is the matrix
    itself where it isn't given. Overwrites the matrix. NaN on the diagonal where it is not positive
    or not finite. A row that has none but zeros gets a one on its diagonal
    (:func:`_without_ones`): the second answer says where, [n, m], None for nowhere.
    """
    own = matrix.diagonal(dim1=1, dim2=2)
    size = own if of is None else of.diagonal(dim1=1, dim2=2)
    own.add_(size, alpha=lift)
    if matrix.device.type == "cpu":  # where asking costs little, and all of them have a factor
        factor, failed = _cholesky(matrix)
        if not any(failed.tolist()):
            return factor, None
    empty = size == 0
    own.masked_fill_(empty, 1.0)
    factor, failed = _cholesky(matrix)
    factor.diagonal(dim1=1, dim2=2).masked_fill_((failed != 0)[:, None], torch.nan)
    return factor, empty


def _without_ones(factor: Tensor, empty: Tensor | None) -> None:
    """Make a one that stands for an empty row a zero, in place."""
    if empty is not None:
        factor.diagonal(dim1=1, dim2=2).masked_fill_(empty, 0.0)


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor [n, m, m], and not 0 where there is none [n].

    Block by block where it is large.
    """
    m = matrix.shape[1]
    if m <= _SMALL:
        # Transposed, the same matrix: LAPACK's own layout, which saves a copy.
        return torch.linalg.cholesky_ex(matrix.mT, upper=True)
    half = m // 2
    factor = torch.zeros_like(matrix)
    first, no_first = _cholesky(matrix[:, :half, :half])
    across = torch.linalg.solve_triangular(first.mT, matrix[:, :half, half:], upper=False)
    rest = torch.baddbmm(matrix[:, half:, half:], across.mT, across, alpha=-1)
    last, no_last = _cholesky(rest)
    factor[:, :half, :half] = first
    factor[:, :half, half:] = across
    factor[:, half:, half:] = last
    return factor, no_first | no_last


def gram_eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues, descending, not below zero; NaN for a matrix that is not finite.

    Reads the lower triangle [n, m, m] and may overwrite it. LAPACK refuses the whole batch when one
    matrix is not finite: it gets zeros for those. No element of a Gram matrix is larger
    than its trace, which therefore tells.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # On a CPU asking costs little, and a pass over all matrices is a fortieth of the time.
    if gram.device.type == "cpu" and math.isfinite(diagonal.sum().item()):
        return symmetric_eigenvalues(gram).clamp_(min=0).flip(-1)
    broken = ~diagonal.sum(1).isfinite()[:, None]
    gram.masked_fill_(broken[:, :, None], 0.0)
    values = symmetric_eigenvalues(gram).clamp_(min=0).flip(-1)
    return values.masked_fill_(broken, torch.nan)
