"""Conservation monitor: dK of every micro-batch, also where a sequence is spread over ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.parallel import GroupSum, Packed
from mcore_monitors.signals.conservation import key_shift_from_terms, key_shift_terms

from .. import distributed
from .models import CPU, TinyModel, reduced, sample

SHIFT = "attention/key_shift"


def gradient(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def residual(*micro_batches: torch.Tensor) -> list[float]:
    """The definition, sequence by sequence in float64: [G]."""
    ratios = []
    for dk in micro_batches:
        dk = dk.double()
        ratios += [one.sum(0).norm(dim=-1) / one.norm(dim=-1).sum(0) for one in dk.unbind(1)]
    return torch.stack(ratios).mean(0).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_over_the_sequences_of_all_micro_batches(dtype: torch.dtype) -> None:
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None))
    first, second = gradient(8, 3, 2, 4, dtype=dtype), gradient(8, 1, 2, 4, seed=1, dtype=dtype)
    monitor.on_key_gradient(2, first)
    monitor.on_key_gradient(2, second)
    readings = sample([monitor], 10)
    assert readings == {SHIFT: {2: pytest.approx(residual(first, second), rel=1e-5)}}


def test_value_is_that_of_the_formula() -> None:
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None))
    dk = gradient(8, 3, 2, 4)
    monitor.on_key_gradient(1, dk)
    total, count = key_shift_from_terms(*key_shift_terms(dk))
    assert sample([monitor], 10)[SHIFT][1] == pytest.approx((total / count).tolist(), rel=1e-6)


def test_packed_sequences_count_as_one() -> None:
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None))
    dk = gradient(24, 2, 4)
    monitor.on_key_gradient(1, dk)
    assert sample([monitor], 10)[SHIFT][1] == pytest.approx(residual(dk.unsqueeze(1)), rel=1e-5)


def test_a_sequence_of_padding_does_not_count_and_a_broken_one_does() -> None:
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None))
    dk = gradient(8, 3, 2, 4)
    empty = dk.clone()
    empty[:, 1] = 0
    monitor.on_key_gradient(1, empty)
    wanted = residual(dk[:, [0, 2]])
    assert sample([monitor], 10)[SHIFT][1] == pytest.approx(wanted, rel=1e-5)
    dk[0, 0, 1, 0] = math.inf
    monitor.on_key_gradient(1, dk)
    values = sample([monitor], 20)[SHIFT][1]
    assert not math.isnan(values[0]) and math.isnan(values[1])


def test_every_sample_starts_from_zero() -> None:
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None))
    monitor.on_key_gradient(1, gradient(8, 3, 2, 4))
    first = sample([monitor], 10)
    assert sample([monitor], 20) == {}
    monitor.on_key_gradient(1, gradient(8, 3, 2, 4))
    assert sample([monitor], 30) == first


def test_ranks_add_up() -> None:
    """Tensor parallelism shares out the groups, data parallelism the sequences."""
    model = TinyModel()
    dk = gradient(8, 4, 2, 4)
    alone = ConservationMonitor(model.view(), GroupSum(None))
    alone.on_key_gradient(1, dk)
    wanted = reduced([alone], 10)
    ranks = []
    for group in range(2):
        for sequences in (slice(0, 1), slice(1, 4)):
            rank = ConservationMonitor(model.view(groups=range(group, group + 1)), GroupSum(None))
            rank.on_key_gradient(1, dk[:, sequences, group : group + 1])
            ranks.append(rank)
    got = reduced(ranks, 10)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
    assert got["key_shift_count"][0].tolist() == [4, 4]


def test_a_rank_without_attention_has_the_same_fields() -> None:
    model = TinyModel()
    empty = ConservationMonitor(model.view(layers=range(0)), GroupSum(None))
    assert empty.schema() == ConservationMonitor(model.view(), GroupSum(None)).schema()
    assert not any(f.any() for f in reduced([empty], 10).values())


#: layer -> micro-batches of [S, B, G, d]; the layers have unlike numbers of them
SEQUENCES = {1: [(8, 3, 2, 4), (8, 1, 2, 4)], 2: [(8, 2, 2, 4)]}


def _micro_batches(layer: int) -> list[torch.Tensor]:
    return [gradient(*shape, seed=10 * layer + i) for i, shape in enumerate(SEQUENCES[layer])]


def _half_a_sequence_each(rank: int) -> list[dict]:
    """Two context-parallel ranks; the order of their backward passes doesn't matter."""
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(dist.group.WORLD))
    packed = Packed(monitor.schema(), CPU)
    readings = []
    for iteration in (10, 20):
        for layer in (2, 1) if rank else (1, 2):
            for dk in _micro_batches(layer):
                monitor.on_key_gradient(layer, dk[4 * rank : 4 * rank + 4])
        monitor.collect(iteration, packed.fields)
        readings.append(monitor.read(packed.reduce()))
    return readings


def test_context_parallel_equals_unsharded() -> None:
    alone = ConservationMonitor(TinyModel().view(), GroupSum(None))
    for layer in SEQUENCES:
        for dk in _micro_batches(layer):
            alone.on_key_gradient(layer, dk)
    wanted = sample([alone], 10)[SHIFT]
    for readings in distributed.run(2, _half_a_sequence_each):
        assert readings[0] == readings[1]  # nothing is left over from the first sample
        assert readings[0][SHIFT].keys() == wanted.keys()
        for layer, values in wanted.items():
            assert readings[0][SHIFT][layer] == pytest.approx(values, rel=1e-5)
            # a norm of each half by itself would be another number
            halves = [dk[half] for dk in _micro_batches(layer) for half in (slice(4), slice(4, 8))]
            assert values != pytest.approx(residual(*halves), rel=0.05)
