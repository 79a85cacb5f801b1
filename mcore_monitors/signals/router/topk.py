"""The choice by name: which experts ``topk`` gives a token. For hosts, to compare with their own.

Experts come last here, [T, E], as hosts have them. Between experts that tie exactly, as bfloat16
logits may, it can be another choice than the host's.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
