"""Norm scale: ⟨x, dx⟩ = 0 through RMSNorm and LayerNorm, up to ε; and Σ_c dx_c = 0 for LayerNorm.

A norm ignores the length of its input, so the loss does not change along x and ⟨x, dx⟩ = 0. The ε
under the root breaks that by a known amount, which is taken off. With m = mean_c x_c² (RMSNorm) or
the variance of x (LayerNorm), r = √(m + ε), x̂ = x / r (centred for LayerNorm) and y = γ∘x̂ + β:

    dx = (γ∘dy − x̂·⟨x̂, γ∘dy⟩/D) / r,      ⟨x̂, x̂⟩ = D·m/(m + ε), hence
    ⟨x, dx⟩ = ⟨x̂, γ∘dy⟩·(1 − m/(m + ε)) = ⟨y − β, dy⟩·ε/(m + ε),

in exact arithmetic for every ε. (LayerNorm: dx is centred as well, so ⟨x, dx⟩ = ⟨x − x̄, dx⟩.)
The residual is what is left after that correction, over Σ_c |x_c dx_c|. No paper; ours.

LayerNorm also ignores a number added to all channels: Σ_c dx_c = 0, without any ε.

dx must be the gradient that flows **through this norm only**: in a pre-norm block x also feeds the
residual connection, so hand the norm an alias of x (``x.view_as(x)``) and hook that. Kept by any γ
(also 1 + γ, ``layernorm_zero_centered_gamma``) and β, sequence parallelism (whole tokens), a loss
scale. A norm fused with the linear layer behind it doesn't show y: it can't be watched unless
ε/(m + ε) is negligible (pass ``output=None``; then ε's part is left in). QK-norm: each head is a
token here. Dropout in front of the norm acts before x. Not kept by norms over a part of the
channels unless each part is handed in as a token of its own.

Shape names: ``D`` channels.
"""

from __future__ import annotations

from torch import Tensor

from .terms import pooled_ratio, wide


def norm_scale_terms(
    x: Tensor,
    grad_x: Tensor,
    output: Tensor | None,
    grad_output: Tensor | None,
    *,
    eps: float,
    centred: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """⟨x, dx⟩ − ⟨y − β, dy⟩·ε/(m + ε) and Σ_c |x_c dx_c| + |⟨y − β, dy⟩| of each token.

    The second part of the scale is what the projection takes off. Behind the last norm of a model
    dy is nearly along y, dx almost vanishes and the rounding of what was taken off does not.

    Args:
        x, grad_x: [..., D], input of the norm and its gradient through the norm alone.
        output, grad_output: [..., D], output of the norm and its gradient; None leaves the part of
            ε in the residual.
        eps: the norm's ε.
        centred: True for LayerNorm, False for RMSNorm.
        bias: [D], β where the norm has one.

    Returns:
        ([...], [...]), float32, or float64 for float64 inputs. LayerNorm's scale is taken on
        x − x̄: a large common part of x would hide an error of the projection.
    """
    x, grad_x = wide(x), wide(grad_x)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    product = x * grad_x
    signed, scale = product.sum(-1), product.abs().sum(-1)
    if output is not None and grad_output is not None:
        y = wide(output) if bias is None else wide(output) - wide(bias)
        mean_square = x.square().mean(-1)
        taken_off = (y * wide(grad_output)).sum(-1)
        signed = signed - taken_off * (eps / (mean_square + eps))
        scale = scale + taken_off.abs()
    return signed, scale


def norm_scale_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t |residual_t| / Σ_t Σ_c |x_c dx_c| over the tokens of a call, and 1.

    Args:
        signed, scale: [...] of :func:`norm_scale_terms`.

    Returns:
        (ratio [1], 1 [1]); (0, 0) where no token has a gradient; NaN for a non-finite one.
    """
    return pooled_ratio(signed, scale)


def norm_shift_terms(grad_x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_c dx_c and Σ_c |dx_c| of each token, for LayerNorm only.

    Args:
        grad_x: [..., D], gradient of the norm's input through the norm alone.
    """
    dx = wide(grad_x)
    return dx.sum(-1), dx.abs().sum(-1)


def norm_shift_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t |Σ_c dx_c| / Σ_t Σ_c |dx_c| over the tokens of a call, and 1; see the others."""
    return pooled_ratio(signed, scale)
