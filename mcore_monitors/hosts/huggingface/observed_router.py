"""A router that tells its logits to a tap, from a hook on the module that makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...monitors.base import StepState
from ...signals.router import choice_map
from ..taps import Passes, RouterTap
from .routers import FoundRouter


def observe_router(found: FoundRouter, state: StepState) -> None:
    """Give a router a ``mcore_monitors_tap`` and let it be told the logits of each micro-batch.

    Training only. The logits are those of the graph; they are what the router computes from what it
    is given, so a jitter of its input is in them. They come flat, [T, E]; a padding mask is not
    known there.
    """
    tap = RouterTap()
    tap.tells_choice = found.rule.chooses_by == "host"
    found.module.mcore_monitors_tap = tap
    passes = Passes(state)

    def tell(source: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not tap.is_heard or not source.training or torch.compiler.is_compiling():
            return
        if not passes.counts():
            return
        logits = output if found.logits_at is None else output[found.logits_at]
        tap.tell(logits, None, _choice(found, output, logits) if tap.tells_choice else None)

    found.source.register_forward_hook(tell)


def _choice(found: FoundRouter, output: Any, logits: Tensor) -> Tensor:
    chosen = output[found.chosen_at]
    return choice_map(chosen.reshape(*logits.shape[:-1], -1), logits.shape[-1])
