"""Router monitor: weights once a layer, every token of training once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mcore_monitors.catalogue import SIGNALS
from mcore_monitors.monitors import router_sums
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.monitors.router_sums import WAITING_BYTES
from mcore_monitors.signals.router import (
    centred_conditioning,
    row_norm_spread,
    weight_similarity,
)
from mcore_monitors.views import ModelView, Replica, RouterView, RoutingRule

from .models import TinyModel, reduced, sample

E = 8
SOFTMAX = RoutingRule(top_k=2, chooses_by="logits")
RULES = {
    "softmax": (SOFTMAX, False),
    "softmax first": (RoutingRule(top_k=2), False),
    "sigmoid": (RoutingRule(score="sigmoid", top_k=3), False),
    "sigmoid with bias": (RoutingRule(score="sigmoid", top_k=3), True),
    "groups": (
        RoutingRule(score="sigmoid", top_k=3, groups=4, top_groups=2, group_sum=2), True
    ),
    "groups by logits": (
        RoutingRule(top_k=3, chooses_by="logits", groups=4, top_groups=2), False
    ),
    "√softplus": (RoutingRule(score="sqrtsoftplus", top_k=2), True),
}  # fmt: skip
BIAS = torch.linspace(-0.3, 0.3, E)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(
    rule: RoutingRule = SOFTMAX, bias: Any = None, replica: Replica | None = None
) -> ModelView:
    """A view of two layers whose routers of eight experts follow a rule."""
    view = TinyModel(experts=E).view(replica or Replica())
    view.routers = [replace(v, rule=rule, bias=bias) for v in view.routers]
    return view


def value(readings: dict[str, dict[int, list[float]]], name: str, layer: int = 1) -> float:
    (number,) = readings[f"router/{name}"][layer]
    return number


# ---- the reference: loops over tokens ----


def score(z: float, rule: RoutingRule) -> float:
    if rule.score == "softmax":
        return math.exp(z)
    return 1 / (1 + math.exp(-z)) if rule.score == "sigmoid" else math.log1p(math.exp(z)) ** 0.5


def best(scores: list[float], rule: RoutingRule) -> Iterator[int]:
    """Experts that the token may go to, the best first."""
    allowed = range(len(scores))
    if rule.groups:
        size = len(scores) // rule.groups
        worth = [
            sum(sorted(scores[g * size : (g + 1) * size])[-rule.group_sum :])
            for g in range(rule.groups)
        ]
        top = sorted(range(rule.groups), key=lambda g: -worth[g])[: rule.top_groups]
        allowed = [e for e in allowed if e // size in top]
    return iter(sorted(allowed, key=lambda e: -scores[e]))


def reference(rows: list[list[float]], rule: RoutingRule, bias: list[float]) -> dict[str, float]:
    """Every signal of the tokens ``rows`` [T, E], by its definition."""
    entropies, margins, load = [], [], [0] * E
    means = dict.fromkeys(("predicted_entropy", "z", "mixing_entropy", "bias_agreement"), 0.0)
    for z in rows:
        s = [score(x, rule) for x in z]
        p = [x / sum(s) for x in s]
        entropies.append(-sum(x * math.log(x) for x in p))
        logs = [math.log(x) for x in s]
        variance = sum((x - sum(logs) / E) ** 2 for x in logs) / E
        means["predicted_entropy"] += math.log(E) - variance / 2
        means["z"] += math.log(sum(math.exp(x) for x in z)) ** 2
        compared = p if rule.score == "softmax" else s
        bare = z if rule.chooses_by == "logits" else compared
        order = best([x + b for x, b in zip(bare, bias, strict=True)], rule)
        chosen = [next(order) for _ in range(rule.top_k)]
        last, after = chosen[-1], next(order)
        margins.append(compared[last] + bias[last] - compared[after] - bias[after])
        for e in chosen:
            load[e] += 1
        q = [p[e] / sum(p[c] for c in chosen) for e in chosen]
        means["mixing_entropy"] -= sum(x * math.log(x) for x in q)
        free = best(bare, rule)
        agreed = {next(free) for _ in range(rule.top_k)} & set(chosen)
        means["bias_agreement"] += len(agreed) / rule.top_k
    n = len(rows)
    wanted = {name: total / n for name, total in means.items()}
    wanted["routing_entropy"] = sum(entropies) / n
    wanted["routing_entropy_normalised"] = wanted["routing_entropy"] / math.log(E)
    wanted["prediction_gap"] = wanted["routing_entropy"] - wanted["predicted_entropy"]
    wanted["topk_margin"] = sum(margins) / n
    for q in (5, 50, 95):
        exact = sorted(entropies)[math.ceil(q / 100 * n) - 1]
        wanted[f"routing_entropy_q{q:02}"] = exact
        wanted[f"routing_entropy_normalised_q{q:02}"] = exact / math.log(E)
    wanted["topk_margin_q05"] = sorted(margins)[math.ceil(0.05 * n) - 1]
    shares = [c / sum(load) for c in load]
    wanted["load_max_violation"] = max(shares) * E - 1
    wanted["effective_experts"] = math.exp(-sum(s * math.log(s) for s in shares if s))
    wanted["dead_experts"] = load.count(0) / E
    wanted["underused_experts"] = sum(s < 0.1 / E for s in shares) / E
    wanted["largest_share"] = max(shares)
    wanted["largest_share_held"] = 1
    return wanted


@pytest.mark.parametrize("name", RULES)
def test_every_signal_of_tokens_against_loops(name: str) -> None:
    """Three micro-batches of unlike size in layer 1, nothing in layer 2."""
    rule, biased = RULES[name]
    monitor = RouterMonitor(routed(rule, bias=lambda: BIAS if biased else None))
    tilt = torch.linspace(0, 3, E)  # so that experts are loaded unlike
    parts = [logits(n, 2, E, seed=n) + tilt for n in (40, 9, 31)]
    for part in parts:
        monitor.on_logits(1, part)
    readings = sample([monitor], 10)
    rows = torch.cat([part.flatten(0, 1) for part in parts]).double().tolist()
    wanted = reference(rows, rule, BIAS.tolist() if biased else [0.0] * E)
    if not biased:
        assert wanted.pop("bias_agreement") == 1
        assert "router/bias_agreement" not in readings
    else:
        assert 0.1 < wanted["bias_agreement"] < 1
    for signal, expected in wanted.items():
        got = value(readings, signal)
        bin_width = 0.0
        if "entropy" in signal and "_q" in signal:
            at_most = 1 if "normalised" in signal else math.log(E)
            bin_width = at_most * 4 / 128
        elif signal == "topk_margin_q05":
            bin_width = 0.23 * expected
        assert got == pytest.approx(expected, rel=2e-6, abs=1e-6 + bin_width), signal
    assert wanted["load_max_violation"] > 0.5
    of_weight = {"weight_similarity", "centred_conditioning", "row_norm_spread"}
    assert set(readings) == {f"router/{s}" for s in {*wanted, *of_weight}}
    assert all(set(readings[f"router/{s}"]) == {1} for s in wanted)


def test_the_catalogue_has_every_signal() -> None:
    monitor = RouterMonitor(routed(RoutingRule(score="sigmoid", top_k=2), bias=lambda: BIAS))
    monitor.on_logits(1, logits(8, 2, E))
    ours = {name for name in SIGNALS if name.startswith("router/")}
    assert set(sample([monitor], 10)) == ours - {"router/shift"}  # that one is a residual


@pytest.mark.parametrize(
    ("z", "wanted"),
    [
        (
            torch.zeros(64, E).scatter_(1, torch.arange(64)[:, None] % E, 1e-6),
            {"routing_entropy_normalised": 1, "load_max_violation": 0, "effective_experts": E,
             "dead_experts": 0, "largest_share": 1 / E, "prediction_gap": 0, "topk_margin": 0},
        ),
        (
            torch.zeros(64, E).index_fill_(1, torch.tensor([3]), 200.0),
            {"routing_entropy": 0, "load_max_violation": E - 1, "effective_experts": 1,
             "dead_experts": 1 - 1 / E, "underused_experts": 1 - 1 / E, "largest_share": 1,
             "topk_margin": 1, "mixing_entropy": 0, "z": 200.0**2},
        ),
    ],
    ids=["undecided and even", "all to one"],
)  # fmt: skip
def test_ends(z: torch.Tensor, wanted: dict[str, float]) -> None:
    monitor = RouterMonitor(routed(RoutingRule(top_k=1)))
    monitor.on_logits(1, z)
    readings = sample([monitor], 10)
    for name, number in wanted.items():
        assert value(readings, name) == pytest.approx(number, rel=1e-5, abs=1e-6), name


def test_weights() -> None:
    model = TinyModel()
    readings = sample([RouterMonitor(model.view())], 10)
    for layer in (1, 2):
        weight = model.router[layer - 1]
        assert value(readings, "weight_similarity", layer) == weight_similarity(weight).item()
        assert value(readings, "centred_conditioning", layer) == centred_conditioning(weight).item()
        assert value(readings, "row_norm_spread", layer) == row_norm_spread(weight).item()
    assert len(readings) == 3  # no token has passed


@pytest.mark.parametrize("name", ["softmax", "sigmoid with bias", "groups"])
def test_padded_tokens_do_not_count(name: str) -> None:
    rule, biased = RULES[name]
    tokens = logits(40, 2, E)
    padding = torch.zeros(40, 2, dtype=torch.bool)
    padding[25:, 1] = True
    broken = tokens.clone()
    broken[padding] = math.nan
    monitor, wanted = (
        RouterMonitor(routed(rule, bias=lambda: BIAS if biased else None)) for _ in range(2)
    )
    monitor.on_logits(1, broken, padding)
    wanted.on_logits(1, tokens[~padding])
    got, expected = sample([monitor], 10), sample([wanted], 10)
    assert got.keys() == expected.keys()
    for signal in got:
        assert got[signal] == {
            layer: pytest.approx(v, rel=1e-6) for layer, v in expected[signal].items()
        }


def test_every_sample_starts_from_zero_but_for_the_holder() -> None:
    monitor = RouterMonitor(routed())
    monitor.on_logits(2, logits(8, 2, E))
    first = sample([monitor], 10)
    assert "router/routing_entropy" not in sample([monitor], 20)
    monitor.on_logits(2, logits(8, 2, E))
    again = sample([monitor], 30)
    assert again.pop("router/largest_share_held") == {2: [2.0]}
    assert first.pop("router/largest_share_held") == {2: [1.0]}
    assert again == first


def test_a_restart_forgets() -> None:
    monitor = RouterMonitor(routed())
    monitor.on_logits(1, 5 + logits(8, 2, E))
    sample([monitor], 10)
    monitor.on_logits(1, 7 + logits(8, 2, E))
    monitor.restart()
    monitor.on_logits(1, logits(8, 2, E))
    fresh = RouterMonitor(routed())
    fresh.on_logits(1, logits(8, 2, E))
    assert sample([monitor], 20) == sample([fresh], 20)


def test_how_long_one_expert_has_the_most() -> None:
    """Experts 3, 3, a tie of 3 and 0, 5, nothing, 5."""
    monitor = RouterMonitor(routed(RoutingRule(top_k=1)))
    held = []
    for experts in ([3, 3, 1], [3, 3, 2], [3, 0], [5], [], [5]):
        if experts:
            monitor.on_logits(1, 9 * torch.eye(E)[experts])
        held.append(sample([monitor], 10).get("router/largest_share_held"))
    assert held == [{1: [1]}, {1: [2]}, {1: [3]}, {1: [1]}, None, {1: [2]}]


def test_tokens_of_all_ranks_weigh_alike() -> None:
    """Two ranks with unlike numbers of tokens, and a third that saw none."""
    ranks = [RouterMonitor(routed(replica=Replica(rank=r, size=3))) for r in range(3)]
    alone = RouterMonitor(routed())
    tokens = logits(19, 1, E)
    ranks[0].on_logits(1, tokens[:16])
    ranks[1].on_logits(1, tokens[16:])
    alone.on_logits(1, tokens)
    got, wanted = sample(ranks, 10), sample([alone], 10)
    assert got.keys() == wanted.keys()
    for signal in got:
        assert got[signal] == {
            layer: pytest.approx(v, rel=1e-6) for layer, v in wanted[signal].items()
        }


@pytest.mark.parametrize("size", [2, 3])
def test_replicas_share_the_work(size: int) -> None:
    model = TinyModel(layers=4)
    wanted = reduced([RouterMonitor(model.view())], 10)
    shared = [RouterMonitor(model.view(Replica(rank=r, size=size))) for r in range(size)]
    own = [reduced([monitor], 10) for monitor in shared]
    for name in wanted:
        torch.testing.assert_close(sum(f[name] for f in own), wanted[name], rtol=0, atol=0)
    counts = [f["weights_count"].sum().item() for f in own]
    assert sum(counts) == 4
    assert max(counts) - min(counts) <= 1


def test_a_weight_that_is_gathered_is_read_by_all_and_counted_once() -> None:
    calls, ranks = [], []

    def gathered(rank: int, view: RouterView) -> torch.Tensor:
        calls.append((rank, view.layer))
        return view.read()

    for rank in range(3):
        view = TinyModel().view(Replica(rank=rank, size=3))
        view.routers = [
            replace(v, collective=True, read=partial(gathered, rank, v)) for v in view.routers
        ]
        ranks.append(RouterMonitor(view, collective=True))
    fields = reduced(ranks, 10)
    assert calls == [(rank, layer) for rank in range(3) for layer in (1, 2)]
    assert fields["weights_count"].tolist() == [[1], [1]]
    assert ranks[0].collective


def test_a_weight_that_no_rank_holds_is_left_out() -> None:
    view = routed()
    view.routers[0] = replace(view.routers[0], read=None)
    monitor = RouterMonitor(view)
    monitor.on_logits(1, logits(8, 2, E))
    readings = sample([monitor], 10)
    assert set(readings["router/weight_similarity"]) == {2}
    assert set(readings["router/routing_entropy"]) == {1}


def test_a_rank_without_a_router_has_the_same_fields() -> None:
    model = TinyModel()
    empty = RouterMonitor(model.view(layers=range(0)))
    assert empty.schema() == RouterMonitor(model.view()).schema()
    assert not any(f.any() for f in reduced([empty], 10).values())
    assert empty.bytes_per_layer == 0


def test_layers_may_differ_in_experts_and_rule() -> None:
    view = routed()
    view.routers[1] = replace(view.routers[1], rule=RoutingRule(score="sigmoid", top_k=1))
    monitor, other = RouterMonitor(view), RouterMonitor(routed())
    monitor.on_logits(1, logits(8, 2, E))
    monitor.on_logits(2, torch.zeros(16, 4))
    other.on_logits(1, logits(8, 2, E))
    readings, alone = sample([monitor], 10), sample([other], 10)
    for signal, layers in alone.items():
        assert readings[signal][1] == layers[1]
    assert value(readings, "routing_entropy", 2) == pytest.approx(math.log(4), rel=1e-6)
    assert value(readings, "routing_entropy_normalised", 2) == pytest.approx(1, rel=1e-6)
    assert value(readings, "load_max_violation", 2) == 3  # of four experts, not of eight
    assert value(readings, "dead_experts", 2) == 0.75


def test_a_choice_that_the_host_hands_over() -> None:
    """Load, mixing and agreement are of that choice; a margin of scores would say nothing."""
    monitor = RouterMonitor(routed(RoutingRule(top_k=1, chooses_by="host")))
    z = torch.eye(E)[[2, 2, 2, 5]].unsqueeze(1)
    where = torch.eye(E)[[2, 2, 1, 7]].bool()
    where[3] = False  # dropped
    monitor.on_logits(1, z, routing_map=where)
    readings = sample([monitor], 10)
    assert value(readings, "largest_share") == pytest.approx(2 / 3)
    assert value(readings, "bias_agreement") == pytest.approx(2 / 4)
    assert value(readings, "mixing_entropy") == 0
    assert "router/topk_margin" not in readings


@pytest.mark.parametrize(
    "rule",
    [RoutingRule(score="sigmoid"), RoutingRule(), RoutingRule(top_k=2, chooses_by="host")],
    ids=str,
)
def test_without_a_known_choice_the_rest_is_there(rule: RoutingRule) -> None:
    monitor, other = RouterMonitor(routed(rule)), RouterMonitor(routed(SOFTMAX))
    for m in (monitor, other):
        m.on_logits(1, logits(8, 2, E))
    readings = sample([monitor], 10)
    missing = set(sample([other], 10)) - set(readings)
    assert missing == {
        f"router/{name}"
        for name in (
            "mixing_entropy", "topk_margin", "topk_margin_q05", "load_max_violation",
            "effective_experts", "dead_experts", "underused_experts", "largest_share",
            "largest_share_held",
        )
    }  # fmt: skip
    z = logits(8, 2, E).double()
    p = z.sigmoid() if rule.score == "sigmoid" else z.exp()
    p = p / p.sum(-1, keepdim=True)
    wanted = torch.special.entr(p).sum(-1).mean().item()
    assert value(readings, "routing_entropy") == pytest.approx(wanted, rel=1e-6)


def test_all_experts_chosen_leave_no_margin() -> None:
    monitor = RouterMonitor(routed(RoutingRule(top_k=E)))
    monitor.on_logits(1, logits(8, 2, E))
    readings = sample([monitor], 10)
    assert "router/topk_margin" not in readings
    assert value(readings, "load_max_violation") == 0


def test_one_expert_has_no_choice() -> None:
    """0 of 0 nats; a model with one expert must not stop the run."""
    view = TinyModel(experts=1).view()
    view.routers = [replace(v, rule=RoutingRule(top_k=1)) for v in view.routers]
    monitor = RouterMonitor(view)
    monitor.on_logits(1, logits(8, 2, 1))
    readings = sample([monitor], 10)
    assert value(readings, "routing_entropy") == 0
    assert value(readings, "largest_share") == 1
    assert math.isnan(value(readings, "routing_entropy_normalised"))
    assert math.isnan(value(readings, "routing_entropy_q50"))


def test_a_host_in_autocast_changes_nothing() -> None:
    plain, cast = RouterMonitor(routed()), RouterMonitor(routed())
    z = logits(700, 2, E)
    plain.on_logits(1, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.on_logits(1, z)
    assert sample([cast], 10) == sample([plain], 10)


def test_logits_of_a_graph_are_left_alone() -> None:
    z = logits(8, 2, E).requires_grad_()
    monitor = RouterMonitor(routed())
    monitor.on_logits(1, 2 * z)
    assert not any(f.requires_grad for f in reduced([monitor], 10).values())
    assert z.grad is None


def test_memory_of_a_layer() -> None:
    """14 sums, two times 128 counts and a load, in float64; what waits is shared by all layers."""
    monitor = RouterMonitor(routed())
    assert monitor.bytes_per_layer == 8 * (14 + 2 * 128 + E)
    assert monitor.waiting_bytes == 0
    for layer in (1, 2):
        monitor.on_logits(layer, logits(64, 2, E))
    assert 0.99 * WAITING_BYTES < monitor.waiting_bytes < 1.01 * WAITING_BYTES


@pytest.mark.parametrize("size", [1, 3000, 1 << 20])
@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_how_many_wait_changes_nothing(
    size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, a few, all: and micro-batches of unlike size between them."""
    rule, biased = RULES[name]
    bias = BIAS.clone()
    readings = []
    for waiting_bytes in (16 << 20, size):
        monkeypatch.setattr(router_sums, "WAITING_BYTES", waiting_bytes)
        monitor = RouterMonitor(routed(rule, bias=lambda: bias if biased else None))
        for i in range(12):
            bias.copy_(BIAS * (1 + i / 4))  # from step to step
            tokens = 20 if i % 4 else 31
            padding = torch.arange(tokens) > 17 if i % 3 == 0 else None
            monitor.on_logits(1 + i % 2, logits(tokens, E, seed=i), padding)
        readings.append(sample([monitor], 10))
    assert readings[0].keys() == readings[1].keys()
    for signal, layers in readings[0].items():
        assert readings[1][signal] == {
            layer: pytest.approx(v, rel=1e-6) for layer, v in layers.items()
        }
