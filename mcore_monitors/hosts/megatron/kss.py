"""Koopman spectral shaping of a Megatron model: who shares a sequence, and the loss scale."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches

from ...config import KssConfig
from ...monitors.base import StepState
from ...parallel import GroupSum
from ..kss import Shaping, refuse_hidden
from .model import MegatronModel


def shape(settings: KssConfig, model: MegatronModel, state: StepState) -> Shaping:
    """Hook the term onto the layers of this rank.

    Raises:
        ConfigError: the layers can't be reached, or ``kss.rank`` is above the hidden size.
    """
    refuse_hidden(model.view)
    config, groups = model.config, model.groups
    context = groups.cp.size()
    device = model.view.device

    def scale(tokens: torch.Tensor) -> torch.Tensor | float:
        given: Any = config.grad_scale_func
        factor = 1.0 if given is None else given(torch.ones((), device=device))
        if config.calculate_per_token_loss:
            # Megatron adds gradients up over all ranks and divides by the number of all tokens
            return factor * tokens
        # and here it takes the mean over the ranks, of which those of a sequence have a part each
        return factor * context / get_num_microbatches()

    shaping = Shaping(
        settings,
        range(1, config.num_layers + 1),
        state,
        device,
        scale=scale,
        total=GroupSum(_sharing(config, groups)),
    )
    for layer in model.view.residual.layers:
        shaping.attach(layer, model.layers[layer], config.hidden_size)
    return shaping


def _sharing(config: Any, groups: Any) -> torch.distributed.ProcessGroup | None:
    """The ranks that hold the rest of each sequence; without sequence parallelism all of TP do."""
    sequence = config.sequence_parallel and groups.tp.size() > 1
    if sequence and groups.cp.size() > 1:
        return groups.tp_cp
    if sequence:
        return groups.tp
    return groups.cp if groups.cp.size() > 1 else None
