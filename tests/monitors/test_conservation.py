"""Conservation monitor on attention: all micro-batches, also of sequences spread over ranks."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mcore_monitors.calls import AttentionCall
from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, EVIDENCE
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.parallel import GroupSum, Packed

from .. import distributed
from .borders import attention, cross, cut
from .models import CPU, TinyModel, reduced, sample

KEY, VALUE, QUERY = ATTENTION_RESIDUALS
BIAS, SPREAD = EVIDENCE


def made(model: TinyModel | None = None, **view) -> ConservationMonitor:
    """One that looks at every sequence."""
    return ConservationMonitor((model or TinyModel()).view(**view), GroupSum(None), whole=True)


def defined(*micro_batches: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The definitions, sequence by sequence and group by group in float64: signal -> [G]."""
    found: dict[str, list[list[float]]] = {name: [] for name in ATTENTION_RESIDUALS}
    for parts in micro_batches:
        wide = {name: x.double() for name, x in parts.items()}
        for b in range(wide["k"].shape[1]):
            one = {name: x[:, b] for name, x in wide.items()}  # [S, heads, d]
            groups = one["k"].shape[1]
            # [S, G, heads of a group, d]
            many = {n: one[n].unflatten(1, (groups, -1)) for n in ("q", "o", "dq", "do")}
            row = (many["o"] * many["do"]).norm(dim=-1) * many["q"].norm(dim=-1)
            scale = one["dk"].norm(dim=-1).sum(0)
            scale = scale + one["k"].shape[-1] ** -0.5 * row.sum((0, 2))
            found[KEY].append((one["dk"].sum(0).norm(dim=-1) / scale).tolist())
            for name, left, right in ((VALUE, "v", "o"), (QUERY, "k", "q")):
                small = one[left] * one[f"d{left}"]
                large = many[right] * many[f"d{right}"]
                size = (small.sum((0, 2)) - large.sum((0, 2, 3))).abs()
                power = 2 if name == QUERY else 1
                scale = small.abs().pow(power).sum((0, 2)) + large.abs().pow(power).sum((0, 2, 3))
                scale = scale.sqrt() if name == QUERY else scale / 2
                found[name].append((size / scale).tolist())
    return {name: torch.tensor(values).mean(0).tolist() for name, values in found.items()}


def broken(seed: int = 0, **more) -> dict[str, torch.Tensor]:
    """A call in which no identity holds, so that each residual is a number and not round-off."""
    parts = attention(strength=0.3, seed=seed, **more)
    return parts | {"o": 0.99 * parts["o"], "dq": 1.01 * parts["dq"]}


def check(readings: dict, layer: int, wanted: dict[str, list[float]]) -> None:
    for name, values in wanted.items():
        assert readings[name][layer] == pytest.approx(values, rel=1e-4), name


def test_a_right_kernel_leaves_rounding_only() -> None:
    monitor = made()
    cross(monitor, 1, attention())
    readings = sample([monitor], 10)
    for name in ATTENTION_RESIDUALS:
        assert all(value < 1e-6 for value in readings[name][1])


def test_mean_over_the_sequences_of_all_micro_batches() -> None:
    monitor = made()
    first, second = broken(), broken(seed=1, batch=1)
    cross(monitor, 2, first)
    cross(monitor, 2, second, order=("o", "q", "k", "v"))
    readings = sample([monitor], 10)
    check(readings, 2, defined(first, second))
    assert all(set(readings[name]) == {2} for name in (*ATTENTION_RESIDUALS, *EVIDENCE))


def test_the_row_terms_fault_breaks_the_key_shift_alone() -> None:
    monitor = made()
    cross(monitor, 1, attention(strength=0.1))
    readings = sample([monitor], 10)
    assert all(value > 1e-3 for value in readings[KEY][1])
    assert all(value < 1e-6 for name in (VALUE, QUERY) for value in readings[name][1])


@pytest.mark.parametrize("layout", ["sbhd", "bhsd", "bshd"])
def test_the_order_of_dimensions_does_not_matter(layout: str) -> None:
    monitor = made()
    cross(monitor, 1, broken(), layout=layout)
    check(sample([monitor], 10), 1, defined(broken()))


def test_nor_does_where_the_channels_are_in_memory() -> None:
    """An unfused attention hands over a dK whose channels are far apart."""
    monitor, parts = made(), broken()
    apart = parts["dk"].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert apart.stride(-1) != 1
    cross(monitor, 1, parts | {"dk": apart})
    check(sample([monitor], 10), 1, defined(broken()))


def test_packed_sequences_count_as_one() -> None:
    monitor = made()
    parts = broken(batch=1, length=24)
    cross(monitor, 1, parts, layout="thd")
    check(sample([monitor], 10), 1, defined(parts))


def test_a_micro_batch_is_never_mixed_with_another() -> None:
    """Pipeline stages run several forward passes before the first backward pass."""
    monitor = made()
    parts = [broken(seed=i) for i in range(2)]
    calls = []
    for each in parts:
        tensors = {n: each[n].clone().requires_grad_() for n in ("q", "k", "v", "o")}
        inner = {n: x * 1 for n, x in tensors.items()}
        monitor.on_attention(
            1,
            AttentionCall(
                query=inner["q"], key=inner["k"], value=inner["v"], output=inner["o"],
                heads=4, groups=2, layout="sbhd",
            ),
        )  # fmt: skip
        calls.append(inner)
    for name in ("o", "v", "k", "q"):
        for inner, each in zip(calls, parts, strict=True):
            inner[name].backward(each[f"d{name}"])
    check(sample([monitor], 10), 1, defined(*parts))


def test_a_sequence_of_padding_does_not_count_and_a_broken_one_does() -> None:
    monitor = made()
    parts = broken()
    empty = {n: x.clone() for n, x in parts.items()}
    for name in ("dq", "dk", "dv", "do"):
        empty[name][:, 1] = 0
    cross(monitor, 1, empty)
    check(sample([monitor], 10), 1, defined(cut(parts, lambda x: x[:, [0, 2]])))
    parts["dk"][0, 0, 1, 0] = math.inf
    cross(monitor, 1, parts)
    readings = sample([monitor], 20)
    assert not math.isnan(readings[KEY][1][0]) and math.isnan(readings[KEY][1][1])
    assert not any(math.isnan(value) for value in readings[VALUE][1])


def test_every_sample_starts_from_zero() -> None:
    monitor = made()
    cross(monitor, 1, broken())
    first = sample([monitor], 10)
    assert sample([monitor], 20) == {}
    cross(monitor, 1, broken())
    second = sample([monitor], 30)
    assert {n: second[n] for n in ATTENTION_RESIDUALS} == {
        n: first[n] for n in ATTENTION_RESIDUALS
    }


def test_a_restart_forgets() -> None:
    monitor = made()
    cross(monitor, 1, broken())
    monitor.restart()
    assert sample([monitor], 10) == {}


def test_only_the_residuals_that_hold_are_watched() -> None:
    view = TinyModel().view(layers=range(0))
    view.conserves_attention(2, 0, 2, but=(KEY,))
    monitor = ConservationMonitor(view, GroupSum(None), whole=True)
    cross(monitor, 2, broken())
    readings = sample([monitor], 10)
    assert KEY not in readings
    assert set(readings[VALUE]) == set(readings[QUERY]) == {2}


def test_a_changed_copy_of_a_view_leaves_the_residuals_of_both() -> None:
    model = TinyModel().view()
    model.conserves_attention(1, 0, 2)
    before = {name: dict(residual.places) for name, residual in model.conserved.items()}
    copy = replace(model, attention=[])
    for view in (model, copy):
        assert {name: residual.places for name, residual in view.conserved.items()} == before
    assert copy.conserved is not model.conserved


def test_a_frozen_input_leaves_its_residuals_out() -> None:
    """Without dQ there is no query–key residual; the others are complete."""
    monitor = made()
    parts = broken()
    cross(monitor, 1, parts, order=("o", "v", "k"))
    readings = sample([monitor], 10)
    assert QUERY not in readings
    check(readings, 1, {n: v for n, v in defined(parts).items() if n != QUERY})


def test_nothing_is_kept_alive() -> None:
    """Neither after the backward pass nor where it never comes."""
    monitor = made()
    gc.disable()  # what only a cycle keeps would stay
    try:
        for backward in (True, False):
            parts = {n: torch.randn(4, 1, 2, 4, requires_grad=True) * 1 for n in "qkvo"}
            seen = [weakref.ref(x.untyped_storage()) for x in parts.values()]
            total = sum((x * x).sum() for x in parts.values())
            monitor.on_attention(
                1,
                AttentionCall(
                    query=parts["q"], key=parts["k"], value=parts["v"], output=parts["o"],
                    heads=2, groups=2, layout="sbhd",
                ),
            )  # fmt: skip
            if backward:
                total.backward()
            del parts, total
            assert [ref() for ref in seen] == [None] * 4
    finally:
        gc.enable()


def test_ranks_add_up() -> None:
    """Tensor parallelism shares out the groups, data parallelism the sequences."""
    model = TinyModel()
    parts = broken(batch=4)
    alone = made(model)
    cross(alone, 1, parts)
    wanted = reduced([alone], 10)
    ranks = []
    for group in range(2):
        for sequences in (slice(0, 1), slice(1, 4)):

            def pick(x: torch.Tensor, group=group, sequences=sequences) -> torch.Tensor:
                return x[:, sequences].unflatten(2, (2, -1))[:, :, group]

            rank = made(model, groups=range(group, group + 1))
            cross(rank, 1, cut(parts, pick))
            ranks.append(rank)
    got = reduced(ranks, 10)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert alone.sums_of(KEY, got)[1, 0].tolist() == [4, 4]


def test_a_rank_without_attention_has_the_same_fields() -> None:
    empty = made(layers=range(0))
    assert empty.schema() == made().schema()
    assert not any(f.any() for f in reduced([empty], 10).values())


#: layer -> micro-batches; the layers have unlike numbers of them, and of sequences in them
SEQUENCES = {1: [3, 1], 2: [2]}


def _micro_batches(layer: int) -> list[dict[str, torch.Tensor]]:
    return [broken(seed=10 * layer + i, batch=n) for i, n in enumerate(SEQUENCES[layer])]


def _half_a_sequence_each(rank: int) -> list[dict]:
    """Two context-parallel ranks; the order of their backward passes doesn't matter."""
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(dist.group.WORLD), whole=True)
    packed = Packed(monitor.schema(), CPU)
    readings = []
    for iteration in (10, 20):
        for layer in (2, 1) if rank else (1, 2):
            for parts in _micro_batches(layer):
                cross(monitor, layer, cut(parts, lambda x: x[4 * rank : 4 * rank + 4]))
        monitor.collect(iteration, packed.fields)
        readings.append(monitor.read(packed.reduce()))
    return readings


def test_context_parallel_equals_unsharded() -> None:
    alone = made()
    for layer in SEQUENCES:
        for parts in _micro_batches(layer):
            cross(alone, layer, parts)
    wanted = sample([alone], 10)
    for readings in distributed.run(2, _half_a_sequence_each):
        for name in ATTENTION_RESIDUALS:
            assert readings[0][name] == readings[1][name]  # nothing is left over
            assert readings[0][name].keys() == wanted[name].keys()
            for layer, values in wanted[name].items():
                assert readings[0][name][layer] == pytest.approx(values, rel=1e-4)
                # a norm of each half by itself would be another number
                halves = [
                    cut(parts, lambda x, h=h: x[4 * h : 4 * h + 4])
                    for parts in _micro_batches(layer)
                    for h in (0, 1)
                ]
                assert values != pytest.approx(defined(*halves)[name], rel=0.05)
