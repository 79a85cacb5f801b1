"""Router signals: the geometry of the expert rows and the entropy of the choice per token.

Shape names: ``E`` experts, ``D`` hidden size. The router weight is W_R [E, D] with rows w_i, the
logits of a token x are z = W_R x. Definitions after arXiv 2606.28116.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def weight_similarity(weight: Tensor) -> Tensor:
    """Mean cosine between the rows of different experts, (E‖mean_i ŵ_i‖² − 1)/(E − 1) (Eq 7).

    The closed form costs E·D instead of E²·D. float64, because for many experts the healthy value
    is close to zero and comes out as a difference of numbers near one.

    Args:
        weight: [..., E, D].

    Returns:
        [...] float64, from −1/(E − 1) to 1. NaN for E = 1, a zero row or a non-finite weight.
    """
    w = weight.double()
    experts = w.shape[-2]
    unit = w / torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    squared = unit.mean(-2).square().sum(-1)
    if experts == 1:
        return torch.full_like(squared, torch.nan)
    return (experts * squared - 1) / (experts - 1)


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
    w = weight.double()
    mean = w.mean(-2, keepdim=True)
    spread = torch.linalg.vector_norm(w - mean, dim=-1).amax(-1)
    return spread / torch.linalg.vector_norm(mean, dim=-1).squeeze(-1)


@torch.no_grad()
def routing_entropy_sums(
    logits: Tensor,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the routing entropy −Σ p ln p (Eq 8), and the number of tokens.

    Over **all** experts, before top-k; not the entropy of the expert load. Sums and not means, so
    that micro-batches and ranks add up to the right mean.

    Args:
        logits: [..., E] in any float format, worked on in float32.
        score: ``softmax``, or ``sigmoid`` for p = σ(z)/Σσ(z).
        mask: [...] bool, True at tokens that count (padding is False); None counts all.

    Returns:
        (sum in nats, number of tokens), both float32 scalars. The mean lies between 0 and ln E.
        A non-finite logit of a counted token makes the sum NaN, except −inf, an expert that is
        barred from the token.

    Raises:
        ValueError: ``score`` is neither of the two.
    """
    z = logits.float()
    if score == "sigmoid":
        # p = σ(z)/Σσ(z) is a softmax of ln σ(z); as such it does not underflow to 0/0.
        z = F.logsigmoid(z)
    elif score != "softmax":
        raise ValueError(f"score: {score!r} cannot be used; allowed: 'softmax' or 'sigmoid'")
    entropy = torch.special.entr(z.softmax(-1)).sum(-1)
    if mask is None:
        return entropy.sum(), torch.full_like(entropy.sum(), entropy.numel())
    # where, not a product: what stands at padded tokens may be NaN.
    return torch.where(mask, entropy, 0.0).sum(), mask.sum(dtype=torch.float32)
