"""Router monitor: every signal against loops over tokens, and what a rule or a host leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mcore_monitors.catalogue import SIGNALS
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.signals.router import (
    centred_conditioning,
    row_norm_spread,
    weight_similarity,
)
from mcore_monitors.views import RoutingRule

from .models import TinyModel, sample
from .routed import BIAS, RULES, SOFTMAX, E, logits, routed, value

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
        for signal in (weight_similarity, centred_conditioning, row_norm_spread):
            wanted = pytest.approx(signal(weight).item(), rel=1e-12)
            assert value(readings, signal.__name__, layer) == wanted
    assert len(readings) == 3  # no token has passed


def test_how_long_one_expert_has_the_most() -> None:
    """Experts 3, 3, a tie of 3 and 0, 5, nothing, 5."""
    monitor = RouterMonitor(routed(RoutingRule(top_k=1)))
    held = []
    for experts in ([3, 3, 1], [3, 3, 2], [3, 0], [5], [], [5]):
        if experts:
            monitor.on_logits(1, 9 * torch.eye(E)[experts])
        held.append(sample([monitor], 10).get("router/largest_share_held"))
    assert held == [{1: [1]}, {1: [2]}, {1: [3]}, {1: [1]}, None, {1: [2]}]


def test_a_weight_that_no_rank_holds_is_left_out() -> None:
    view = routed()
    view.routers[0] = replace(view.routers[0], read=None)
    monitor = RouterMonitor(view)
    monitor.on_logits(1, logits(8, 2, E))
    readings = sample([monitor], 10)
    assert set(readings["router/weight_similarity"]) == {2}
    assert set(readings["router/routing_entropy"]) == {1}


def test_layers_may_differ_in_experts_and_rule() -> None:
    view = routed()
    view.routers[1] = replace(view.routers[1], rule=RoutingRule(score="sigmoid", top_k=1))
    monitor, other = RouterMonitor(view), RouterMonitor(routed())
    monitor.on_logits(1, logits(8, 2, E))
    monitor.on_logits(2, 1e-6 * torch.eye(4)[[1]].expand(16, 4))
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


def test_experts_that_tie_share_the_last_place() -> None:
    """Of three alike for one place each has a third, whatever the order."""
    monitor = RouterMonitor(routed())
    z = torch.tensor([[4.0, 1, 1, 1, 0, 0, 0, 0]])
    for order in (list(range(E)), list(reversed(range(E)))):
        monitor.on_logits(1, z[:, order].expand(15, E))
    readings = sample([monitor], 10)
    assert value(readings, "largest_share") == pytest.approx(15 / 60)
    assert value(readings, "dead_experts") == 0
    shares = [15, 5, 5, 5, 5, 5, 5, 15]
    entropy = -sum(s / 60 * math.log(s / 60) for s in shares)
    assert value(readings, "effective_experts") == pytest.approx(math.exp(entropy), rel=1e-6)
    assert value(readings, "topk_margin") == 0


def test_broken_logits_are_no_healthy_reading() -> None:
    monitor = RouterMonitor(routed())
    z = logits(40, E)
    z[7, 3] = math.nan
    monitor.on_logits(1, z)
    readings = sample([monitor], 10)
    for name in ("routing_entropy", "z", "topk_margin", "mixing_entropy"):
        assert math.isnan(value(readings, name)), name
    assert 0 < value(readings, "routing_entropy_q50") < math.log(E)  # the other tokens have one
