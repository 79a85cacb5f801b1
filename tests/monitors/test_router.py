"""Router monitor: weights once a layer, entropy over every token of the sampled step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.signals.router import (
    centred_conditioning,
    routing_entropy_sums,
    weight_similarity,
)
from mcore_monitors.views import Replica

from .models import TinyModel, reduced, sample


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights() -> None:
    model = TinyModel()
    readings = sample([RouterMonitor(model.view())], 10)
    for layer in (1, 2):
        weight = model.router[layer - 1]
        assert readings["router/weight_similarity"][layer] == [weight_similarity(weight).item()]
        assert readings["router/centred_conditioning"][layer] == [
            centred_conditioning(weight).item()
        ]
    assert "router/routing_entropy" not in readings  # no token has passed


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_entropy_is_the_mean_over_tokens_of_all_micro_batches(score: str) -> None:
    model = TinyModel()
    view = model.view()
    view.router_score = score
    monitor = RouterMonitor(view)
    first, second = logits(8, 2, 4), logits(3, 1, 4, seed=1)  # 16 and 3 tokens
    monitor.on_logits(1, first)
    monitor.on_logits(1, second)
    readings = sample([monitor], 10)
    tokens = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    total, count = routing_entropy_sums(tokens, score=score)
    wanted = (total / count).item()
    assert readings["router/routing_entropy"] == {1: [pytest.approx(wanted, rel=1e-6)]}
    assert readings["router/routing_entropy_normalised"] == {
        1: [pytest.approx(wanted / math.log(4), rel=1e-6)]
    }


def test_padded_tokens_do_not_count() -> None:
    monitor = RouterMonitor(TinyModel().view())
    tokens = logits(8, 2, 4)
    padding = torch.zeros(8, 2, dtype=torch.bool)
    padding[5:, 1] = True
    broken = tokens.clone()
    broken[padding] = math.nan
    monitor.on_logits(1, broken, padding)
    total, count = routing_entropy_sums(tokens[~padding])
    assert count == 13
    readings = sample([monitor], 10)
    assert readings["router/routing_entropy"] == {1: [pytest.approx((total / count).item())]}


def test_every_sample_starts_from_zero() -> None:
    monitor = RouterMonitor(TinyModel().view())
    monitor.on_logits(2, logits(8, 2, 4))
    first = sample([monitor], 10)
    assert "router/routing_entropy" not in sample([monitor], 20)
    monitor.on_logits(2, logits(8, 2, 4))
    assert sample([monitor], 30) == first


def test_tokens_of_all_ranks_weigh_alike() -> None:
    """Two data-parallel ranks with unlike numbers of tokens."""
    model = TinyModel()
    ranks = [RouterMonitor(model.view(Replica(rank=r, size=2))) for r in range(2)]
    tokens = logits(19, 1, 4)
    ranks[0].on_logits(1, tokens[:16])
    ranks[1].on_logits(1, tokens[16:])
    total, count = routing_entropy_sums(tokens)
    readings = sample(ranks, 10)
    assert readings["router/routing_entropy"] == {1: [pytest.approx((total / count).item())]}


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


def test_a_weight_that_no_rank_holds_is_left_out() -> None:
    view = TinyModel().view()
    view.routers[0] = replace(view.routers[0], read=None)
    monitor = RouterMonitor(view)
    monitor.on_logits(1, logits(8, 2, 4))
    readings = sample([monitor], 10)
    assert set(readings["router/weight_similarity"]) == {2}
    assert set(readings["router/routing_entropy"]) == {1}


def test_a_rank_without_a_router_has_the_same_fields() -> None:
    model = TinyModel()
    empty = RouterMonitor(model.view(layers=range(0)))
    assert empty.schema() == RouterMonitor(model.view()).schema()
    assert not any(f.any() for f in reduced([empty], 10).values())


def test_one_expert_has_no_choice() -> None:
    """0 of 0 nats; a model with one expert must not stop the run."""
    monitor = RouterMonitor(TinyModel(experts=1).view())
    monitor.on_logits(1, logits(8, 2, 1))
    readings = sample([monitor], 10)
    assert readings["router/routing_entropy"] == {1: [0.0]}
    assert math.isnan(readings["router/routing_entropy_normalised"][1][0])
