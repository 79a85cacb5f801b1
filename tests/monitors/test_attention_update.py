"""Attention updates: what is compared with what, when, where, and by which rank."""

from __future__ import annotations

import math

import pytest
import torch

from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.signals.spectra import delta2_effective_rank
from mcore_monitors.views import Replica

from .models import TinyModel, reduced, sample

RANK = "attention/delta2_effective_rank"


def course(model: TinyModel, monitors: list[AttentionUpdateMonitor], iterations: range) -> dict:
    """Train one step an iteration in ``iterations`` and sample each; iteration -> readings."""
    readings = {}
    for iteration in iterations:
        model.train()
        readings[iteration] = sample(monitors, iteration)
    return readings


@pytest.mark.parametrize(("groups", "heads_per_group"), [(4, 1), (2, 2), (1, 4)])
def test_values(groups: int, heads_per_group: int) -> None:
    model = TinyModel(groups=groups, heads_per_group=heads_per_group)
    monitor = AttentionUpdateMonitor(model.view(), [20], interval=10)
    old = {}
    for iteration in (10, 20, 30):
        model.train()
        old[iteration] = {layer: model.copy(layer) for layer in (1, 2)}
        readings = sample([monitor], iteration)
    for layer in (1, 2):
        wanted = delta2_effective_rank(*old[10][layer], *old[30][layer])
        assert readings[f"{RANK}@20"][layer] == pytest.approx(wanted.tolist(), rel=1e-12)
        assert len(readings[f"{RANK}@20"][layer]) == 4


def test_first_reading_is_one_window_after_the_first_sample() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [30, 50], interval=10)
    readings = course(model, [monitor], range(10, 110, 10))
    first = {name: min(i for i in readings if name in readings[i]) for name in readings[100]}
    assert first == {f"{RANK}@30": 40, f"{RANK}@50": 60}
    assert all(f"{RANK}@30" in readings[i] for i in range(40, 110, 10))


def test_a_resumed_run_goes_on_one_window_after_the_resume() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [30], interval=10)
    readings = course(model, [monitor], range(770, 830, 10))
    assert [i for i in readings if readings[i]] == [800, 810, 820]


def test_a_sample_that_the_host_passed_over_leaves_one_gap() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [20], interval=10)
    readings = course(model, [monitor], range(10, 50, 10))
    readings |= course(model, [monitor], range(60, 100, 10))  # 50 never came
    assert [i for i in readings if readings[i]] == [30, 40, 60, 80, 90]


def test_windows_do_not_disturb_each_other() -> None:
    alone = {}
    for window in (20, 40):
        model = TinyModel()
        monitor = AttentionUpdateMonitor(model.view(), [window], interval=10)
        alone |= course(model, [monitor], range(10, 90, 10))[80]
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [40, 20], interval=10)
    both = course(model, [monitor], range(10, 90, 10))[80]
    assert both == alone
    assert both[f"{RANK}@20"] != both[f"{RANK}@40"]


def test_memory_is_bounded_by_the_longest_window() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [20, 50], interval=10)
    assert monitor.snapshot_bytes == 0
    weights = sum(w.nbytes for w in (*model.query, *model.key))
    held = []
    for iteration in range(10, 210, 10):
        sample([monitor], iteration)
        held.append(monitor.snapshot_bytes / weights)
    assert held == [1, 2, 3, 4] + [5] * 16


def test_a_snapshot_does_not_follow_the_live_weights() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [10], interval=10)
    sample([monitor], 10)
    readings = sample([monitor], 20)  # nothing has moved
    assert all(math.isnan(v) for v in readings[f"{RANK}@10"][1])
    model.train()
    readings = sample([monitor], 30)
    assert all(v > 1 for v in readings[f"{RANK}@10"][1])


def test_snapshots_of_bfloat16_weights_are_float32() -> None:
    model = TinyModel(dtype=torch.bfloat16)
    monitor = AttentionUpdateMonitor(model.view(), [10], interval=10)
    old = model.copy(1)
    sample([monitor], 10)
    assert monitor.snapshot_bytes == 2 * sum(w.nbytes for w in (*model.query, *model.key))
    model.train()
    readings = sample([monitor], 20)
    wanted = delta2_effective_rank(*old, *model.copy(1))
    assert readings[f"{RANK}@10"][1] == pytest.approx(wanted.tolist(), rel=1e-12)


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
    assert got["count@20"].eq(1).all()  # every head once, none twice
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
    assert got["count@10"].eq(1).all()


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


def test_a_broken_head_does_not_hide_the_others() -> None:
    model = TinyModel(groups=4, heads_per_group=1)
    monitor = AttentionUpdateMonitor(model.view(), [10], interval=10)
    sample([monitor], 10)
    model.train()
    model.query[0][2, 0, 0] = math.inf
    values = sample([monitor], 20)[f"{RANK}@10"]
    assert [math.isnan(v) for v in values[1]] == [False, False, True, False]
    assert not any(math.isnan(v) for v in values[2])
