"""Norms and the output layer of Hugging Face models: found, right ones quiet, wrong ones named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mcore_monitors.catalogue.conservation import NORMS
from mcore_monitors.detection.localise import localise
from mcore_monitors.hosts.observed_norm import observe_norm
from mcore_monitors.hosts.observed_output import observe_output
from mcore_monitors.hosts.wiring import tapped, wire
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.monitors.conservation.limits import residual_limits
from mcore_monitors.parallel import GroupSum, Packed

from .models import EXPERTS, described, model

INPUT, MLP, QUERY, KEY, FINAL = range(len(NORMS))
FAMILIES = {
    "llama": ({}, {(1, INPUT), (1, MLP), (2, INPUT), (2, MLP), (2, FINAL)}),
    "qwen3_moe": (
        EXPERTS,
        {(n, unit) for n in (1, 2) for unit in (INPUT, MLP, QUERY, KEY)} | {(2, FINAL)},
    ),
}


def sizes(built: nn.Module) -> dict[str, dict[int, list[float]]]:
    """Residuals of one step over their limits."""
    state = StepState(iteration=1, armed=True)
    found = described(built, state)
    found.view.sequence_length = 16
    monitor = ConservationMonitor(found.view, GroupSum(None), whole=True)
    # hooks unguarded: an error in one is to be seen
    crew = SimpleNamespace(monitors=[monitor], guarded=lambda _, call, **__: call)
    runtime = SimpleNamespace(crew=crew, state=state)
    wire(
        runtime,
        found.view,
        {n: m.mcore_monitors_tap for n, m in found.attentions.items()},
        {n: m.mcore_monitors_tap for n, m in found.routers.items()},
        tapped(found.norms, observe_norm, runtime),
        tapped(found.outputs, observe_output, runtime),
    )
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    built(input_ids=tokens, labels=tokens).loss.backward()
    packed, limits = Packed(monitor.schema(), found.view.device), residual_limits(found.view)
    monitor.collect(1, packed.fields)
    return {
        signal: {n: [x / limits[signal] for x in values] for n, values in layers.items()}
        for signal, layers in monitor.read(packed.reduce()).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_norms_and_the_output_are_found_and_quiet(family: str) -> None:
    settings, places = FAMILIES[family]
    got = sizes(model(family, **settings))
    seen = {
        (layer, unit)
        for layer, values in got["norm/scale"].items()
        for unit, value in enumerate(values)
        if value == value
    }
    assert seen == places
    assert set(got["output/vocabulary_shift"]) == {2}
    values = [x for layers in got.values() for xs in layers.values() for x in xs]
    assert max(x for x in values if x == x) < 0.3


def test_what_is_watched_computes_the_same() -> None:
    plain, watched = model("qwen3_moe", **EXPERTS), model("qwen3_moe", **EXPERTS)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    plain(input_ids=tokens, labels=tokens).loss.backward()
    sizes(watched)
    named = dict(watched.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, named[name].grad), name


def test_a_norm_without_its_projection_and_an_output_that_loses_a_column_are_named() -> None:
    built = model("llama")
    norm = built.model.layers[1].post_attention_layernorm

    def careless(x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * (x * scale)

    norm.forward = careless
    (site,) = localise(sizes(built))
    assert (site.layers, site.place) == ((2,), "pre-MLP norm")

    built = model("llama")

    def lose(module: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        # a hook that changes the gradient comes before the one that looks
        logits.register_hook(lambda g: torch.cat([g[..., :-8], 0 * g[..., -8:]], dim=-1))

    built.lm_head.register_forward_hook(lose)
    (site,) = localise(sizes(built))
    assert site.place == "output layer"
