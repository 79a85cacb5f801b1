"""How much of a change of 16-bit weights is rounding, and the Gram matrices without it.

A 16-bit weight moves in steps of its format's spacing q, which doubles with every power of two:
bfloat16 has 2⁻⁷ of it, about 1e-4 for a weight of 0.02. Rounding a weight that truly moved by δ
gives a change that is right on average, floor(δ/q) or one more, with the variance
q² f (1 − f), f the fraction of δ/q: q|δ| for a small δ, q²/6 on average for a large one. For true
changes of a common size, normal with standard deviation σ, the mean over elements is

    q² b(σ/q),   b(s) = 1/6 − Σ_k exp(−2 π² k² s²) / (π² k²)

which is √(2/π) s − s² up to s = 0.3. The σ of a row follows from what is observed, since the
energy of the observed change is σ² + q² b(σ/q) a weight, and grows with σ.

Errors of different weights do not know of one another: in the Gram matrix of ΔW they add, on
average, to the diagonal only, where they can be taken off again. What is left is an estimate with a
scatter of its own: it serves where rounding is a moderate part of the energy. Where it is most of
it, read main weights instead.

Shape names: ``n`` matrices, ``d`` rows, ``D`` columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .update_grams import Gram, UpdateGrams, WholeGram

#: Halvings of the search for σ: 2⁻²⁴ of the first bracket.
_HALVINGS = 24
#: Columns that σ is found from; what it is then used on are all.
_COLUMNS = 2048
#: Terms of the series, exact to 1e-7 beyond s = 0.3.
_TERMS = 4
_SWITCH = 0.3


def spacing(weight: Tensor) -> Tensor:
    """Distance of neighbouring numbers of a bfloat16 or float16 tensor's format, float32."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[weight.dtype]
    _, exponent = torch.frexp(weight.float())
    # the smallest of float16; for bfloat16 one whose square float32 still holds
    lowest = -60 if weight.dtype == torch.bfloat16 else -24
    ones = torch.ones_like(weight, dtype=torch.float32)
    return torch.ldexp(ones, (exponent - bits).clamp(min=lowest))


def rounding_share(sigma_in_steps: Tensor) -> Tensor:
    """b(s) of the module's docstring: rounding's variance in squared steps, from 0 to 1/6."""
    s = sigma_in_steps
    small = math.sqrt(2 / math.pi) * s - s.square()
    k = torch.arange(1, _TERMS + 1, device=s.device, dtype=s.dtype)
    terms = torch.exp(-2 * (math.pi * k * s.unsqueeze(-1)).square()) / (math.pi * k).square()
    return torch.where(s < _SWITCH, small, 1 / 6 - terms.sum(-1))


@torch.no_grad()
def rounding_energy(old: Tensor, new: Tensor) -> Tensor:
    """Expected energy of rounding in each row of a change of 16-bit weights.

    Args:
        old, new: [n, d, D] bfloat16 or float16, the weights at two samples.

    Returns:
        [n, d] float64; at most the energy of the observed change.
    """
    step = torch.maximum(spacing(old), spacing(new))
    squared = (new.float() - old.float()).square()
    few = slice(None, None, max(1, old.shape[-1] // _COLUMNS))
    sigma = _sigma(squared[..., few], step[..., few])
    rounding = (step.square() * rounding_share(sigma.unsqueeze(-1) / step)).sum(-1)
    return torch.minimum(rounding, squared.sum(-1)).double()


def _sigma(squared: Tensor, step: Tensor) -> Tensor:
    """Standard deviation σ [n, d] of the true changes: σ² + q² b(σ/q) is what is observed."""
    observed = squared.mean(-1)
    low, high = torch.zeros_like(observed), observed.sqrt()
    for _ in range(_HALVINGS):
        sigma = (low + high) / 2
        expected = step.square() * rounding_share(sigma.unsqueeze(-1) / step)
        too_high = sigma.square() + expected.mean(-1) > observed
        low, high = torch.where(too_high, low, sigma), torch.where(too_high, sigma, high)
    return low


@torch.no_grad()
def without_rounding(grams: UpdateGrams, query: Tensor, key: Tensor) -> UpdateGrams:
    """Gram matrices with the energy of rounding taken off the diagonal of ΔW ΔWᵀ.

    What is left need not be the Gram matrix of anything: directions of negative energy get none.

    Args:
        grams: of :func:`mcore_monitors.signals.update_grams.update_grams`.
        query, key: [H, d], [G, d], of :func:`rounding_energy`.
    """
    return UpdateGrams(_cleaned(grams.query, query), _cleaned(grams.key, key))


def _cleaned(gram: Gram | WholeGram, energy: Tensor) -> WholeGram:
    whole = gram.whole(update_first=True)
    size, cleaned = whole.diagonal(dim1=1, dim2=2).sqrt(), whole.clone()
    cleaned.diagonal(dim1=1, dim2=2)[:, : energy.shape[1]].sub_(energy)
    return WholeGram(_nearest_gram(cleaned, size))


def _nearest_gram(matrix: Tensor, size: Tensor) -> Tensor:
    """A symmetric matrix [n, 2d, 2d] without its negative eigenvalues.

    Rows of updates and weights are of unlike size [n, 2d]: they are brought to one scale for it.
    """
    divisor = torch.where(size > 0, size, 1.0)
    scaled = matrix / (divisor[:, :, None] * divisor[:, None, :])
    finite = scaled.isfinite().flatten(1).all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, scaled, 0.0))
    kept = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
    kept = kept * (size[:, :, None] * size[:, None, :])
    return torch.where(finite, kept, torch.nan)
