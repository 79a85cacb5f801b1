"""Router signals on the real Megatron-core: every layout reads what the single process reads.

The layouts run one after another in the same four processes; what is no tensor, expert, pipeline
or context parallelism of theirs is data parallelism.
"""

from __future__ import annotations

from typing import Any

import pytest

from mcore_monitors.catalogue import SIGNALS

from ..distributed import run

SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk": 3,
}
GROUPS = SIGMOID | {
    "moe_router_topk": 2,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
#: gloo gathers equal sizes only, so experts are padded to a capacity that nobody exceeds
EVEN = {"moe_expert_capacity_factor": 4.0, "moe_pad_expert_input_to_capacity": True}

#: what the single process reads, and what is compared with it
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid with bias": SIGMOID,
    "group-limited": GROUPS,
    "padding": {"padding": True},
    "without attention": {"attention": False},
}
#: of the same readings
RECOMPUTED = {
    "softmax": FULL,
    "sigmoid with bias": SIGMOID | MOE,
    "group-limited": GROUPS | FULL,
    "padding": {"padding": True} | FULL,
}
ATTENTIVE = {name: v for name, v in VARIANTS.items() if name != "without attention"}
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, dict[str, Any]]]] = {
    "TP 2 with sequence parallelism": ({"tensor_model_parallel_size": 2}, ATTENTIVE),
    "EP 2": ({"expert_model_parallel_size": 2}, RECOMPUTED),
    "TP 2 x EP 2": (
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
        RECOMPUTED,
    ),
    "EP 2 x expert TP 2": (
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
        },
        {"softmax": EVEN},
    ),
    "PP 2 x EP 2": (
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        ATTENTIVE,
    ),
    "CP 2 x EP 2": (
        {"context_parallel_size": 2, "expert_model_parallel_size": 2},
        {"without attention": VARIANTS["without attention"]},
    ),
}
ALONE = {"one": ({}, VARIANTS), "recomputed": ({}, RECOMPUTED)}

Readings = dict[str, dict[str, dict[str, dict[int, list[float]]]]]


def read(rank: int, layouts: dict[str, Any]) -> Readings:
    """Runs in each process: layout to variant to signals."""
    from .inside import router_layouts

    return {name: router_layouts.run(*layout) for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def alone() -> Readings:
    return run(1, read, ALONE)[0]


@pytest.fixture(scope="module")
def sharded() -> Readings:
    return run(4, read, LAYOUTS, timeout=240)[0]


def assert_equal(got: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Every signal of every layer, to 1e-5."""
    assert got.keys() == wanted.keys(), where
    for signal, layers in wanted.items():
        assert got[signal].keys() == layers.keys(), (where, signal)
        for layer, values in layers.items():
            assert got[signal][layer] == pytest.approx(values, rel=1e-5, abs=1e-7), (
                where, signal, layer,
            )  # fmt: skip


def test_the_single_process_reads_everything(alone: Readings) -> None:
    ours = {name for name in SIGNALS if name.startswith("router/")}
    ours -= {"router/shift"}  # a conservation residual
    for name, signals in alone["one"].items():
        biased = name in ("sigmoid with bias", "group-limited")
        assert signals.keys() == (ours if biased else ours - {"router/bias_agreement"})
        assert all(set(layers) == {1, 2} for layers in signals.values()), name
        for layer in (1, 2):
            assert 0.1 < signals["router/routing_entropy_normalised"][layer][0] < 0.99
            assert 0.1 < signals["router/load_max_violation"][layer][0] < 6
    assert len({str(signals) for signals in alone["one"].values()}) == len(VARIANTS)
    agreement = alone["one"]["sigmoid with bias"]["router/bias_agreement"]
    assert all(0.5 < values[0] < 0.98 for values in agreement.values())


@pytest.mark.parametrize("variant", RECOMPUTED)
def test_recomputed(variant: str, alone: Readings) -> None:
    assert_equal(alone["recomputed"][variant], alone["one"][variant], variant)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, alone: Readings, sharded: Readings) -> None:
    for variant, signals in sharded[layout].items():
        assert_equal(signals, alone["one"][variant], f"{layout}, {variant}")
