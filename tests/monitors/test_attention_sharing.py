"""Attention updates over several ranks: who computes what, each head once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.views import AttentionView, Replica

from .models import TinyModel, reduced, sample

RANK = "attention/delta2_effective_rank"


@pytest.mark.parametrize("size", [2, 3, 5])
def test_replicas_share_the_work(size: int) -> None:
    model = TinyModel(layers=3)
    alone = AttentionUpdateMonitor(model.view(), [20], interval=10)
    shared = [
        AttentionUpdateMonitor(model.view(Replica(rank=r, size=size)), [20], interval=10)
        for r in range(size)
    ]
    for iteration in (10, 20, 30):
        model.train()
        wanted = reduced([alone], iteration)
        got = reduced(shared, iteration)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=0)
    assert got["heads/"][..., 0].eq(1).all()  # every head once, none twice
    assert got["groups/"][..., 0].eq(1).all()
    # six groups in all: so many shares, as even as they can be
    piece = alone.snapshot_bytes / 6
    shares = [m.snapshot_bytes / piece for m in shared]
    assert sum(shares) == 6
    assert max(shares) - min(shares) <= 1


def test_shards_fall_into_their_places() -> None:
    """Two tensor-parallel ranks on each of two pipeline stages."""
    model = TinyModel(layers=4)
    alone = AttentionUpdateMonitor(model.view(), [10], interval=10)
    shards = [
        AttentionUpdateMonitor(model.view(layers=layers, groups=groups), [10], interval=10)
        for layers in (range(1, 3), range(3, 5))
        for groups in (range(1), range(1, 2))
    ]
    for iteration in (10, 20):
        model.train()
        wanted, got = reduced([alone], iteration), reduced(shards, iteration)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-12, atol=0)
    assert got["heads/"][..., 0].eq(1).all()


def test_a_rank_without_attention_adds_nothing_and_has_the_same_fields() -> None:
    model = TinyModel()
    full = AttentionUpdateMonitor(model.view(), [10], interval=10)
    empty = AttentionUpdateMonitor(model.view(layers=range(0)), [10], interval=10)
    assert empty.schema() == full.schema()
    for iteration in (10, 20):
        fields = reduced([empty], iteration)
    assert not any(f.any() for f in fields.values())
    assert empty.snapshot_bytes == 0
    assert empty.read(fields) == {}


def test_a_key_that_two_tensor_ranks_hold_counts_once() -> None:
    """More tensor-parallel ranks than groups: each has two of the group's four heads."""
    model = TinyModel(groups=1, heads_per_group=4)
    alone = AttentionUpdateMonitor(model.view(), [10], 10)
    halves = []
    for first in (0, 2):
        view = model.view()
        for i, whole in enumerate(view.attention):
            view.attention[i] = replace(
                whole,
                heads_per_group=2,
                first_head=first,
                read=lambda read=whole.read, first=first: (read()[0][first : first + 2], read()[1]),
            )
        halves.append(AttentionUpdateMonitor(view, [10], 10))
    for iteration in (10, 20):
        wanted = sample([alone], iteration)
        got = sample(halves, iteration)
        model.train()
    assert got == wanted and wanted


def test_a_collective_read_is_joined_by_ranks_that_own_nothing() -> None:
    """All ranks read all views in the same order, also where the share of one is empty."""
    model, order = TinyModel(layers=3, groups=1), {0: [], 1: []}

    def watched(view: AttentionView, rank: int) -> AttentionView:
        def read():
            order[rank].append(view.layer)
            return view.read()

        return replace(view, read=read, collective=True)

    ranks = []
    for rank in (0, 1):
        view = model.view(Replica(rank=rank, size=2))
        view.attention = [watched(v, rank) for v in view.attention]
        ranks.append(AttentionUpdateMonitor(view, [10], 10, collective=True))
    for iteration in (10, 20):
        got = sample(ranks, iteration)
        model.train()
    assert order[0] == order[1] == [1, 2, 3, 1, 2, 3]
    assert ranks[0].collective
    assert sorted(got[f"{RANK}@10"]) == [1, 2, 3]
    # layers 1 and 2 are rank 0's
    assert ranks[0].snapshot_bytes == 2 * ranks[1].snapshot_bytes


@pytest.mark.parametrize("size", [3, 4, 7])
def test_heads_of_one_key_are_shared_where_there_are_more_ranks_than_groups(size: int) -> None:
    model = TinyModel(layers=2, groups=1, heads_per_group=4)
    alone = AttentionUpdateMonitor(model.view(), [10], 10)
    ranks = [
        AttentionUpdateMonitor(model.view(Replica(rank=r, size=size)), [10], 10)
        for r in range(size)
    ]
    for iteration in (10, 20):
        wanted, fields = sample([alone], iteration), reduced(ranks, iteration)
        model.train()
    assert fields["heads/"][..., 0].eq(1).all()  # every head once, none twice
    got = ranks[0].read(fields)
    for name, layers in wanted.items():
        for layer, values in layers.items():
            assert got[name][layer] == pytest.approx(values, rel=1e-9), name
    shares = [rank.snapshot_bytes for rank in ranks]
    assert max(shares) <= 0.6 * alone.snapshot_bytes
