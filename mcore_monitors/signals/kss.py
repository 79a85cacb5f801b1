"""Koopman spectral shaping (KSS): a loss term that moves a layer's eigenvalues before they do harm.

After arXiv 2602.22988. Per layer, with the eigenvalues λ_j of the map that was fitted to the
residual stream (:mod:`.koopman`),

    Σ_j σ(T(|λ_j| − 1.05)) · softplus(|λ_j| − 1.05)² + β (m − γ)²,
    m = mean_j σ(T(|λ_j| − 0.90)) · σ(T(1.05 − |λ_j|)),

a penalty on modes outside the unit circle and a pull of the soft near-unit mass m towards γ.

Gradients go through the eigenvalues into the operator and through it into the layer's output and
input, its statistics included: eigenvalues of a fitted map do not depend on the units of the
stream, so nothing is gained by inflating a covariance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .koopman import NEAR_UNIT, RIDGE

#: Relative size below which the smallest singular values of the eigenvectors are held.
_HOLD = 1e-3


class _EigenvaluesOf(torch.autograd.Function):
    """Eigenvalues whose gradient stays finite where two of them meet.

    d f/d A = V⁻ᴴ diag(f') Vᴴ for simple eigenvalues. Where two meet, V loses rank and the exact
    gradient has no bound; singular values of V below ``_HOLD`` times the largest are damped
    (s/(s² + h²) for 1/s), which leaves well-conditioned maps as they are.
    """

    @staticmethod
    def forward(ctx: Any, operator: Tensor) -> Tensor:
        values, vectors = torch.linalg.eig(operator)
        ctx.save_for_backward(vectors)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (vectors,) = ctx.saved_tensors
        u, s, vh = torch.linalg.svd(vectors)
        held = s / (s.square() + (_HOLD * s[..., :1]).square())
        inverse = (vh.mH * held.unsqueeze(-2)) @ u.mH
        return (inverse.mH @ (gradient.unsqueeze(-1) * vectors.mH)).real


def directions(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """[width, rank] random orthonormal directions, float32 on the generator's device."""
    probe = torch.randn(width, rank, generator=generator, device=generator.device)
    return torch.linalg.qr(probe).Q


def moments_of(x: Tensor, y: Tensor, along: Tensor) -> Tensor:
    """The sums over tokens that the fitted map needs, differentiable in x and y.

    Sums of parts of the tokens add up to the sum of all of them.

    Args:
        x, y: [..., D] residual stream before and after a layer, any float format.
        along: [D, r] of :func:`directions`.

    Returns:
        [1 + 2r + 2r²] float64: the number of tokens, Σs and Σ s x'ᵀ with x' = Rᵀx, y' = Rᵀy and
        s = (x', y'). Only [tokens, r] products are made.
    """
    rank = along.shape[1]
    seen = torch.cat([_seen(x, along), _seen(y, along)], dim=1)
    count = seen.new_full((1,), seen.shape[0])
    return torch.cat([count, seen.sum(0), (seen.mT @ seen[:, :rank]).flatten()])


def _seen(states: Tensor, along: Tensor) -> Tensor:
    # in float32: autocast would make bfloat16 products of it
    with torch.autocast(states.device.type, enabled=False):
        return (states.flatten(0, -2).float() @ along).double()


def operator_from(moments: Tensor, rank: int) -> Tensor:
    """The map from x to y compressed to ``rank`` random directions of the stream.

    C_y'x' C_x'x'⁻¹ with C the covariances along the directions: similar to QᵀAQ, where
    A = Σ^(−1/2) C_yx Σ^(−1/2) is the map in whitened coordinates and Q spans Σ^(1/2) R. So
    directions are drawn in proportion to the stream's variance, and with ``rank`` = D the
    eigenvalues are those of the whole map.

    Args:
        moments: of :func:`moments_of`.

    Returns:
        [rank, rank] float64.
    """
    count, mean, product = moments[0], moments[1 : 1 + 2 * rank], moments[1 + 2 * rank :]
    mean = mean / count
    covariance = product.view(2 * rank, rank) / count - mean[:, None] * mean[None, :rank]
    gram, cross = covariance[:rank], covariance[rank:]
    ridge = RIDGE * gram.diagonal().mean().detach()
    eye = torch.eye(rank, dtype=moments.dtype, device=moments.device)
    return torch.linalg.solve(gram + ridge * eye, cross.mT).mT


def shaping_loss(
    operator: Tensor, *, beta: float, gamma: float, temperature: float = 20.0
) -> Tensor:
    """The term of one layer, before its weight α.

    Args:
        operator: [..., r, r] of :func:`operator_from`.
        beta: weight of the pull on the soft near-unit mass.
        gamma: where the mass is pulled to, from 0 to 1.
        temperature: T, steepness of the soft borders.

    Returns:
        [...], not negative.
    """
    modulus = _EigenvaluesOf.apply(operator).abs()
    low, high = NEAR_UNIT
    over = modulus - high
    outside = (temperature * over).sigmoid() * torch.nn.functional.softplus(over).square()
    near = (temperature * (modulus - low)).sigmoid() * (temperature * -over).sigmoid()
    return outside.sum(-1) + beta * (near.mean(-1) - gamma).square()
