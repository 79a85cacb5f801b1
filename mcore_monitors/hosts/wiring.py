"""Which monitor listens to which tap; the same on every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..runtime import Runtime
from ..views import ATTENTION_RESIDUALS, ModelView
from .taps import AttentionTap, RouterTap, Tap


def tapped(
    modules: Mapping[Any, torch.nn.Module], observe: Callable[..., None], runtime: Runtime
) -> dict[Any, Tap]:
    """Give each norm or output layer a tap of its own, where the monitor that listens is on."""
    if all(monitor.name != "conservation" for monitor in runtime.crew.monitors):
        return {}
    taps = {place: Tap(runtime.state) for place in modules}
    for place, module in modules.items():
        observe(module, taps[place])
    return taps


def wire(
    runtime: Runtime,
    model: ModelView,
    attentions: Mapping[int, AttentionTap],
    routers: Mapping[int, RouterTap],
    norms: Mapping[tuple[int, int], Tap] | None = None,
    outputs: Mapping[int, Tap] | None = None,
    layers: Mapping[int, Tap] | None = None,
) -> None:
    """Let the monitors of a runtime listen, each guarded, so that an error turns it off.

    Args:
        model: what the monitors were made of.
        attentions, routers, outputs, layers: taps of this rank by layer number; ``layers`` are
            those of whole layers, told of the residual stream before and after.
        norms: taps of this rank by layer number and place in
            :data:`mcore_monitors.catalogue.conservation.NORMS`.
    """
    by_name = {m.name: m for m in runtime.crew.monitors}
    router, conservation = by_name.get("router"), by_name.get("conservation")
    for layer, tap in routers.items():
        if router is not None:
            hook = runtime.crew.guarded(router, router.on_logits, every_step=router.every_step)
            tap.listeners.append(partial(hook, layer))
    activity = by_name.get("attention_activity")
    if activity is not None:
        hook = runtime.crew.guarded(activity, activity.on_attention)
        for layer in attentions.keys() & model.activity.keys():
            attentions[layer].listeners.append(partial(hook, layer))
    koopman = by_name.get("koopman")
    if koopman is not None:
        hook = runtime.crew.guarded(koopman, koopman.on_layer)
        for layer, tap in (layers or {}).items():
            tap.listeners.append(partial(hook, layer))
    if conservation is None:
        return
    conservation.guard = partial(runtime.crew.guarded, conservation)
    on_attention = conservation.guard(conservation.on_attention)
    for layer, tap in attentions.items():
        if any(layer in model.conserved[name].places for name in ATTENTION_RESIDUALS):
            tap.listeners.append(partial(on_attention, layer))
    on_router = conservation.guard(conservation.on_router)
    for layer, tap in routers.items():
        if layer in model.conserved["router/shift"].places:
            tap.state = runtime.state
            tap.sampled.append(partial(on_router, layer))
    on_norm = conservation.guard(conservation.on_norm)
    for (layer, unit), tap in (norms or {}).items():
        tap.listeners.append(partial(on_norm, layer, unit))
    on_output = conservation.guard(conservation.on_output)
    for layer, tap in (outputs or {}).items():
        tap.listeners.append(partial(on_output, layer))
