"""What all residuals share: sums in a wide format, ratios that cannot be 0/0."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)
#: products up to 2³¹ and down to 2⁻⁹⁵ keep their squares within float32's numbers
_LIFT = 2.0**32
#: half of float16's smallest step, over the relative error of its rounding (:mod:`.floors`)
_STEP = 2.0**-25 / 2.0e-4


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return x if x.dtype in _WIDE else x.float()


def product_sums(
    x: Tensor, grad: Tensor, dims: tuple[int, ...], power: int
) -> tuple[Tensor, Tensor]:
    """Σ x∘dx and its scale Σ |x∘dx|^power over ``dims``, worked on in float32 or float64.

    The squares are summed of lifted numbers, and stay so (:func:`paired_terms` brings them down):
    the gradients of a head that has nothing to learn are smaller than the root of float32's
    smallest number.

    float16 gradients below its smallest normal number have an absolute rounding error, not a
    relative one: in the scale they count as that number, and among squares also as a sum, since
    what is lost of them has one sign (all of it becomes 0). The scale of nothing but zeros stays 0.
    """
    wide_x, wide_grad = wide(x), wide(grad)
    product = wide_x * wide_grad
    total = product.sum(dims)
    scale = _size_(product, power).sum(dims)
    if grad.dtype == torch.float16:
        size = wide_grad.abs().clamp(min=torch.finfo(torch.float16).tiny)
        counted = _size_(wide_x * size, power).sum(dims)
        if power == 2:
            below = wide_x.abs() * (wide_grad.abs() < torch.finfo(torch.float16).tiny)
            counted = counted + (below.sum(dims) * (_STEP * _LIFT)).square()
        scale = torch.where(scale == 0, scale, counted)
    return total, scale


def _size_(product: Tensor, power: int) -> Tensor:
    """|product|, or the square of the lifted one, in its place."""
    return product.abs_() if power == 1 else product.mul_(_LIFT).square_()


def over_groups(x: Tensor, groups: int) -> Tensor:
    """[..., H] to [..., G]: sums over the query heads that share a key head."""
    return x if x.shape[-1] == groups else x.unflatten(-1, (groups, -1)).sum(-1)


def paired_terms(
    of_heads: Tensor,
    grad_of_heads: Tensor,
    of_groups: Tensor,
    grad_of_groups: Tensor,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """Σ x∘dx on the side of the query heads less that on the side of the key heads, and a scale.

    Args:
        of_heads, grad_of_heads: [S, B, H, channels], H a multiple of G.
        of_groups, grad_of_groups: [S, B, G, channels].
        power: 1 or 2.

    Returns:
        (difference [B, G], both sides' Σ|x∘dx|^power [B, G]).
    """
    groups = of_groups.shape[2]
    heads_sum, heads_scale = product_sums(of_heads, grad_of_heads, (0, 3), power)
    groups_sum, groups_scale = product_sums(of_groups, grad_of_groups, (0, 3), power)
    scale = groups_scale + over_groups(heads_scale, groups)
    if power == 2:
        scale = scale.double() * _LIFT**-2
    return over_groups(heads_sum, groups) - groups_sum, scale


def ratio_sums(size: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the last dimension but one of size / scale, and how many were counted.

    A zero scale (all padding) says nothing and is not counted; a non-finite one is, and makes the
    sum NaN, so that a broken gradient does not pass as an empty one.
    """
    ratio, counted = ratios(size, scale)
    return ratio.sum(-2), counted.sum(-2, dtype=scale.dtype)


def ratios(size: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """size / scale, and whether each counts."""
    counted = scale != 0  # true for NaN
    return size / torch.where(counted, scale, 1.0), counted


def pooled_ratio(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t |signed_t| / Σ_t scale_t over all tokens of a call, and 1; (0, 0) without a gradient.

    Pooled, not a mean of ratios per token: a token whose gradient has almost vanished (a sure and
    right prediction) has only rounding left, and its ratio would drown the others.
    """
    return ratio_sums(signed.abs().sum().view(1, 1), scale.sum().view(1, 1))
