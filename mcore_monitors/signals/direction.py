"""The leading directions of an attention update, and whether they stay from sample to sample.

A healthy update may be of low rank at every sample, but each time in other directions; a biased
fault pushes the same way each time (arXiv 2510.04212). So persistence tells the two apart.

The directions are the leading singular vectors of Δ2 = ΔW_qᵀ W_k + W_qᵀ ΔW_k, left ones in the
hidden space of the query's token and right ones in that of the key's. Both sides, because one alone
may be confined: where ΔW_k leads, the left vector lies in the d rows of W_q, and chance finds it
again with |cos| near 1/√d. Two vectors a side, because a push in both ΔW_q and ΔW_k is two
directions of Δ2, often of much the same strength: which of them leads, or which mixture, is chance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, bmm

from .update_grams import UpdateGrams, of_heads

#: Directions that are compared.
COUNT = 2

#: Vectors and passes of the subspace iteration: of the leading vectors (s_9/s_2)^16 is left wrong,
#: 0.2% for a second singular value 1.5 times the ninth. A spectrum without a leader has no leading
#: direction to be found exactly.
_VECTORS = 8
_PASSES = 8
#: Passes from one orthogonalisation to the next. In exact arithmetic their number is nothing to the
#: subspace; rounding leaves 1e-16 (s_1/s_2)^4 of the second direction wrong, 1e-8 at a hundredfold.
_TOGETHER = 2

#: Squarings of a small matrix until its columns are the leading vector, and how many of them before
#: it is brought to unit norm again: of at most 8 eigenvalues the largest is then 0.35 or more, and
#: its 64th power is no underflow.
_SQUARINGS = 12
_BEFORE_UNIT = 6


@torch.no_grad()
def leading_directions(
    grams: UpdateGrams, wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor
) -> Tensor:
    """The two leading singular vectors of Δ2 of each head on either side, up to sign.

    Args:
        grams: of :func:`mcore_monitors.signals.update_grams.update_grams`, for the same weights.
        wq_old, wq_new: [H, d, D], query projection at the earlier and the later sample.
        wk_old, wk_new: [G, d, D], key projection.

    Returns:
        [H, 2, 2, D] (left and right, first and second) in the weights' dtype (float32 for narrower
        ones), of length one and at right angles; zero for a head that did not move, NaN for one
        with a non-finite weight.

    Subspace iteration on the Gram matrices, always from the same starting vectors: started from the
    last sample's directions it would stay near them wherever no direction leads, and persistence
    would be an artefact. No host sync.
    """
    return directions_of(leading_coefficients(grams), wq_old, wk_old, wq_new, wk_new)


def directions_of(
    coefficients: tuple[Tensor, Tensor],
    wq_old: Tensor,
    wk_old: Tensor,
    wq_new: Tensor,
    wk_new: Tensor,
) -> Tensor:
    """As :func:`leading_directions`, from the coefficients (:func:`leading_coefficients`)."""
    left, right = coefficients
    sides = (
        _combined(left, wq_old, wq_new, weight_at=1),
        _combined(right, wk_old, wk_new, weight_at=0),
    )
    return _unit(torch.stack(sides, dim=1), dim=-1)


def direction_overlap(new: Tensor, old: Tensor) -> Tensor:
    """How much of a direction two samples share, from 0 to 1: |cos| of the angle of two planes.

    On each side the largest |cos| between a vector in the plane of the one sample's two leading
    directions and a vector in the plane of the other's; of the two sides the smaller. Compare two
    samples whose windows do not overlap, at least one window apart: overlapping windows hold the
    same steps in part, and their leading directions agree by that alone. Independent random planes
    in D dimensions have about 1.5/√D.

    Args:
        new, old: [..., 2, 2, D] of :func:`leading_directions`.

    Returns:
        [...]; 0 where one did not move, NaN where one is not finite.
    """
    cos = new @ old.mT
    # Largest singular value of a 2 × 2 matrix, in closed form: half the sum of (s₁ + s₂) and
    # (s₁ − s₂), whose squares are ‖·‖² ± 2 det.
    a, b, c, d = cos.flatten(-2).unbind(-1)
    twice = torch.hypot(a + d, b - c) + torch.hypot(a - d, b + c)
    return (twice / 2).clamp_(max=1.0).amin(-1)


def _combined(coefficients: Tensor, old: Tensor, new: Tensor, weight_at: int) -> Tensor:
    """ΔWᵀ x + Wᵀ y [H, 2, D], with coefficients [H, 2, 2d]; y at half ``weight_at``."""
    dtype = torch.promote_types(old.dtype, torch.float32)
    old, new = old.to(dtype), new.to(dtype)
    # Heads of a group share its weight: their rows are multiplied together.
    rows = coefficients.to(dtype).reshape(old.shape[0], -1, coefficients.shape[-1])
    halves = rows.chunk(2, dim=-1)
    combined = torch.baddbmm(bmm(halves[weight_at], old), halves[1 - weight_at], new - old)
    return combined.view(*coefficients.shape[:2], -1)


def leading_coefficients(grams: UpdateGrams) -> tuple[Tensor, Tensor]:
    """z and w [H, 2, 2d] with Aᵀ z and Bᵀ w along the leading singular vectors of Δ2 = Aᵀ B.

    Δ2 Δ2ᵀ Aᵀ z = Aᵀ (B Bᵀ)(A Aᵀ) z: z are the leading eigenvectors of the small product, and
    Δ2ᵀ Aᵀ z = Bᵀ (A Aᵀ) z. Needs no weights, so many windows may go through one call.
    """
    heads, d = len(grams.query[0]), grams.query.channels
    query = grams.query.whole(update_first=True)
    key = of_heads(grams.key.whole(update_first=False), heads)
    # Rows of A in unit length, so that small ΔW rows and large W rows stand on one scale, as the
    # rows of B do that are multiplied by the lengths.
    length = query.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(2)
    inverse = (length + (length == 0)).reciprocal()
    query, lengthened = query * inverse.mT, length * key

    place = torch.arange(0.5, 2 * d, dtype=length.dtype, device=length.device)
    wave = torch.arange(0.5, min(_VECTORS, 2 * d), dtype=length.dtype, device=length.device)
    z = torch.cos(place.view(-1, 1) * (math.pi / (2 * d) * wave)).expand(heads, -1, -1)
    for number in range(1, _PASSES + 1):
        z = bmm(lengthened, bmm(query, z))
        if number % _TOGETHER == 0:
            z = torch.linalg.qr(z).Q

    # Within the subspace: largest cᵀ Zᵀ A' (B B') A Z c against cᵀ Zᵀ (A A') Z c.
    image = bmm(query, z)
    inner = bmm((inverse * z).mT, image)
    outer = bmm(image.mT, bmm(key, image))
    own, limits = inner.diagonal(dim1=1, dim2=2), torch.finfo(inner.dtype)
    own.add_(own.sum(1, keepdim=True), alpha=16 * d * limits.eps).add_(limits.tiny)
    factor, _ = torch.linalg.cholesky_ex(inner)
    half = torch.linalg.solve_triangular(factor, outer, upper=False)
    ritz = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    c = torch.linalg.solve_triangular(factor.mT, _leading_vectors(ritz), upper=True)
    return (inverse * bmm(z, c)).mT, bmm(image, c).mT


def _leading_vectors(symmetric: Tensor) -> Tensor:
    """The two leading eigenvectors [n, k, 2] of small positive matrices; ``eigh`` would sync."""
    first = _leading_vector(symmetric)
    # The rest of the matrix, at right angles to the first: also where two eigenvalues are so close
    # that the first is some mixture of their vectors, the two together span the same plane.
    rest = torch.baddbmm(symmetric, first, bmm(first.mT, symmetric), alpha=-1)
    rest = torch.baddbmm(rest, bmm(rest, first), first.mT, alpha=-1)
    second = _leading_vector(rest)
    second = _unit(torch.baddbmm(second, first, bmm(first.mT, second), alpha=-1), dim=1)
    return torch.cat([first, second], dim=2)


def _leading_vector(symmetric: Tensor) -> Tensor:
    """Leading eigenvector [n, k, 1] by squaring, of unit length."""
    power = symmetric
    for number in range(_SQUARINGS):
        if number % _BEFORE_UNIT == 0:
            power = _unit(power, dim=(1, 2))
        power = bmm(power, power)
    column = power.diagonal(dim1=1, dim2=2).argmax(1)
    vector = power.gather(2, column[:, None, None].expand(-1, power.shape[1], 1))
    return _unit(vector, dim=1)


def _unit(values: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Divided by their root of the sum of squares over ``dim``; zeros stay."""
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.clamp_(min=torch.finfo(values.dtype).tiny)
