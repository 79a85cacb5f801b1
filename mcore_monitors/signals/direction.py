"""The leading direction of an attention update, and whether it is the same from sample to sample.

A healthy update may be of low rank at every sample, but each time in other directions; a biased
fault pushes the same way each time (arXiv 2510.04212). So persistence tells the two apart.

The direction is the leading *left* singular vector of Δ2 = ΔW_qᵀ W_k + W_qᵀ ΔW_k, a unit vector of
the hidden space on the query's side. That side, because a fault in the row term of the softmax
scales each query row's gradient by a number of fixed sign, and lands in ΔW_q as a sum of the inputs
of those rows; and because with grouped queries the key's side of Δ2 is shared by the heads of a
group, the query's side is a head's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .update_spectra import UpdateGrams

#: Vectors and passes of the subspace iteration: of the leading vector (s_9/s_1)^16 is left wrong,
#: 0.2% for a leading singular value 1.5 times the ninth. A spectrum without a leader has no leading
#: direction to be found exactly.
_VECTORS = 8
_PASSES = 8


@torch.no_grad()
def leading_direction(grams: UpdateGrams, wq_old: Tensor, wq_new: Tensor) -> Tensor:
    """Leading left singular vector of Δ2 of each head, up to sign.

    Args:
        grams: of :func:`mcore_monitors.signals.update_spectra.update_grams`, for the same weights.
        wq_old, wq_new: [H, d, D], query projection at the earlier and the later sample.

    Returns:
        [H, D] in the weights' dtype (float32 for narrower ones), of length one; zero for a head
        that did not move, NaN for one with a non-finite weight.

    Subspace iteration on the Gram matrices, always from the same starting vectors: started from the
    last sample's direction it would stay near it wherever no direction leads, and persistence
    would be an artefact. No host sync.
    """
    z = _coefficients(grams)
    d = wq_old.shape[1]
    dtype = torch.promote_types(wq_old.dtype, torch.float32)
    old, new = wq_old.to(dtype), wq_new.to(dtype)
    update, weight = z[:, None, :d].to(dtype), z[:, None, d:].to(dtype)
    # u = Aᵀ z = ΔW_qᵀ z_1 + W_qᵀ z_2
    u = (update @ (new - old) + weight @ old).squeeze(1)
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u / torch.where(length > 0, length, 1.0)


def direction_overlap(new: Tensor, old: Tensor) -> Tensor:
    """|cos| of two directions, from 0 (at right angles) to 1 (the same up to sign).

    Compare two samples whose windows do not overlap, at least one window apart: overlapping windows
    hold the same steps in part, and their leading directions agree by that alone. Independent
    random directions in D dimensions have |cos| ≈ 0.8/√D.

    Args:
        new, old: [..., D], of any length; a zero vector (no update) overlaps with nothing.

    Returns:
        [...]; NaN where a direction is not finite.
    """
    dot = (new * old).sum(-1).abs()
    length = torch.linalg.vector_norm(new, dim=-1) * torch.linalg.vector_norm(old, dim=-1)
    return (dot / torch.where(length > 0, length, 1.0)).clamp(max=1.0)


def _coefficients(grams: UpdateGrams) -> Tensor:
    """z [H, 2d] with Aᵀ z along the leading left singular vector of Δ2, A = [ΔW_q; W_q].

    Δ2 Δ2ᵀ Aᵀ z = Aᵀ (B Bᵀ)(A Aᵀ) z, so z is the leading eigenvector of the small product.
    """
    key = grams.key.repeat_interleave(grams.query.shape[0] // grams.key.shape[0], dim=0)
    length = grams.query.diagonal(dim1=1, dim2=2).sqrt()
    divisor = torch.where(length > 0, length, 1.0)
    # Rows of A in unit length, see update_spectra; unit trace against underflow.
    query = grams.query / (divisor[:, :, None] * divisor[:, None, :])
    key = _unit_trace(key * (length[:, :, None] * length[:, None, :]))
    finite = (query.isfinite() & key.isfinite()).flatten(1).all(1)[:, None, None]
    query, key = torch.where(finite, query, 0.0), torch.where(finite, key, 0.0)

    n = query.shape[1]
    place = torch.arange(n, dtype=query.dtype, device=query.device) + 0.5
    wave = torch.arange(1, min(_VECTORS, n) + 1, dtype=query.dtype, device=query.device)
    z = torch.cos(math.pi / n * place[:, None] * (wave - 0.5)).expand(query.shape[0], -1, -1)
    for _ in range(_PASSES):
        z = torch.linalg.qr(key @ (query @ z)).Q

    # Within the subspace: largest cᵀ Zᵀ A' (B B') A Z c against cᵀ Zᵀ (A A') Z c.
    image = query @ z
    inner = _unit_trace(z.mT @ image)
    outer = image.mT @ (key @ image)
    inner.diagonal(dim1=1, dim2=2).add_(8 * n * torch.finfo(inner.dtype).eps)
    factor, _ = torch.linalg.cholesky_ex(inner)
    half = torch.linalg.solve_triangular(factor, outer, upper=False)
    ritz = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    c = torch.linalg.solve_triangular(factor.mT, _leading_vector(ritz)[:, :, None], upper=True)
    z = (z @ c).squeeze(2) / divisor
    return torch.where(finite[:, 0], z, torch.nan)


def _leading_vector(symmetric: Tensor) -> Tensor:
    """Leading eigenvector [n, k] of small positive matrices by squaring; ``eigh`` would sync."""
    power = symmetric
    for _ in range(12):
        power = _unit_trace(power)
        power = power @ power
    column = power.diagonal(dim1=1, dim2=2).argmax(1)
    return power.gather(2, column[:, None, None].expand(-1, power.shape[1], 1)).squeeze(2)


def _unit_trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    return matrix / torch.where(trace > 0, trace, 1.0)[:, None, None]
