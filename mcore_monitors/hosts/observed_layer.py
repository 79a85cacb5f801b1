"""A whole transformer layer with a place for a tap, through one forward hook; on every host.

The stream before the layer is its first argument or ``hidden_states``, the stream after it is what
it returns or the first of several things that it returns.
"""

from __future__ import annotations

from typing import Any

import torch

from ..monitors.base import StepState
from .taps import Tap


class LayerTap(Tap):
    """Told of the stream before and after a layer, on every n-th step.

    Args:
        state: the step in progress.
        every: iterations between the steps that count; among these only sampled ones do.
    """

    def __init__(self, state: StepState, every: int) -> None:
        super().__init__(state)
        self._every = every

    def watches(self) -> bool:
        return self._state.iteration % self._every == 0 and super().watches()


def observe_layer(
    layer: torch.nn.Module, tap: Tap, *, batch_first: bool, evaluation: bool = False
) -> torch.utils.hooks.RemovableHandle:
    """Let a layer tell its tap of (X, Y), each [S, B, D] without a graph.

    Args:
        layer: any module from hidden states to hidden states.
        batch_first: its states are [B, S, D], else [S, B, D]; without B there is one sequence.
        evaluation: also tell what it does in evaluation mode.
    """

    def arranged(states: torch.Tensor) -> torch.Tensor:
        states = states.detach()
        if states.dim() == 2:
            return states.unsqueeze(1)
        return states.transpose(0, 1) if batch_first else states

    def after(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not (module.training or evaluation) or not tap.watches():
            return
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        made = output[0] if isinstance(output, tuple | list) else output
        tap.tell(arranged(given), arranged(made))

    return layer.register_forward_hook(after, with_kwargs=True)
