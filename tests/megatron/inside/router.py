"""Megatron's routers as the monitor sees them: the same choice, and what can't be seen is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.router import Router

from mcore_monitors.hosts.megatron.graphs import captured
from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.hosts.taps import RouterTap
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.parallel import Packed

from . import build

EXPERTS = 8
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4}
NO_LOSS = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
WAYS = {
    "softmax of the chosen": {},
    "softmax first": {"moe_router_pre_softmax": True},
    "top 1": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "√softplus": {"moe_router_score_function": "sqrtsoftplus"},
    "sigmoid with bias": BIAS,
    "groups": GROUPS,
    "groups of probabilities": GROUPS | {"moe_router_pre_softmax": True},
    "groups with bias": GROUPS | BIAS,
    "group of one": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
}
BY_HOST = {
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "quantile balancing": {
        "moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0,
    },
}  # fmt: skip


class Watched:
    """One model with its monitor, wired as the host does it."""

    def __init__(self, **more: Any) -> None:
        settings = build.config(experts=True, **{"num_moe_experts": EXPERTS} | NO_LOSS | more)
        self.model = build.gpt(register(get_gpt_layer_local_spec(num_experts=EXPERTS)), settings)
        self.described = MegatronModel([self.model])
        self.monitor = RouterMonitor(self.described.view)
        for view in self.described.view.routers:
            tap = RouterTap()
            tap.tells_choice = view.rule.chooses_by == "host"
            layer = view.layer
            tap.listeners.append(
                lambda z, padding, layer=layer, **choice: self.monitor.on_logits(
                    layer, z, padding, **choice
                )
            )
            self.described.routers[layer].mcore_monitors_tap = tap
        self.router = build.modules(self.model, Router)[0]

    def route(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """The host's map [tokens, E] of the first layer's router."""
        return self.router(hidden, padding)[1]

    def sums(self) -> dict[str, torch.Tensor]:
        packed = Packed(self.monitor.schema(), torch.device("cpu"))
        self.monitor.collect(10, packed.fields)
        return packed.reduce()


def hidden(seed: int = 0) -> torch.Tensor:
    x = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(seed))
    return (40 * x).requires_grad_()  # weights are small at the start


@pytest.mark.parametrize("way", WAYS)
def test_the_load_is_that_of_the_hosts_own_choice(way: str) -> None:
    watched = Watched(**WAYS[way])
    if watched.router.expert_bias is not None:
        watched.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    wanted = sum(watched.route(hidden(seed)).sum(0) for seed in range(2))
    assert watched.described.view.routers[0].rule.chooses_by != "host"
    assert watched.sums()["load"][0].tolist() == wanted.tolist()
    assert wanted.min() < wanted.max()


def test_dropped_tokens_are_demand() -> None:
    """Under a capacity the host's map says who was let in, the load who wanted to."""
    free, limited = Watched(), Watched(moe_expert_capacity_factor=0.5)
    wanted, dropped = free.route(hidden()), limited.route(hidden())
    assert dropped.sum() < wanted.sum()
    assert limited.sums()["load"][0].tolist() == wanted.sum(0).tolist()


def test_padding_is_left_out_of_the_load() -> None:
    watched = Watched()
    padding = torch.zeros(64, 2, dtype=torch.bool)
    padding[40:, 1] = True
    where = watched.route(hidden(), padding)
    assert watched.sums()["load"][0].tolist() == where[~padding.flatten()].sum(0).tolist()


@pytest.mark.parametrize("way", BY_HOST)
def test_a_choice_that_only_the_host_knows_is_taken_from_it(way: str) -> None:
    try:
        watched = Watched(**BY_HOST[way])
    except (ValueError, AssertionError):
        pytest.skip(f"this release has no {way}")
    wanted = watched.route(hidden()).sum(0)
    assert watched.described.view.routers[0].rule.chooses_by == "host"
    assert watched.sums()["load"][0].tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("settings", "attention", "router"),
    [
        ({}, False, False),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": []}, True, True),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}, True, False),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["moe_router"]}, False, True),
        ({"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []}, True, True),
    ],
)
def test_what_a_graph_captures(settings: dict[str, Any], attention: bool, router: bool) -> None:
    config = build.config(experts=True)
    for name, setting in settings.items():  # a CPU can't be asked for graphs when it is built
        setattr(config, name, setting)
    assert (captured(config, "attention"), captured(config, "router")) == (attention, router)


def test_a_captured_router_is_read_by_its_weights_alone() -> None:
    watched = Watched()
    watched.model.config.cuda_graph_impl = "local"
    watched.model.config.cuda_graph_modules = ["moe_router", "moe_preprocess"]
    described = MegatronModel([watched.model])
    assert described.routers == {}
    assert [v.layer for v in described.view.routers] == [1, 2]
    assert ["CUDA graph captures the routers" in s for s in described.view.left_out] == [True] * 2
    monitor = RouterMonitor(described.view)
    packed = Packed(monitor.schema(), torch.device("cpu"))
    monitor.collect(10, packed.fields)
    assert set(monitor.read(packed.reduce())) == {
        "router/weight_similarity", "router/centred_conditioning", "router/row_norm_spread",
    }  # fmt: skip
