"""Run a module's forward with other tensors in place of its own, leaving the module as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def with_tensors(
    module: nn.Module,
    parameter: Callable[[str, nn.Parameter], Tensor],
    buffer: Callable[[str, Tensor], Tensor] = lambda name, b: b,
    child: Callable[[str, nn.Module], nn.Module] = lambda name, m: m,
) -> nn.Module:
    """A shallow copy in evaluation mode whose own tensors are what the given functions return.

    Call its ``forward``, not the copy itself: hooks of the original, such as those with which
    DeepSpeed gathers shards, belong to calling and are not met then.
    """
    stub = copy.copy(module)
    stub.__dict__ = dict(module.__dict__)
    stub.__dict__["training"] = False
    stub.__dict__["_parameters"] = {
        n: None if p is None else nn.Parameter(parameter(n, p), requires_grad=False)
        for n, p in module._parameters.items()
    }
    stub.__dict__["_buffers"] = {
        n: None if b is None else buffer(n, b) for n, b in module._buffers.items()
    }
    stub.__dict__["_modules"] = {
        n: None if m is None else child(n, m) for n, m in module._modules.items()
    }
    return stub


@torch.no_grad()
def norm_scale(norm: nn.Module, read: Callable[[nn.Parameter], Tensor]) -> Tensor | None:
    """The learned scale per channel of a norm, fp32; None where it learns none.

    Found by normalising +1, −1, +1, … and its negative, which have mean 0 and mean square 1: half
    the difference of the results is the scale. So it does not matter whether the norm is an RMSNorm
    or a LayerNorm, has a bias, or learns what it adds to one.

    Args:
        read: the whole of a parameter, which may take a collective.
    """
    width = 0

    def whole(name: str, parameter: nn.Parameter) -> Tensor:
        nonlocal width
        tensor = read(parameter).float()
        width = tensor.shape[-1]
        return tensor

    stub = with_tensors(norm, whole)
    if not width:
        return None
    device = next(p for p in stub._parameters.values() if p is not None).device
    signs = 1.0 - 2.0 * (torch.arange(width, device=device) % 2)
    with torch.autocast(device.type, enabled=False):
        half = 0.5 * (stub.forward(signs[None]) - stub.forward(-signs[None]))
    return (half[0] * signs).float()
