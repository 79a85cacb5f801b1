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

each symmetric, so three [d, d] blocks are formed of either (:class:`.Gram`); where there is little
to multiply they are formed whole, in fewer calls (:class:`.WholeGram`). Δ2 = Aᵀ B has as squared
singular values the eigenvalues of (A Aᵀ)(B Bᵀ), Δ3 those of the product of the two blocks ΔW ΔWᵀ,
and ΔW_q and ΔW_k those of one block each. With A Aᵀ = Uᵀ U, U upper triangular, the first is the
symmetric U (B Bᵀ) Uᵀ, and the leading block of the same U is the factor that Δ3 needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_monitors.signals.eigenvalues import symmetric_eigenvalues
from mcore_monitors.signals.update_grams import SMALL, UpdateGrams, of_heads, update_grams

#: Relative spacing of the formats of a Gram product.
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


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
    grams: UpdateGrams, *, gram_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Positive matrices whose eigenvalues are the squared singular values; lower triangles.

    Args:
        grams, gram_dtype: as :func:`spectra_from_grams` has them.

    Returns:
        [H, 2d, 2d], of Δ2; and [2 H + G, d, d], those of ΔW_q, of ΔW_k and of Δ3, one after the
        other.
    """
    factor, delta2 = _delta2(grams, gram_dtype, overwrite=False)
    query, key = (side.update for side in grams)
    heads, d = query.shape[:2]
    first = factor[:, :d, :d]
    delta3 = torch.bmm(torch.bmm(first, of_heads(key, heads)), first.mT)
    return delta2, torch.cat([query, key, delta3])


def delta2_product(grams: UpdateGrams) -> Tensor:
    """The first of :func:`products` alone; may overwrite the Gram matrices, float64."""
    return _delta2(grams, torch.float64, overwrite=True)[1]


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
    if 2 * d <= SMALL:
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
    if m <= SMALL:
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
    """As :func:`gram_eigenvalues_ascending`, in descending order."""
    return gram_eigenvalues_ascending(gram).flip(-1)


def gram_eigenvalues_ascending(gram: Tensor) -> Tensor:
    """Eigenvalues, ascending, not below zero; NaN for a matrix that is not finite.

    Reads the lower triangle [n, m, m] and may overwrite it. LAPACK refuses the whole batch when one
    matrix is not finite: it gets zeros for those. No element of a Gram matrix is larger
    than its trace, which therefore tells.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # On a CPU asking costs little, and a pass over all matrices is a fortieth of the time.
    if gram.device.type == "cpu" and math.isfinite(diagonal.sum().item()):
        return symmetric_eigenvalues(gram).clamp_(min=0)
    broken = ~diagonal.sum(1).isfinite()[:, None]
    gram.masked_fill_(broken[:, :, None], 0.0)
    values = symmetric_eigenvalues(gram).clamp_(min=0)
    return values.masked_fill_(broken, torch.nan)
