"""Router monitor: weights once a layer, every token of training once, in whatever order."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from mcore_monitors.monitors import router_sums
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.monitors.router_sums import WAITING_BYTES
from mcore_monitors.views import Replica, RouterView, RoutingRule

from .models import TinyModel, reduced, sample
from .routed import BIAS, RULES, E, logits, routed


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
        torch.testing.assert_close(sum(f[name] for f in own), wanted[name], rtol=1e-12, atol=0)
    counts = [f["weights"][:, -1].sum().item() for f in own]
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
    assert fields["weights"][:, -1].tolist() == [1, 1]
    assert ranks[0].collective


def test_a_rank_without_a_router_has_the_same_fields() -> None:
    model = TinyModel()
    empty = RouterMonitor(model.view(layers=range(0)))
    assert empty.schema() == RouterMonitor(model.view()).schema()
    assert not any(f.any() for f in reduced([empty], 10).values())
    assert empty.bytes_per_layer == 0


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


@pytest.mark.parametrize("experts", [1, E])
def test_what_the_host_hands_over_stays_as_it_is(experts: int) -> None:
    """Also where a micro-batch is looked at at once, and is one token or one expert."""
    view = TinyModel(experts=experts).view()
    view.routers = [replace(v, rule=RoutingRule(top_k=1)) for v in view.routers]
    monitor = RouterMonitor(view, interval=10, every=2)
    for turn in (1, 2, 3):  # all is told, the entropy only, all
        given = [logits(*shape, experts, seed=turn) for shape in ((8, 2), (5, 1), (1, 1))]
        kept = [z.clone() for z in given]
        for z in given:
            monitor.on_logits(1, z)
        sample([monitor], 10 * turn)
        assert all(torch.equal(z, before) for z, before in zip(given, kept, strict=True))


def test_memory_of_a_layer() -> None:
    """13 sums, 129 counts of two kinds in two parts, a load; what waits is shared by all layers."""
    monitor = RouterMonitor(routed())
    assert monitor.bytes_per_layer == 8 * (13 + 2 * 2 * 129 + E)
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


def test_what_nothing_judges_is_told_at_every_third_sample() -> None:
    """The first one and every third after it, of the tokens since the sample before."""
    monitor = RouterMonitor(routed(), interval=10, every=3)
    always = RouterMonitor(routed(), interval=10)
    judged = {"weight_similarity", "centred_conditioning", "row_norm_spread"}
    judged |= {"routing_entropy", "routing_entropy_normalised"}
    told = []
    for turn in range(1, 8):
        for m in (monitor, always):
            m.on_logits(1, logits(30, E, seed=turn))
        got, wanted = sample([monitor], 10 * turn), sample([always], 10 * turn)
        told.append(len(got) == len(wanted))
        for signals in (got, wanted):
            signals.pop("router/largest_share_held", None)  # counts samples that have a load
        few = {f"router/{name}": wanted[f"router/{name}"] for name in judged}
        assert got == (wanted if told[-1] else few)
    assert told == [True, False, False, True, False, False, True]


def test_a_resumed_run_tells_all_at_the_same_samples() -> None:
    monitor = RouterMonitor(routed(), interval=10, every=3)
    monitor.on_logits(1, logits(30, E))
    monitor.restart()
    sizes = []
    for turn in (5, 6, 7, 8):
        monitor.on_logits(1, logits(30, E))
        sizes.append(len(sample([monitor], 10 * turn)) > 5)
    assert sizes == [False, False, True, False]
