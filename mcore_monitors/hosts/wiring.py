"""Which monitor listens to which tap; the same on every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..runtime import Runtime
from ..views import AttentionCall, ModelView
from .taps import AttentionTap, RouterTap


def wire(
    runtime: Runtime,
    model: ModelView,
    attentions: Mapping[int, AttentionTap],
    routers: Mapping[int, RouterTap],
) -> None:
    """Let the monitors of a runtime listen, each guarded, so that an error turns it off.

    Args:
        model: what the monitors were made of.
        attentions, routers: taps of this rank by layer number.
    """
    by_name = {m.name: m for m in runtime.monitors}
    router, conservation = by_name.get("router"), by_name.get("conservation")
    for layer, tap in routers.items():
        if router is not None:
            tap.listeners.append(partial(runtime.guarded(router, router.on_logits), layer))
    for layer, tap in attentions.items():
        if conservation is not None and layer in model.key_shift:
            hook = runtime.guarded(conservation, conservation.on_key_gradient)
            tap.listeners.append(partial(_hook_key, partial(hook, layer)))


def _hook_key(hook: Callable[[torch.Tensor], None], call: AttentionCall) -> None:
    if call.key.requires_grad:
        call.key.register_hook(hook)
