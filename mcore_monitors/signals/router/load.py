"""How the tokens spread over the experts. Loads are counts; only their ratios matter.

``load``: [..., E], how often each expert was chosen. All results are float64 [...], NaN where
nothing was chosen at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: an expert with less than this part of the mean load is called under-used
UNDERUSED = 0.1


@torch.no_grad()
def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (largest load − mean load)/mean load (arXiv 2408.15664), from 0 to E − 1."""
    load = load.double()
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean


@torch.no_grad()
def effective_experts(load: Tensor) -> Tensor:
    """Exponential of the load's entropy, from 1 (one expert has it all) to E."""
    load = load.double()
    share = load / load.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def dead_experts(load: Tensor) -> Tensor:
    """Share of the experts that nobody chose."""
    return _share(load, load == 0)


@torch.no_grad()
def underused_experts(load: Tensor) -> Tensor:
    """Share of the experts with less than a tenth of the mean load; dead ones count."""
    load = load.double()
    return _share(load, load < UNDERUSED * load.mean(-1, keepdim=True))


@torch.no_grad()
def largest_share(load: Tensor) -> Tensor:
    """Share of all choices that fell on the most loaded expert, from 1/E to 1."""
    load = load.double()
    return load.amax(-1) / load.sum(-1)


def _share(load: Tensor, which: Tensor) -> Tensor:
    return torch.where(load.sum(-1) > 0, which.double().mean(-1), torch.nan)
