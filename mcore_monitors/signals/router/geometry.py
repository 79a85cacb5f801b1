"""What the router's weight alone tells: directions and lengths of the expert rows.

Definitions of the first two after arXiv 2606.28116.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def weight_signals(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`weight_similarity`, :func:`centred_conditioning` and :func:`row_norm_spread`.

    In fewer operations than one after the other; weight and results as there.
    """
    w = weight.double()
    norms = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return _similarity(w, norms), _conditioning(w), _spread(norms.squeeze(-1))


@torch.no_grad()
def weight_similarity(weight: Tensor) -> Tensor:
    """Mean cosine between the rows of different experts, (‖Σ_i ŵ_i‖² − E)/(E² − E) (Eq 7).

    The closed form costs E·D instead of E²·D. float64, because for many experts the healthy value
    is close to zero and comes out as a difference of numbers near one.

    Args:
        weight: [..., E, D].

    Returns:
        [...] float64, from −1/(E − 1) to 1. NaN for E = 1, a zero row or a non-finite weight.
    """
    w = weight.double()
    return _similarity(w, torch.linalg.vector_norm(w, dim=-1, keepdim=True))


def _similarity(w: Tensor, norms: Tensor) -> Tensor:
    experts = w.shape[-2]
    squared = (w / norms).sum(-2).square().sum(-1)
    if experts == 1:
        return torch.full_like(squared, torch.nan)
    return (squared - experts) / (experts * (experts - 1))


@torch.no_grad()
def centred_conditioning(weight: Tensor) -> Tensor:
    """Largest distance of a row from the mean row, over its length: max_i ‖w_i − w̄‖/‖w̄‖.

    Softmax ignores what all rows have in common, so rows may look alike while routing is healthy;
    this says how much is left beside the common part. Small: the common part dominates.

    Args:
        weight: [..., E, D].

    Returns:
        [...] float64, not negative; infinite where the mean row is zero.
    """
    return _conditioning(weight.double())


def _conditioning(w: Tensor) -> Tensor:
    mean = w.mean(-2, keepdim=True)
    spread = torch.linalg.vector_norm(w - mean, dim=-1).amax(-1)
    return spread / torch.linalg.vector_norm(mean, dim=(-2, -1))


@torch.no_grad()
def row_norm_spread(weight: Tensor) -> Tensor:
    """Standard deviation of the rows' lengths over their mean: std_i ‖w_i‖ / mean_i ‖w_i‖.

    An expert that wins by the length of its row and not by its direction wins for every token.

    Args:
        weight: [..., E, D].

    Returns:
        [...] float64, from 0 (all alike) to √(E − 1) (one row is left). NaN where all are zero.
    """
    return _spread(torch.linalg.vector_norm(weight.double(), dim=-1))


def _spread(norms: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(norms, -1, correction=0)
    return deviation / mean
