"""Attention updates: what is compared with what, when and where."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.signals.rounding import rounding_energy, without_rounding
from mcore_monitors.signals.spectra import measures
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_spectra import spectra_from_grams
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr
from mcore_monitors.views import ModelView, Replica
from mcore_monitors.windows import Grid

from .models import ALONE, TinyModel, reduced, sample

RANK = "attention/delta2_effective_rank"


def course(model: TinyModel, monitors: list[AttentionUpdateMonitor], iterations: range) -> dict:
    """Train one step an iteration in ``iterations`` and sample each; iteration -> readings."""
    readings = {}
    for iteration in iterations:
        model.train()
        readings[iteration] = sample(monitors, iteration)
    return readings


def expected(old: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...]) -> dict[str, list]:
    """Every signal of a layer, through the QR route on the full weights."""
    spectra = update_spectra_qr(*old, *new)
    matrices = dict(zip(("delta2", "delta3", "query_update", "key_update"), spectra, strict=True))
    return {
        f"attention/{matrix}_{name}": values.tolist()
        for matrix, squared in matrices.items()
        for name, values in measures(squared)._asdict().items()
    }


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
        wanted = expected(old[10][layer], old[30][layer])
        assert readings.keys() >= {f"{name}@20" for name in wanted}
        for name, values in wanted.items():
            assert readings[f"{name}@20"][layer] == pytest.approx(values, rel=1e-9), name
            assert len(values) == (groups if "key_update" in name else 4)


def test_first_reading_is_one_window_after_the_first_sample() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [30, 50], interval=10)
    readings = course(model, [monitor], range(10, 210, 10))
    first = {name: min(i for i in readings if name in readings[i]) for name in readings[200]}
    past = {name: first.pop(name) for name in list(first) if "overlap" in name or "spike@" in name}
    assert {first[name] for name in first if name.endswith("@30")} == {40}
    assert {first[name] for name in first if name.endswith("@50")} == {60}
    assert past == {name: 200 for name in past} and len(past) == 4  # 100 and 200 share no step
    assert all(f"{RANK}@30" in readings[i] for i in range(40, 210, 10))


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


def test_snapshots_of_bfloat16_weights_lose_nothing() -> None:
    model = TinyModel(dtype=torch.bfloat16)
    monitor = AttentionUpdateMonitor(model.view(), [10], interval=10)
    old = model.copy(1)
    sample([monitor], 10)
    assert monitor.snapshot_bytes == sum(w.nbytes for w in (*model.query, *model.key))
    model.train()
    readings = sample([monitor], 20)
    # what rounding alone adds is taken off
    new = model.copy(1)
    energies = rounding_energy(old[0], new[0]), rounding_energy(old[1], new[1])
    spectra = spectra_from_grams(without_rounding(update_grams(*old, *new), *energies))
    wanted = measures(spectra.delta2).effective_rank.tolist()
    assert readings[f"{RANK}@10"][1] == pytest.approx(wanted, rel=1e-9)


def test_a_broken_head_does_not_hide_the_others() -> None:
    model = TinyModel(groups=4, heads_per_group=1)
    monitor = AttentionUpdateMonitor(model.view(), [10], interval=10)
    sample([monitor], 10)
    model.train()
    model.query[0][2, 0, 0] = math.inf
    values = sample([monitor], 20)[f"{RANK}@10"]
    assert [math.isnan(v) for v in values[1]] == [False, False, True, False]
    assert not any(math.isnan(v) for v in values[2])


def test_what_no_rule_judges_is_computed_at_some_samples_only() -> None:
    """Δ2 of the judged window at every sample, with the values that it has when all is computed."""
    model = TinyModel()
    all_of_it = AttentionUpdateMonitor(model.view(), [10, 20], interval=10)
    some = AttentionUpdateMonitor(model.view(), [10, 20], interval=10, judged=[20], every=5)
    for iteration in range(10, 110, 10):
        model.train()
        wanted, got = sample([all_of_it], iteration), sample([some], iteration)
        assert got.items() <= wanted.items()
        here = {name for name in wanted if "delta2" in name and name.endswith("@20")}
        if iteration % 50 == 0:
            assert got == wanted
        else:
            assert got.keys() == here and (here or iteration < 30)


def test_a_window_that_is_not_compared_at_a_sample_is_absent() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [10, 200], interval=10)
    readings = course(model, [monitor], range(10, 410, 10))
    assert [i for i in readings if f"{RANK}@200" in readings[i]] == [240, 280, 320, 360, 400]
    assert [i for i in readings if f"{RANK}@10" in readings[i]] == list(range(20, 410, 10))


def test_a_long_window_holds_few_snapshots() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [10, 50, 200], interval=10)
    weights = sum(w.nbytes for w in (*model.query, *model.key))
    held = []
    for iteration in range(10, 610, 10):
        sample([monitor], iteration)
        held.append(monitor.snapshot_bytes / weights)
    assert max(held) == Grid([10, 50, 200], 10).most_snapshots() == 9


def test_a_resumed_run_compares_at_the_same_iterations() -> None:
    """Absolute iterations: started again at 250, the grid of window 200 is still 40, 80, …"""
    whole, model = {}, TinyModel(layers=1)
    monitor = AttentionUpdateMonitor(model.view(), [200], interval=10)
    resumed = AttentionUpdateMonitor(model.view(), [200], interval=10)
    for iteration in range(10, 810, 10):
        model.train()
        whole[iteration] = sample([monitor], iteration)
        if iteration <= 250:
            continue
        again = sample([resumed], iteration)
        if iteration >= 800:  # now the direction of one window before is there too
            assert again == whole[iteration] and len(again) > 20
        elif iteration >= 480:
            assert again.get(f"{RANK}@200") == whole[iteration].get(f"{RANK}@200")
    assert [i for i in whole if whole[i] and i > 500] == list(range(520, 810, 40))


def test_a_restart_forgets_the_past() -> None:
    model = TinyModel()
    monitor = AttentionUpdateMonitor(model.view(), [20], interval=10)
    assert course(model, [monitor], range(10, 50, 10))[40]
    monitor.restart()
    assert monitor.snapshot_bytes == 0
    readings = course(model, [monitor], range(30, 70, 10))
    assert [i for i in readings if readings[i]] == [50, 60]


def latent(model: TinyModel, rope: TinyModel, replica: Replica = ALONE) -> ModelView:
    """A model with two views a layer, of other shapes: per-head keys, and one key for all heads."""
    view = model.view(replica)
    view.attention = [replace(v, part="nope") for v in view.attention]
    view.attention += [
        replace(v, part="rope", first_head=0) for v in rope.view(replica).attention
    ]
    return view


def test_parts_of_a_head_are_apart() -> None:
    model = TinyModel(groups=4, heads_per_group=1, head_dim=6)
    rope = TinyModel(groups=1, heads_per_group=4, head_dim=4)
    parts = ("nope", "rope")
    alone = AttentionUpdateMonitor(latent(model, rope), [10], 10, parts=parts)
    shared = [
        AttentionUpdateMonitor(latent(model, rope, Replica(rank=r, size=3)), [10], 10, parts=parts)
        for r in range(3)
    ]
    old = model.copy(2), rope.copy(2)
    for iteration in (10, 20):
        readings = alone.read(reduced([alone], iteration))
        got = shared[0].read(reduced(shared, iteration))
        if iteration == 10:
            model.train()
            rope.train()
    for part, before, after in zip(parts, old, (model.copy(2), rope.copy(2)), strict=True):
        for name, values in expected(before, after).items():
            found = readings[f"{name}/{part}@10"][2]
            assert found[: len(values)] == pytest.approx(values, rel=1e-9)
            assert all(math.isnan(v) for v in found[len(values) :])  # there is one rotary key only
            assert got[f"{name}/{part}@10"][2] == pytest.approx(found, rel=1e-12, nan_ok=True)


def test_layers_of_other_shapes_stand_side_by_side() -> None:
    wide, narrow = TinyModel(layers=2, hidden=24), TinyModel(layers=2, head_dim=3)
    view = wide.view()
    view.attention[1] = narrow.view().attention[1]
    monitor = AttentionUpdateMonitor(view, [10], 10)
    sample([monitor], 10)
    old = wide.copy(1), narrow.copy(2)
    wide.train()
    narrow.train()
    readings = sample([monitor], 20)
    for layer, before, after in zip((1, 2), old, (wide.copy(1), narrow.copy(2)), strict=True):
        for name, values in expected(before, after).items():
            assert readings[f"{name}@10"][layer] == pytest.approx(values, rel=1e-9), name


def test_an_update_that_goes_on_in_one_direction_persists() -> None:
    """One head is pushed the same way at every step, on top of the noise that all heads have."""
    generator = torch.Generator().manual_seed(0)
    model = TinyModel(layers=1, groups=4, heads_per_group=1, head_dim=8, hidden=64)
    push = torch.outer(torch.randn(8, generator=generator), torch.randn(64, generator=generator))
    monitor = AttentionUpdateMonitor(model.view(), [50], interval=10)
    streaks = []
    for iteration in range(1, 401):
        model.train()
        model.query[0][2] += 0.01 * push / push.norm() * math.sqrt(8 * 64) * 0.4
        if iteration % 10 == 0:
            readings = sample([monitor], iteration)
            if "attention/persistent_spike@50" in readings:
                assert iteration % 100 == 0
                streaks.append(readings["attention/persistent_spike@50"][1])
                overlap = readings["attention/delta2_direction_overlap@50"][1]
                assert overlap[2] > 0.8 and max(overlap[:2] + overlap[3:]) < 0.8
                outliers = readings["attention/query_update_outliers@50"][1]
                assert outliers[2] >= 1
                assert readings["attention/query_update_spike_strength@50"][1][2] > 1
    assert [s[2] for s in streaks] == [1, 2, 3]
    assert not any(s[i] for s in streaks for i in (0, 1, 3))
