"""Which experts a token goes to, by how much, and whether the expert bias decided it.

The choice is made anew from the scores by the router's rule. So it is the *demand*: a host that
drops tokens over an expert's capacity cuts its own map, and hides the imbalance with that. Between
experts that tie exactly, as bfloat16 logits may, it can be another one than the host's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .entropy import log_probabilities, routing_entropy


@torch.no_grad()
def choose(
    scores: Tensor,
    k: int,
    *,
    groups: int | None = None,
    top_groups: int | None = None,
    group_sum: int = 1,
) -> tuple[Tensor, Tensor]:
    """The best k experts of each token, and the next one where there is a next one.

    Args:
        scores: [T, E], what is compared.
        k: experts to choose.
        groups, top_groups: group-limited routing (arXiv 2405.04434, 2412.19437): only experts of
            the ``top_groups`` best of ``groups`` equal groups can be chosen; a group counts as the
            sum of its best ``group_sum`` experts.

    Returns:
        (scores, experts) [T, k + 1], falling; [T, k] where the token may go to k experts only.
    """
    allowed = scores.shape[-1]
    if groups is not None and top_groups is not None and top_groups < groups:
        grouped = scores.unflatten(-1, (groups, -1))  # [T, groups, E / groups]
        best = grouped.topk(group_sum, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        barred = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device)
        barred = barred.scatter(-1, best, False).unsqueeze(-1)
        scores = grouped.masked_fill(barred, -torch.inf).flatten(-2)
        allowed = top_groups * grouped.shape[-1]
    top = scores.topk(min(k + 1, allowed), dim=-1)
    return top.values, top.indices


@torch.no_grad()
def choice_map(experts: Tensor, count: int) -> Tensor:
    """The choice as a map.

    Args:
        experts: [T, k] numbers of the chosen experts.
        count: experts there are.

    Returns:
        [T, count] float32, 1 at chosen experts and 0 elsewhere.
    """
    chosen = torch.zeros(*experts.shape[:-1], count, device=experts.device)
    return chosen.scatter_(-1, experts, 1.0)


@torch.no_grad()
def topk_margin(best: Tensor, k: int) -> Tensor:
    """By how much the k-th expert beat the (k+1)-th.

    Args:
        best: [T, k + 1] scores, falling.

    Returns:
        [T], not negative; a small one means that a small error changes the choice.
    """
    return best[..., k - 1] - best[..., k]


@torch.no_grad()
def mixing_entropy(log_p: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Entropy of the weights with which a token's chosen experts are mixed, from 0 to ln k nats.

    The weights are the scores of the chosen experts over their sum: without the expert bias, which
    enters, as group limits do, by what is chosen.

    Args:
        log_p: [T, k] ln p of the chosen experts; or [T, E] of all, with
        chosen: [T, E] 1 at the chosen ones.

    Returns:
        [T]; 0 for a token that goes nowhere.
    """
    if chosen is None:
        return routing_entropy(log_probabilities(log_p))
    kept = chosen > 0
    entropy = routing_entropy(log_probabilities(log_p.masked_fill(~kept, -torch.inf)))
    return torch.where(kept.any(-1), entropy, 0.0)


@torch.no_grad()
def bias_agreement(chosen: Tensor, free: Tensor) -> Tensor:
    """Share of the choices that would have been made without the expert bias.

    Args:
        chosen: [T, E], 1 at the experts that were chosen.
        free: [T, k] experts that the bare scores choose.

    Returns:
        [T] from 0 to 1.
    """
    return chosen.gather(-1, free).mean(-1)
