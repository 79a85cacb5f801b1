"""How undecided a router is about each token, measured and predicted; the size of its logits.

All experts count, before top-k, and neither the expert bias nor group limits enter: they move the
choice (:mod:`.choice`), not the scores that weigh the experts' outputs. Not the entropy of the
expert load. Everything is per token, so that micro-batches and ranks add up to the right mean;
worked on in float32 whatever the format of the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: stands for −inf where a product with 0 has to be 0
_BARRED = -1e30


@torch.no_grad()
def log_scores(logits: Tensor, score: str = "softmax") -> Tensor:
    """Logarithms of the experts' scores, up to a constant of the token: p = softmax of them.

    As a softmax of logarithms, p = s/Σs does not underflow to 0/0 where all scores are tiny.

    Args:
        logits: [..., E] in any float format.
        score: ``softmax``; ``sigmoid`` for s = σ(z); ``sqrtsoftplus`` for s = √ln(1 + eᶻ).

    Returns:
        [..., E] float32.

    Raises:
        ValueError: ``score`` is none of the three.
    """
    z = logits.float()
    if score == "softmax":
        return z
    if score == "sigmoid":
        return F.logsigmoid(z)
    if score == "sqrtsoftplus":
        # ln(1 + eᶻ) → eᶻ for far negative z, where float32 has no softplus left
        return 0.5 * torch.where(z < -15, z, F.softplus(z).log())
    raise ValueError(
        f"score: {score!r} cannot be used; allowed: 'softmax', 'sigmoid' or 'sqrtsoftplus'"
    )


@torch.no_grad()
def scores(logits: Tensor, score: str = "softmax") -> Tensor:
    """The scores that experts are compared by, before the expert bias: softmax, σ(z), √softplus(z).

    Args:
        logits: [..., E] in any float format.

    Returns:
        [..., E] float32. For all but softmax they don't add up to one.
    """
    if score == "softmax":
        return logits.float().softmax(-1)
    return log_scores(logits, score).exp()


@torch.no_grad()
def log_probabilities(log_scores: Tensor) -> Tensor:
    """ln p over all experts; finite also for an expert that is barred (a logit of −inf).

    Args:
        log_scores: [..., E], what :func:`log_scores` gives.
    """
    # so that p ln p is 0 · (−1e30) and not 0 · (−inf) there; NaN stays NaN
    shifted = log_scores.clamp_min(_BARRED)
    shifted = shifted - shifted.amax(-1, keepdim=True)
    # what log_softmax does, which on a CPU takes several times as long for few experts
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


@torch.no_grad()
def routing_entropy(log_p: Tensor) -> Tensor:
    """−Σ p ln p of a token (arXiv 2606.28116, Eq 8), from 0 to ln E nats.

    Args:
        log_p: [..., E], what :func:`log_probabilities` gives.
    """
    return -torch.linalg.vecdot(log_p.exp(), log_p)


@torch.no_grad()
def predicted_entropy(log_scores: Tensor) -> Tensor:
    """Second-order entropy of a token, ln E − ‖z − z̄‖²/(2E), z̄ the token's mean over experts.

    Its mean over tokens is ln E − tr(W_c M W_cᵀ)/(2E) with the centred weight W_c and the inputs'
    second moment M = mean of x xᵀ, because z − z̄ = W_c x (with a bias in the router's linear layer,
    the centred bias is added). So the prediction from weights and second moment needs no D × D
    matrix: the logits hold it. Exact to second order around uniform routing; far from it too low,
    without bound.

    Args:
        log_scores: [..., E]; what :func:`log_scores` gives (for softmax the logits).

    Returns:
        [...] in nats. −inf or NaN where an expert is barred (a logit of −inf).
    """
    experts = log_scores.shape[-1]
    centred = log_scores - log_scores.mean(-1, keepdim=True)
    return math.log(experts) - torch.linalg.vecdot(centred, centred) / (2 * experts)


@torch.no_grad()
def squared_logsumexp(logits: Tensor) -> Tensor:
    """ln²(Σ_e exp z_e) of a token, whose mean is the router z of ST-MoE (arXiv 2202.08906, Eq 5).

    Args:
        logits: [..., E] raw logits, whatever the score.
    """
    return torch.logsumexp(logits.float(), -1).square()
