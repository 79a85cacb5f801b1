"""Any normalisation module with a place for a tap, through a forward hook.

Norms are built by functions as often as by classes, and on Megatron the spec of a layer may fuse
them into the linear layer behind. So they are observed when the model stands, where they do.
"""

from __future__ import annotations

from typing import Any

import torch

from ..calls import NormCall
from .taps import Tap


def norm_form(module: torch.nn.Module) -> tuple[float, bool] | str:
    """(ε, whether the mean is taken off), or why this module's identity is not known."""
    name = type(module).__name__
    if "LayerNorm" in name and "Linear" not in name:
        centred = True
    elif name.endswith(("RMSNorm", "L2Norm")):
        centred = False
    else:
        return f"{name} is no norm that is known"
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not isinstance(eps, float):
        return f"{name} does not say its epsilon"
    return eps, centred


def observe_norm(module: torch.nn.Module, tap: Tap) -> None:
    """Let a norm tell its tap of what it takes in and gives out.

    What the host computes stays the same, bit for bit.

    Args:
        module: one for which :func:`norm_form` gives numbers.
    """
    eps, centred = norm_form(module)

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # a norm that also hands the residual on uses its input twice
        if not (args and isinstance(output, torch.Tensor) and module.training and tap.watches()):
            return
        bias = getattr(module, "bias", None)
        tap.tell(NormCall(x=args[0], y=output, eps=eps, centred=centred, bias=bias))

    module.register_forward_hook(after)
