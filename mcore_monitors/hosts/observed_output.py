"""The layer that gives the logits, with a place for a tap."""

from __future__ import annotations

from typing import Any

import torch

from .taps import Tap


def observe_output(module: torch.nn.Module, tap: Tap) -> None:
    """Let an output layer tell its tap of its logits [..., V / tensor-parallel ranks]."""

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training and tap.watches():
            tap.tell(output[0] if isinstance(output, tuple) else output)

    module.register_forward_hook(after)
