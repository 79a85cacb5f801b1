"""Any normalisation module with a place for a tap, through two forward hooks.

Norms are built by functions as often as by classes, and on Megatron the spec of a layer may fuse
them into the linear layer behind. So they are observed when the model stands, where they do.
"""

from __future__ import annotations

from typing import Any

import torch

from ..views import NormCall
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


def _is_one_node(module: torch.nn.Module) -> bool:
    """Whether autograd knows the norm as one node, which takes its input once.

    A norm made of several operations takes its input more than once. Behind an alias these parts
    would be added up before the residual connection's is, and the sum be rounded differently.
    """
    made_by = type(module).__module__.partition(".")[0]
    fused = made_by in ("apex", "transformer_engine") or "Fused" in type(module).__name__
    return fused or isinstance(module, torch.nn.LayerNorm)


def observe_norm(module: torch.nn.Module, tap: Tap) -> None:
    """Let a norm tell its tap of what it takes in and gives out.

    What the host computes stays the same, bit for bit: on sampled steps a norm that is one node
    for autograd is given an alias of its input, any other one runs a second time beside.

    Args:
        module: one for which :func:`norm_form` gives numbers.
    """
    eps, centred = norm_form(module)
    one_node = _is_one_node(module)
    given: list[torch.Tensor] = []

    def before(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given.clear()
        if not (module.training and args and tap.watches() and args[0].requires_grad):
            return None
        if one_node:
            given.append(args[0].view_as(args[0]))
            return (given[0], *args[1:])
        given.append(args[0].detach())
        return None

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # a norm that also hands the residual on uses its input twice
        if given and isinstance(output, torch.Tensor):
            tap.tell(
                NormCall(
                    x=given.pop(),
                    y=output,
                    beside=None if one_node else module.forward,
                    eps=eps,
                    centred=centred,
                    bias=getattr(module, "bias", None),
                )
            )
        given.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
