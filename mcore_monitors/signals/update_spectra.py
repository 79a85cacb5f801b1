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

    A = [ΔW_q; W_q],   A Aᵀ = [ΔW_q ΔW_qᵀ  ·; ·  ·]
    B = [W_k; ΔW_k],   B Bᵀ = [·  ·; ·  ΔW_k ΔW_kᵀ]

Δ2 = Aᵀ B has as squared singular values the eigenvalues of (A Aᵀ)(B Bᵀ), Δ3 those of the product of
the two blocks written out, and ΔW_q and ΔW_k those of one block each. With A Aᵀ = L Lᵀ the first is
the symmetric Lᵀ (B Bᵀ) L, and the leading block of the same L is the factor that Δ3 needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of a widened piece of weights. A call over all heads of a large model must not hold a
#: widened copy of all its weights; on a CPU a piece that stays in the cache is also faster.
_PIECE_BYTES = {"cpu": 2 * 2**20}
_PIECE_BYTES_ELSEWHERE = 256 * 2**20


class UpdateGrams(NamedTuple):
    """Gram matrices of what a head's queries and keys were and became, float64."""

    query: Tensor
    """[H, 2d, 2d], of [ΔW_q; W_q]."""
    key: Tensor
    """[G, 2d, 2d], of [W_k; ΔW_k]."""


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

    On a CUDA device ``eigvalsh`` reads its own error flag back, one host sync a call that PyTorch
    leaves no way around, three of them here. Nothing else waits for the device, so give all heads,
    and where possible all windows and layers of equal shape, to one call.
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
        return UpdateGrams(
            _gram(wq_old, wq_new, gram_dtype, update_first=True),
            _gram(wk_old, wk_new, gram_dtype, update_first=False),
        )


@torch.no_grad()
def spectra_from_grams(
    grams: UpdateGrams, *, gram_dtype: torch.dtype = torch.float64
) -> UpdateSpectra:
    """The spectra that two Gram matrices hold.

    Args:
        grams: of :func:`update_grams`.
        gram_dtype: precision in which the Gram matrices were made.
    """
    query, key = grams
    heads, d = query.shape[0], query.shape[-1] // 2
    factor, length = _factor(query, gram_dtype)
    small = factor[:, :d, :d]
    update = _scaled(key[:, d:, d:], length[:, :d])
    singles = torch.cat([small.mT @ update @ small, query[:, :d, :d], key[:, d:, d:]])
    delta2 = factor.mT @ _scaled(key, length) @ factor
    d3, q, k = _eigenvalues_of(singles).tensor_split([heads, 2 * heads])
    return UpdateSpectra(_eigenvalues_of(delta2), d3, q, k)


@torch.no_grad()
def delta2_spectrum(grams: UpdateGrams, *, gram_dtype: torch.dtype = torch.float64) -> Tensor:
    """Δ2 alone of :func:`spectra_from_grams`: squared singular values [H, 2d]."""
    factor, length = _factor(grams.query, gram_dtype)
    return _eigenvalues_of(factor.mT @ _scaled(grams.key, length) @ factor)


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


def _gram(old: Tensor, new: Tensor, dtype: torch.dtype, *, update_first: bool) -> Tensor:
    """X Xᵀ [n, 2d, 2d] in float64 for X = [ΔW; W] or [W; ΔW], with W the old weight."""
    n, d, hidden = old.shape
    limit = _PIECE_BYTES.get(old.device.type, _PIECE_BYTES_ELSEWHERE)
    step = max(1, min(n, limit // max(1, 2 * d * hidden * dtype.itemsize)))
    gram = torch.empty(n, 2 * d, 2 * d, dtype=dtype, device=old.device)
    # Filled in place, and one buffer for all pieces: fresh temporaries of this size would cost as
    # much time as the product.
    buffer = torch.empty(step, 2 * d, hidden, dtype=dtype, device=old.device)
    for start in range(0, n, step):
        piece = slice(start, min(start + step, n))
        x = buffer[: piece.stop - start]
        first, second = x[:, :d], x[:, d:]
        update, weight = (first, second) if update_first else (second, first)
        weight.copy_(old[piece])
        update.copy_(new[piece]).sub_(weight)
        torch.bmm(first, x.mT, out=gram[piece, :d])
        torch.bmm(second, second.mT, out=gram[piece, d:, d:])
    # The lower left block is the transposed upper right: a quarter of the work saved.
    gram[:, d:, :d] = gram[:, :d, d:].mT
    return gram.double()


def _factor(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of a Gram matrix with its rows brought to unit length, and the lengths.

    Δ2 = Σ_r a_r b_rᵀ over the rows of A and B does not change when a_r is divided and b_r
    multiplied by the same number. Rows of A come in unit length: the small ΔW rows and the large W
    rows then stand side by side on one scale, as the rows of B do after it. NaN where it is not
    finite.
    """
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(length > 0, 1 / length, 1.0)  # a row without an update stays zero
    unit = (gram * inverse[:, :, None]).mul_(inverse[:, None, :])
    # A rank-deficient A (an update of rank one, D < 2d) has eigenvalues that round-off makes
    # negative, seen down to −n·eps/3 of the GEMM's format and a few n·eps of this one; Cholesky
    # needs them lifted over zero.
    n = gram.shape[1]
    lift = n * (torch.finfo(dtype).eps + 4 * torch.finfo(gram.dtype).eps)
    unit.diagonal(dim1=1, dim2=2).add_(lift)
    return _cholesky(unit), length


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor [n, m, m]; NaN where the matrix is not positive or not finite.

    Block by block, because MKL takes ten times as long for m = 128 as for m = 64.
    """
    m = matrix.shape[1]
    if m <= 64:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor.masked_fill_((info != 0)[:, None, None], torch.nan)
    half = m // 2
    factor = torch.zeros_like(matrix)
    first = _cholesky(matrix[:, :half, :half])
    across = torch.linalg.solve_triangular(first, matrix[:, :half, half:], upper=False)
    factor[:, :half, :half] = first
    factor[:, half:, :half] = across.mT
    factor[:, half:, half:] = _cholesky(matrix[:, half:, half:] - across.mT @ across)
    return factor


def _scaled(gram: Tensor, length: Tensor) -> Tensor:
    """[H, n, n]: each head's key Gram matrix [G, n, n], rows and columns times length [H, n]."""
    length = length.unflatten(0, (gram.shape[0], -1))
    return (gram[:, None] * length[..., None]).mul_(length[..., None, :]).flatten(0, 1)


def _eigenvalues_of(gram: Tensor) -> Tensor:
    """Eigenvalues, descending, not below zero; NaN for a matrix that is not finite. Overwrites it.

    ``eigvalsh`` raises for the whole batch when one matrix is not finite, and squares of tiny
    updates could underflow in it: it gets matrices of unit trace, and zeros for those that are not
    finite. No element of a Gram matrix is larger than its trace, which therefore tells.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    finite = trace.isfinite()
    scale = torch.where(finite & (trace > 0), trace, 1.0)
    unit = gram.mul_((1 / scale)[:, None, None]).masked_fill_(~finite[:, None, None], 0.0)
    values = torch.linalg.eigvalsh(unit).clamp_(min=0).flip(-1).mul_(scale[:, None])
    return values.masked_fill_(~finite[:, None], torch.nan)
