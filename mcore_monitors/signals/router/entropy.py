"""How undecided a router is about each token, measured and predicted; the size of its logits.

All experts count, before top-k, and neither the expert bias nor group limits enter: they move the
choice (:mod:`.choice`), not the scores that weigh the experts' outputs. Not the entropy of the
expert load. Everything is per token, so that micro-batches and ranks add up to the right mean;
worked on in float32 whatever the format of the logits.

Experts come first: [E, ...], tokens in any arrangement behind them. Sums over experts then run
along the tokens, which lie side by side in memory: on a CPU about six times as fast as the other
way (E = 8).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: stands for −inf where a product with 0 has to be 0
BARRED = -1e30


@torch.no_grad()
def log_scores(logits: Tensor, score: str = "softmax") -> Tensor:
    """Logarithms of the experts' scores, up to a constant of the token: p = softmax of them.

    As a softmax of logarithms, p = s/Σs does not underflow to 0/0 where all scores are tiny.

    Args:
        logits: [E, ...], or in any other order, in any float format. −inf for a barred expert.
        score: ``softmax``; ``sigmoid`` for s = σ(z); ``sqrtsoftplus`` for s = √ln(1 + eᶻ).

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: ``score`` is none of the three.
    """
    z = logits.float()
    if score == "softmax":
        return z
    if score == "sigmoid":
        # z where σ(z) is nothing; on a CPU a third of the time of F.logsigmoid
        log = z.sigmoid().log_()
        return torch.maximum(log, z.clamp_max(-80), out=log)
    if score == "sqrtsoftplus":
        # ln(1 + eᶻ) → eᶻ for far negative z, where float32 has no softplus left
        return 0.5 * torch.where(z < -15, z, F.softplus(z).log())
    raise ValueError(
        f"score: {score!r} cannot be used; allowed: 'softmax', 'sigmoid' or 'sqrtsoftplus'"
    )


class Weighed(NamedTuple):
    """Each token's scores against its best one: all that entropies and probabilities are made of.

    ln p is ``log − total.log()``, p is ``weight / total``.
    """

    #: [E, ...] ln s − max ln s; −1e30, and never −inf, for a barred expert
    log: Tensor
    #: [E, ...] its exponential, from 0 to 1
    weight: Tensor
    #: [...] max ln s
    best: Tensor
    #: [...] sum of the weights, from 1 to E
    total: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """[...] ln Σ s."""
        return self.best + self.total.log()


@torch.no_grad()
def weigh(log_scores: Tensor, out: Tensor | None = None) -> Weighed:
    """Take each token's best score as the unit.

    Args:
        log_scores: [E, ...], what :func:`log_scores` gives.
        out: where the new logarithms go; ``log_scores`` itself, if it is not needed any more.
    """
    best = log_scores.amax(0)
    # so that p ln p is 0 · (−1e30) and not 0 · (−inf) for a barred expert; NaN stays NaN
    log = torch.sub(log_scores, best, out=out).clamp_min_(BARRED)
    weight = log.exp()
    return Weighed(log, weight, best, weight.sum(0))


@torch.no_grad()
def scores(logits: Tensor, weighed: Weighed, score: str = "softmax") -> Tensor:
    """The scores that experts are compared by, before the expert bias: softmax, σ(z), √softplus(z).

    Args:
        logits: [E, ...] float32.
        weighed: what :func:`weigh` makes of the score's logarithms.

    Returns:
        [E, ...] float32. For all but softmax they don't add up to one.
    """
    if score == "softmax":
        return weighed.weight / weighed.total
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).sqrt_()


@torch.no_grad()
def routing_entropy(weighed: Weighed, out: Tensor | None = None) -> Tensor:
    """−Σ p ln p of a token (arXiv 2606.28116, Eq 8), from 0 to ln E nats.

    Args:
        weighed: what :func:`weigh` gives.
        out: where products [E, ...] go; ``weighed.weight``, if it is not needed any more.

    Returns:
        [...] float32.
    """
    # with w = p·t, t their sum: −Σ p (ln w − ln t) = ln t − Σ w ln w / t
    products = torch.mul(weighed.weight, weighed.log, out=out)
    return weighed.total.log() - products.sum(0) / weighed.total


@torch.no_grad()
def predicted_entropy(weighed: Weighed) -> Tensor:
    """Second-order entropy of a token, ln E − ‖z − z̄‖²/(2E), z̄ the token's mean over experts.

    Its mean over tokens is ln E − tr(W_c M W_cᵀ)/(2E) with the centred weight W_c and the inputs'
    second moment M = mean of x xᵀ, because z − z̄ = W_c x (with a bias in the router's linear layer,
    the centred bias is added). So the prediction from weights and second moment needs no D × D
    matrix: the logits hold it. Exact to second order around uniform routing; far from it too low,
    without bound.

    Args:
        weighed: of the score's logarithms (for softmax, of the logits).

    Returns:
        [...] in nats. −inf or NaN where an expert is barred.
    """
    log = weighed.log
    experts = log.shape[0]
    # the largest is 0, so that a square of the mean is at most E − 1 times the variance
    total, squares = log.sum(0), (log * log).sum(0)
    variance = squares.addcmul_(total, total, value=-1 / experts)  # E times as much
    return variance.mul_(-0.5 / experts).add_(math.log(experts))


@torch.no_grad()
def squared_logsumexp(weighed: Weighed) -> Tensor:
    """ln²(Σ_e exp z_e) of a token, whose mean is the router z of ST-MoE (arXiv 2202.08906, Eq 5).

    Args:
        weighed: of the raw logits, whatever the score.
    """
    return weighed.logsumexp.square()
