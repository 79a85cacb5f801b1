"""Effective rank of the first-order update of the query-key product, per attention head.

Training moves W_q and W_k; attention sees only their product. To first order that product moved by

    Δ2 = ΔW_qᵀ W_k + W_qᵀ ΔW_k        [D, D], W at the earlier of two samples,

and when the update turns coherent, step after step in the same few directions, the spectrum of Δ2
narrows long before the loss moves (arXiv 2606.28116).

Shape names: ``H`` query heads, ``G`` query groups (key heads), ``R`` = H / G heads in a group,
``d`` head dimension, ``D`` hidden size. A projection is [H, d, D]: its rows are head channels.
No [D, D] matrix is ever formed: Δ2 = Aᵀ B with A = [ΔW_q; W_q] and B = [W_k; ΔW_k], both [2d, D],
so its squared singular values are the eigenvalues of the [2d, 2d] product (A Aᵀ)(B Bᵀ).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Factors are widened to ``gram_dtype`` in pieces of about this size: a call over all heads of a
#: large model must not hold a widened copy of all its query and key weights, and on a CPU smaller
#: pieces are also faster.
_PIECE_BYTES = 32 * 2**20


def spectral_entropy(singular_values_squared: Tensor) -> Tensor:
    """Entropy of the normalised squared singular values, H = −Σ p ln p with p_i = s_i²/Σs².

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...], nats, from 0 to ln n; NaN where all values are zero or one is not finite.
    """
    p = singular_values_squared / singular_values_squared.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def effective_rank(singular_values_squared: Tensor) -> Tensor:
    """Effective rank exp(H) of a spectrum, from 1 (one direction) to n (all alike).

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...]; NaN where :func:`spectral_entropy` is NaN.
    """
    return spectral_entropy(singular_values_squared).exp()


@torch.no_grad()
def delta2_effective_rank(
    wq_old: Tensor,
    wk_old: Tensor,
    wq_new: Tensor,
    wk_new: Tensor,
    *,
    gram_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Effective rank of Δ2 for each head, through Gram matrices: batched GEMMs and one eigvalsh.

    Args:
        wq_old, wq_new: [H, d, D], query projection at the earlier and the later sample.
        wk_old, wk_new: [G, d, D], key projection; query head h uses key head h // (H / G).
        gram_dtype: working precision of the differences and of the Gram GEMMs. The [2d, 2d]
            eigenproblem is always float64.

    Returns:
        [H] float64 on the inputs' device, from 1 to 2d. NaN for a head without any update
        (ΔW_q = ΔW_k = 0) and for a head with a non-finite weight (with grouped queries: for all
        heads that share a non-finite key); other heads are not affected.

    Raises:
        ValueError: the shapes do not fit together.

    Precision. A Gram matrix squares the condition number, but the effective rank weights each
    direction by its energy, so what a Gram matrix loses hardly counts. Measured against the
    singular values of a dense float64 Δ2 (d 32 and 64, D 128 and 512, flat and decaying W,
    full-rank to rank-one updates, update/weight 1e-3 to 1e-5), largest relative error: float64
    1e-11, float32 5e-4. The exception is an update that turns the head's inner basis
    (ΔW_q = M W_q, ΔW_k = −Mᵀ W_k), whose two halves cancel: float64 1e-4, float32 50%.
    float64 is the default because it keeps that case, does not fall to TF32 when the run has
    switched it on for float32, and on a CPU costs no more (the eigenproblem takes most of the
    time); float32 is there for cards whose float64 GEMM is slow.

    On a CUDA device ``eigvalsh`` reads its own error flag back, one host sync a call that PyTorch
    leaves no way around. Nothing else here waits for the device, so give all heads, and where
    possible all windows, to one call.
    """
    _check_shapes(wq_old, wk_old, wq_new, wk_new)
    heads, d, _ = wq_old.shape
    groups = wk_old.shape[0]
    per_group = heads // groups
    bytes_per_group = (per_group + 1) * 2 * d * wq_old.shape[2] * gram_dtype.itemsize
    step = max(1, _PIECE_BYTES // max(1, bytes_per_group))
    pieces = []
    for start in range(0, groups, step):
        key = slice(start, start + step)
        query = slice(start * per_group, (start + step) * per_group)
        gram_a = _gram(wq_old[query], wq_new[query], gram_dtype, update_first=True)
        gram_b = _gram(wk_old[key], wk_new[key], gram_dtype, update_first=False)
        gram_b = gram_b.repeat_interleave(per_group, dim=0)
        pieces.append(_symmetric_product(gram_a, gram_b, gram_dtype))
    product = torch.cat(pieces)
    # eigvalsh raises for the whole batch when one matrix is not finite.
    finite = product.isfinite().flatten(1).all(1)
    product = torch.where(finite[:, None, None], product, torch.ones_like(product))
    squared = torch.linalg.eigvalsh(product).clamp(min=0)
    return torch.where(finite, effective_rank(squared), torch.nan)


@torch.no_grad()
def delta2_effective_rank_qr(
    wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor
) -> Tensor:
    """The same as :func:`delta2_effective_rank` through thin QR and SVD in float64.

    The reference: no matrix is squared, so it is exact to rounding also where the two halves of Δ2
    cancel (from a dense float64 Δ2: 2e-15, cancelling 1e-11). Two to three times slower on a CPU.
    """
    _check_shapes(wq_old, wk_old, wq_new, wk_new)
    per_group = wq_old.shape[0] // wk_old.shape[0]
    wq, wk = wq_old.double(), wk_old.double()
    a = torch.cat([wq_new.double() - wq, wq], dim=1)
    b = torch.cat([wk, wk_new.double() - wk], dim=1)
    finite_b = b.isfinite().flatten(1).all(1).repeat_interleave(per_group)
    finite = a.isfinite().flatten(1).all(1) & finite_b
    r_a = torch.linalg.qr(a.nan_to_num(0, 0, 0).mT, mode="r").R
    r_b = torch.linalg.qr(b.nan_to_num(0, 0, 0).mT, mode="r").R
    s = torch.linalg.svdvals(r_a @ r_b.repeat_interleave(per_group, dim=0).mT)
    return torch.where(finite, effective_rank(s.square()), torch.nan)


def _check_shapes(wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor) -> None:
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


def _gram(old: Tensor, new: Tensor, dtype: torch.dtype, *, update_first: bool) -> Tensor:
    """X Xᵀ [n, 2d, 2d] in float64 for X = [ΔW; W] or [W; ΔW], with W the old weight."""
    n, d, hidden = old.shape
    # Filled in place: temporaries of this size would cost as much time as the product.
    x = torch.empty(n, 2 * d, hidden, dtype=dtype, device=old.device)
    first, second = x[:, :d], x[:, d:]
    update, weight = (first, second) if update_first else (second, first)
    weight.copy_(old)
    update.copy_(new).sub_(weight)
    return (x @ x.mT).double()


def _symmetric_product(gram_a: Tensor, gram_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Lᵀ (B Bᵀ) L with A Aᵀ = L Lᵀ: symmetric, with the eigenvalues of (A Aᵀ)(B Bᵀ).

    Δ2 = Σ_r a_r b_rᵀ over the rows of A and B does not change when a_r is divided and b_r
    multiplied by the same number. Rows of A are brought to unit length: the small ΔW rows and the
    large W rows then stand side by side on one scale, as the rows of B do after it.
    """
    length = gram_a.diagonal(dim1=1, dim2=2).sqrt()
    divisor = torch.where(length > 0, length, 1.0)  # a row without an update stays zero
    gram_a = gram_a / (divisor[:, :, None] * divisor[:, None, :])
    gram_b = gram_b * (length[:, :, None] * length[:, None, :])
    # Only relative sizes matter; without this a product of tiny updates could underflow.
    trace = gram_b.diagonal(dim1=1, dim2=2).sum(1)
    gram_b = gram_b / torch.where(trace > 0, trace, 1.0)[:, None, None]
    # A rank-deficient A (an update of rank one, D < 2d) has eigenvalues that round-off makes
    # negative, seen down to −n·eps/3 of the GEMM's format and a few n·eps of this one; Cholesky
    # needs them lifted over zero.
    n = gram_a.shape[1]
    lift = n * (torch.finfo(dtype).eps + 4 * torch.finfo(gram_a.dtype).eps)
    gram_a = gram_a + lift * torch.eye(n, dtype=gram_a.dtype, device=gram_a.device)
    factor, info = torch.linalg.cholesky_ex(gram_a)
    product = factor.mT @ gram_b @ factor
    return torch.where((info == 0)[:, None, None], product, torch.nan)
