"""Router shift: Σ_e dz_e = 0 for every token, softmax scores.

Add one number to all logits of a token: its probabilities p = softmax(z) do not move, so nothing
behind them does, and the derivative Σ_e dz_e is zero. In formulas dz = p∘(g − ⟨p, g⟩) for any
gradient g of p, and Σ_e p_e = 1. No paper; ours.

====================================  =======================================================
kept by                               because
====================================  =======================================================
top-k after the softmax, with or      the chosen p_e are functions of p; a choice does not
without division by their sum         change under a common shift
top-k before the softmax ("score      the softmax over the k chosen logits ignores a shift of
after top-k")                         these; the others get no gradient
load-balancing auxiliary loss, in     goes through the same softmax (the counts are constants)
any of its forms, sequence-wise too
group-limited routing, expert bias    they only choose
padding, dropped tokens, capacity     a gradient of zero
input jitter                          acts before z
====================================  =======================================================

Broken by **z-loss** (λ·logsumexp(z)² moves under a shift: Σ_e dz_e = 2λ·logsumexp(z) > 0) and by
**sigmoid scores**, which are no softmax. Where z-loss is on, its known gradient could be taken
off, but it is of the order of what is looked for: such routers are not watched. Expert parallelism
does not touch it: each rank holds all logits of its tokens. Routers run in fp32 or fp64 as a rule
(``moe_router_dtype``); the floor is that of the format in which z is, usually the activations'.

Shape names: ``E`` experts.
"""

from __future__ import annotations

from torch import Tensor

from .terms import pooled_ratio, wide


def router_shift_terms(grad_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_e dz_e and Σ_e |dz_e| of each token.

    Args:
        grad_logits: [..., E], gradient of the router logits.

    Returns:
        (Σ_e dz_e [...], Σ_e |dz_e| [...]), float32, or float64 for a float64 input.
    """
    z = wide(grad_logits)
    return z.sum(-1), z.abs().sum(-1)


def router_shift_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t |Σ_e dz_e| / Σ_t Σ_e |dz_e| over the tokens of a call, and 1.

    Args:
        signed, scale: [...] of :func:`router_shift_terms`.

    Returns:
        (ratio [1], 1 [1]); (0, 0) where no token has a gradient; NaN for a non-finite one.
    """
    return pooled_ratio(signed, scale)
