"""Koopman spectral shaping of a DeepSpeed engine's module, and the scale of its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...config import KssConfig
from ...monitors.base import StepState
from ..kss import Shaping, refuse_hidden
from .describe import ModuleDescription


class LossScale:
    """What DeepSpeed multiplies a micro-batch's loss with: loss scale over micro-batches.

    It is read off the gradient that arrives at the loss, which is the first of a backward pass.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._scale: torch.Tensor | float = 1.0 / engine.gradient_accumulation_steps()

    def watch(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        """Read the scale in the backward pass of this loss that is about to begin."""
        # what the script has divided itself does not show in the loss's own gradient
        parts = 1 if scale_wrt_gas else self._engine.gradient_accumulation_steps()
        if loss.requires_grad:
            loss.register_hook(partial(self._take, parts))

    def _take(self, parts: int, gradient: torch.Tensor) -> None:
        self._scale = gradient.detach().double() / parts

    def __call__(self, _: torch.Tensor) -> torch.Tensor | float:
        return self._scale


def shape(
    settings: KssConfig, found: ModuleDescription, state: StepState, scale: LossScale
) -> Shaping:
    """Hook the term onto the layers.

    Raises:
        ConfigError: the layers can't be reached, or ``kss.rank`` is above the hidden size.
    """
    refuse_hidden(found.view)
    shaping = Shaping(settings, found.layers, state, found.view.device, scale=scale)
    for layer, module in found.layers.items():
        shaping.attach(layer, module, found.width)
    return shaping
