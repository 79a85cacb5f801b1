"""How the tokens spread over the experts. Loads are counts; only their ratios matter.

``load``: [..., E], how often each expert was chosen, a tensor or a float64 array. All results are
float64 [...], NaN where nothing was chosen at all. Summed over ranks, a load is a few numbers on
the host, where NumPy takes a third of PyTorch's time.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

#: an expert with less than this part of the mean load is called under-used
UNDERUSED = 0.1

Load = Tensor | np.ndarray


def max_violation(load: Load) -> Load:
    """MaxVio = (largest load − mean load)/mean load (arXiv 2408.15664), from 0 to E − 1."""
    xp, load = _wide(load)
    mean = load.mean(-1)
    return (xp.amax(load, -1) - mean) / mean


def effective_experts(load: Load) -> Load:
    """Exponential of the load's entropy, from 1 (one expert has it all) to E."""
    xp, load = _wide(load)
    share = load / load.sum(-1)[..., None]
    # 0 ln 0 = 0
    return xp.exp(-(share * xp.log(xp.where(share > 0, share, 1.0))).sum(-1))


def dead_experts(load: Load) -> Load:
    """Share of the experts that nobody chose."""
    return _share(load, load == 0)


def underused_experts(load: Load) -> Load:
    """Share of the experts with less than a tenth of the mean load; dead ones count."""
    _, wide = _wide(load)
    return _share(wide, wide < UNDERUSED * wide.mean(-1)[..., None])


def largest_share(load: Load) -> Load:
    """Share of all choices that fell on the most loaded expert, from 1/E to 1."""
    xp, load = _wide(load)
    return xp.amax(load, -1) / load.sum(-1)


def _share(load: Load, which: Load) -> Load:
    xp, _ = _wide(load)
    found = which.sum(-1, dtype=xp.float64) / which.shape[-1]
    return xp.where(load.sum(-1) > 0, found, xp.nan)


def _wide(load: Load) -> tuple[ModuleType, Load]:
    """Whose functions take it, and the load in float64."""
    return (torch, load.double()) if isinstance(load, Tensor) else (np, load)
