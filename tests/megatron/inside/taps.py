"""Taps on a built model: they change nothing, and count every token and every dK once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.router import Router

from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.hosts.taps import AttentionTap, RouterTap
from mcore_monitors.monitors.base import StepState

from . import build

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
CORE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


class Watched:
    """A model of two MoE layers with taps that note what they are given."""

    def __init__(self, **more: Any) -> None:
        spec = get_gpt_layer_local_spec(num_experts=build.EXPERTS)
        self.model = build.gpt(register(spec), build.config(experts=True, **more))
        self.state = StepState(iteration=10, armed=True)
        self.logits: list[list[torch.Tensor]] = [[], []]
        self.padding: list[Any] = []
        self.gradients: list[list[torch.Tensor]] = [[], []]
        routers = build.modules(self.model, Router)
        for router, seen in zip(routers, self.logits, strict=True):
            router.mcore_monitors_tap = RouterTap()
            router.mcore_monitors_tap.listeners.append(
                lambda logits, padding, seen=seen: (
                    seen.append(logits.detach()), self.padding.append(padding),
                )
            )  # fmt: skip
        self.cores = [a.core_attention for a in build.modules(self.model, SelfAttention)]
        for core, seen in zip(self.cores, self.gradients, strict=True):
            core.mcore_monitors_tap = AttentionTap(self.state)
            # a hook of autograd must return None, as append does
            core.mcore_monitors_tap.listeners.append(
                lambda call, seen=seen: call.key.register_hook(seen.append)
            )

    def counts(self) -> list[tuple[int, int]]:
        """Calls of (router, attention) tap of each layer."""
        return [(len(z), len(g)) for z, g in zip(self.logits, self.gradients, strict=True)]


def trained(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses and all gradients of one step."""
    model.zero_grad()
    losses = build.losses(model)
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("more", [{}, FULL, CORE_ATTENTION], ids=["plain", "full", "core"])
def test_losses_and_gradients_are_bitwise_the_same(more: dict[str, Any]) -> None:
    spec = get_gpt_layer_local_spec(num_experts=build.EXPERTS)
    losses, gradients = trained(build.gpt(spec, build.config(experts=True, **more)))
    registered = build.gpt(register(spec), build.config(experts=True, **more))
    watched = Watched(**more)
    for model in (registered, watched.model):
        got, got_gradients = trained(model)
        assert torch.equal(got, losses)
        assert got_gradients.keys() == gradients.keys()
        assert all(torch.equal(got_gradients[n], g) for n, g in gradients.items())
    assert watched.counts() == [(1, 1)] * 2
    assert sum(g.abs().sum() for g in gradients.values()) > 0


@pytest.mark.parametrize(
    "more", [{}, FULL, CORE_ATTENTION, MOE], ids=["plain", "full", "core", "moe"]
)
def test_every_micro_batch_counts_once(more: dict[str, Any]) -> None:
    watched = Watched(**more)
    for micro_batch in range(3):
        build.losses(watched.model, batch=1, seed=micro_batch).sum().backward()
    assert watched.counts() == [(3, 3)] * 2
    for logits in watched.logits:
        assert [tuple(z.shape) for z in logits] == [(build.SEQUENCE, 1, build.EXPERTS)] * 3
    for gradients in watched.gradients:
        # grouped queries: one dK a group, before it is shared out over the heads
        shape = (build.SEQUENCE, 1, build.GROUPS, 32 // build.HEADS)
        assert [tuple(g.shape) for g in gradients] == [shape] * 3
        for g in gradients:
            assert g.abs().sum() > 0
            assert g.sum(0).norm() < 1e-5 * g.norm(dim=-1).sum()


def test_recomputing_gives_the_same_readings() -> None:
    plain, recomputed = Watched(), Watched(**FULL)
    for watched in (plain, recomputed):
        build.losses(watched.model).mean().backward()
    for layer in range(2):
        assert torch.equal(plain.logits[layer][0], recomputed.logits[layer][0])
        torch.testing.assert_close(plain.gradients[layer][0], recomputed.gradients[layer][0])


def test_evaluation_does_not_count() -> None:
    watched = Watched()
    watched.model.eval()
    with torch.no_grad():
        build.losses(watched.model)
    build.losses(watched.model).mean().backward()  # evaluation with gradients, too
    watched.model.train()
    with torch.no_grad():
        build.losses(watched.model)
    assert watched.counts() == [(0, 0)] * 2


def test_nothing_is_hooked_on_steps_that_are_not_sampled() -> None:
    watched = Watched()
    watched.state.armed = False
    build.losses(watched.model).mean().backward()
    assert [len(g) for g in watched.gradients] == [0, 0]


def test_padding_reaches_the_tap() -> None:
    watched = Watched()
    router = build.modules(watched.model, Router)[0]
    hidden = torch.randn(build.SEQUENCE, build.BATCH, 32, requires_grad=True)
    padding = torch.zeros(build.SEQUENCE, build.BATCH, dtype=torch.bool)
    padding[-2:] = True
    router(hidden)
    router(hidden, padding)
    assert watched.padding[0] is None
    assert torch.equal(watched.padding[1], padding)
    assert watched.logits[0][1].shape[:2] == padding.shape


def test_the_kernel_is_chosen_by_the_iteration() -> None:
    watched = Watched()
    host = build.losses(watched.model).detach()
    calls = []

    def zero(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(module)
        return torch.zeros_like(query).flatten(2)

    tap = watched.cores[1].mcore_monitors_tap
    tap.faulty, tap.faulty_from = zero, 12
    watched.state.iteration = 11
    assert torch.equal(build.losses(watched.model), host)
    watched.state.iteration = 12
    assert not torch.equal(build.losses(watched.model), host)
    assert calls == [watched.cores[1]]
    tap.safe = lambda module, *args, **kwargs: (
        type(module).__mro__[1].forward(module, *args, **kwargs)
    )  # the remedy outranks the drill
    assert torch.equal(build.losses(watched.model), host)


def test_the_view_of_a_model() -> None:
    """Layers by their global numbers; dense and MoE ones mixed."""
    more = {"moe_layer_freq": [0, 1]}
    settings = build.config(experts=True, **more)
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    model = build.gpt(register(spec), settings)
    described = MegatronModel([model])
    view = described.view
    assert (view.layers, view.heads, view.groups, view.experts) == (2, 4, 2, 4)
    assert [v.layer for v in view.attention] == [1, 2]
    assert [v.layer for v in view.routers] == [2]
    assert view.conserved["attention/key_shift"].places == {1: (0, 2), 2: (0, 2)}
    assert (view.left_out, described.context.size, described.reports_loss) == ([], 1, True)
    router = build.modules(model, Router)[0]
    assert torch.equal(view.routers[0].read(), router.weight)
    with torch.no_grad():
        router.weight.add_(1.0)
    assert torch.equal(view.routers[0].read(), router.weight)  # live


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_weights_of_a_view_are_those_that_the_layer_uses(groups: int, gated: bool) -> None:
    more = {"num_query_groups": groups, "attention_output_gate": gated}
    model = build.gpt(register(get_gpt_layer_local_spec()), build.config(**more))
    views = MegatronModel([model]).view.attention
    for attention, view in zip(build.modules(model, SelfAttention), views, strict=True):
        # what a linear layer makes of unit vectors is its weight
        unit_vectors = torch.eye(32).unsqueeze(1)  # [S = D, B = 1, D]
        query, key, *_ = attention.get_query_key_value_tensors(unit_vectors, output_gate=gated)
        got_query, got_key = view.read()
        assert torch.equal(got_query, query[:, 0].permute(1, 2, 0))
        assert torch.equal(got_key, key[:, 0].permute(1, 2, 0))
        assert (view.first_group, view.groups, view.heads_per_group) == (0, groups, 4 // groups)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"softmax_type": "learnable"}, "softmax_type 'learnable'"),
        ({"fp8_dot_product_attention": True}, "8-bit"),
    ],
)
def test_attention_without_the_identity_is_left_out(more: dict[str, Any], reason: str) -> None:
    model = build.gpt(register(get_gpt_layer_local_spec()), build.config(**more))
    view = MegatronModel([model]).view
    assert view.conserved["attention/key_shift"].places == {}
    assert len(view.left_out) >= 2 and all(reason in sentence for sentence in view.left_out)
    assert [v.layer for v in view.attention] == [1, 2]  # the weights are read all the same


def test_a_model_that_was_not_registered_is_left_out_with_a_reason() -> None:
    spec = get_gpt_layer_local_spec(num_experts=build.EXPERTS)
    view = MegatronModel([build.gpt(spec, build.config(experts=True))]).view
    assert (view.attention, view.routers) == ([], [])
    assert view.conserved["attention/key_shift"].places == {}
    assert len(view.left_out) == 4
    assert all("was not built from a registered spec" in reason for reason in view.left_out)
