"""Koopman spectral shaping (KSS): a loss term that moves a layer's eigenvalues before they do harm.

After arXiv 2602.22988. Per layer, with the eigenvalues λ_j of the map that was fitted to the
residual stream (:mod:`.koopman`),

    Σ_j σ(T(|λ_j| − 1.05)) · softplus(|λ_j| − 1.05)² + β (m − γ)²,
    m = mean_j σ(T(|λ_j| − 0.90)) · σ(T(1.05 − |λ_j|)),

a penalty on modes outside the unit circle and a pull of the soft near-unit mass m towards γ.

Gradients go through the eigenvalues into the operator and through it into the layer's output and
input. They do not go through the whitening, which only fixes the units: it is taken from the
snapshot as a constant, as batch statistics are in an evaluation. The paper does not say which; with
the gradient of the whitening the term could be lowered by inflating the covariance.
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


def operator_of(x: Tensor, y: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The map from x to y compressed to ``rank`` random directions, differentiable in both.

    In whitened coordinates A = Σ^(−1/2) C_yx C_xx⁻¹ Σ^(1/2) with C the covariances and
    Σ = C_xx + ridge; in the basis Q of ``rank`` random orthonormal directions, QᵀAQ. Only
    [N, rank] and [D, rank] products carry gradients.

    Args:
        x, y: [N, D] residual stream before and after a layer.
        rank: number of modes, at most D.
        generator: draws the directions.

    Returns:
        [rank, rank] in float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    x = x - x.mean(0)
    y = y - y.mean(0)
    with torch.no_grad():
        covariance = (x.mT @ x / x.shape[0]).double()
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0.0) + RIDGE
        probe = torch.randn(x.shape[1], rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(probe.to(x.device)).Q
        inner = vectors.mT @ basis
        right = (vectors @ (inner * values.rsqrt()[:, None])).to(dtype)
    seen_x, seen_y = x @ right, y @ right
    gram = seen_x.mT @ seen_x
    ridge = RIDGE * gram.diagonal().mean().detach()
    eye = torch.eye(rank, dtype=dtype, device=x.device)
    return torch.linalg.solve(gram + ridge * eye, seen_x.mT @ seen_y).mT


def shaping_loss(
    operator: Tensor, *, beta: float, gamma: float, temperature: float = 20.0
) -> Tensor:
    """The term of one layer, before its weight α.

    Args:
        operator: [..., r, r] of :func:`operator_of`.
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
