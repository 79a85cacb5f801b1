"""Which experts a token goes to, by how much, and whether the expert bias decided it.

The choice is made anew from the scores by the router's rule. So it is the *demand*: a host that
drops tokens over an expert's capacity cuts its own map, and hides the imbalance with that.

Experts come first, as in :mod:`.entropy`: [E, ...]. A choice is a map, 1 at chosen experts; experts
that tie exactly for the last place, as bfloat16 logits may, share it, because only the host knows
which of them it took. So the map is the same on every device and in every order of the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .entropy import BARRED

#: exp of it is the least normal float32, as good as nothing beside 1
_FARTHEST = -87.0


@torch.no_grad()
def best_values(scores: Tensor, count: int) -> Tensor:
    """The best scores of each token, without saying whose they are.

    Sorted lists are merged pairwise, all pairs at once, by minima and maxima over all tokens: on a
    CPU several times as fast as ``topk``, which goes through the tokens one by one.

    Args:
        scores: [E, ...].
        count: how many are wanted.

    Returns:
        [count, ...], falling; [E, ...] where there are no more.
    """
    lists = [scores]  # place in the list -> [lists, ...]
    while (n := lists[0].shape[0]) > 1:
        half = n // 2
        merged = _merge([x[:half] for x in lists], [x[half : 2 * half] for x in lists], count)
        if n % 2:  # one list is left over; the others are longer by now
            rest = [x[2 * half :] for x in lists]
            rest += [rest[0] - torch.inf] * (len(merged) - len(rest))  # NaN stays NaN
            merged = [torch.cat(pair) for pair in zip(merged, rest, strict=False)]
        lists = merged
    return torch.cat(lists[: scores.shape[0]])


def _merge(left: list[Tensor], right: list[Tensor], count: int) -> list[Tensor]:
    """The first ``count`` of two falling lists: Batcher's odd-even merge (Knuth, TAOCP 5.3.4)."""
    if not (left and right and count):
        return (left + right)[:count]
    if len(left) == len(right) == 1:
        merged, odd, even = [], left, right
    else:
        first, *even = _merge(left[::2], right[::2], count // 2 + 1)
        merged, odd = [first], _merge(left[1::2], right[1::2], count // 2)
    n = min(len(odd), len(even))
    for x, y in zip(odd[:n], even[:n], strict=True):
        merged.append(torch.maximum(x, y))
        if len(merged) < count:
            merged.append(torch.minimum(x, y))
    return (merged + odd[n:] + even[n:])[:count]


@torch.no_grad()
def limit_groups(scores: Tensor, groups: int, top_groups: int, group_sum: int) -> Tensor:
    """Group-limited routing (arXiv 2405.04434, 2412.19437): bar experts of all but the best groups.

    Args:
        scores: [E, ...], in ``groups`` equal groups.
        groups, top_groups: only experts of the ``top_groups`` best groups can be chosen; groups
            that tie exactly for the last place are all allowed.
        group_sum: a group counts as the sum of its best ``group_sum`` experts.

    Returns:
        [E, ...], about −1e30 at barred experts.
    """
    grouped = scores.unflatten(0, (groups, -1))  # [groups, E / groups, ...]
    worth = best_values(grouped.transpose(0, 1), group_sum).sum(0)
    last = best_values(worth, top_groups)[-1]
    barred = (worth - last).sign_().clamp_max_(0).mul_(-BARRED)  # 0 or −1e30
    return (grouped + barred.unsqueeze(1)).flatten(0, 1)


@torch.no_grad()
def choice_shares(scores: Tensor, best: Tensor, k: int) -> Tensor:
    """Who is chosen.

    Args:
        scores: [E, ...].
        best: [k or more, ...] their best values.

    Returns:
        [E, ...] float32, 1 at the k best experts and 0 elsewhere; of q experts that tie for the
        last p places each has p/q.
    """
    last = best[k - 1]
    above = (best[:k] - last).sign_().sum(0)
    side = (scores - last).sign_()  # 1 above it, 0 where it is, −1 below
    # the sum of the sides is above − below, and above + tied + below is all
    tied = side.sum(0).add_(scores.shape[0]).sub_(above, alpha=2)
    share = (k - above).div_(tied)
    return side.add_(share).clamp_(0, 1)


@torch.no_grad()
def mixing_entropy(log_scores: Tensor, chosen: Tensor) -> Tensor:
    """Entropy of the weights with which a token's chosen experts are mixed, from 0 to ln k nats.

    The weights are the scores of the chosen experts over their sum: without the expert bias, which
    enters, as group limits do, by what is chosen. Of the k best scores it is the
    :func:`.entropy.routing_entropy` of these alone.

    Args:
        log_scores: [E, ...].
        chosen: [E, ...] 1 at the chosen ones, a share where the last place is shared.

    Returns:
        [...]; 0 for a token that goes nowhere.
    """
    # relative to the best that is chosen; exp is slow on a CPU where nothing is left of its result
    log = torch.add(log_scores, chosen.sign().sub_(1), alpha=-BARRED)
    log.sub_(log.amax(0)).clamp_min_(_FARTHEST)
    weight = log.exp().mul_(chosen)
    total = weight.sum(0)
    # nobody is chosen: 0 = ln 1 − 0
    somewhere = total.sign()
    total = total + (1 - somewhere)
    return total.log() - log.mul_(weight).sum(0) / total


@torch.no_grad()
def bias_agreement(chosen: Tensor, free: Tensor, k: int) -> Tensor:
    """Share of the choices that would have been made without the expert bias.

    Args:
        chosen, free: [E, ...] maps of the choice and of what the bare scores would choose.
        k: experts that the bare scores choose.

    Returns:
        [...] from 0 to 1.
    """
    return torch.minimum(chosen, free).sum(0) / k
