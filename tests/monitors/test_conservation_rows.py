"""Conservation monitor on routers and the output layer."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from mcore_monitors.parallel import GroupSum, Packed

from .. import distributed
from .models import CPU, reduced, sample
from .watched import OUTPUT, ROUTER, monitor, normal


def give(hook, x: torch.Tensor, gradient: torch.Tensor) -> None:
    """Let a listener watch a tensor of a graph, and send it a gradient."""
    inner = x.clone().requires_grad_() * 1
    hook(inner)
    inner.backward(gradient)


@pytest.mark.parametrize(("name", "listener"), [(ROUTER, "on_router"), (OUTPUT, "on_output")])
def test_rows_are_pooled_over_all_tokens_of_all_micro_batches(name: str, listener: str) -> None:
    watched = monitor()
    gradients = [normal(6, 2, 8), normal(3, 1, 8, seed=1)]
    for gradient in gradients:
        give(partial(getattr(watched, listener), 2), torch.zeros_like(gradient), gradient)
    rows = torch.cat([g.flatten(0, 1) for g in gradients]).double()
    wanted = rows.sum(-1).abs().sum() / rows.abs().sum()
    readings = sample([watched], 10)
    assert readings[name] == {2: [pytest.approx(wanted.item(), rel=1e-5)]}
    assert sample([watched], 20) == {}


@pytest.mark.parametrize(("name", "listener"), [(ROUTER, "on_router"), (OUTPUT, "on_output")])
def test_a_softmax_keeps_its_shift_and_a_lost_column_does_not(name: str, listener: str) -> None:
    for lost in (False, True):
        watched = monitor()
        logits = normal(16, 8).requires_grad_()
        inner = logits * 1
        if lost:
            inner.register_hook(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], dim=-1))
        # a hook that changes the gradient comes before the one that looks
        getattr(watched, listener)(2, inner)
        (inner.softmax(-1) * normal(16, 8, seed=1)).sum().backward()
        (value,) = sample([watched], 10)[name][2]
        assert value > 0.01 if lost else value < 1e-6


def test_no_gradient_is_no_reading_and_a_broken_one_is_nan() -> None:
    watched = monitor()
    give(partial(watched.on_router, 2), torch.zeros(4, 8), torch.zeros(4, 8))
    assert ROUTER not in sample([watched], 10)
    broken = normal(4, 8)
    broken[0, 0] = math.nan
    give(partial(watched.on_router, 2), torch.zeros(4, 8), broken)
    readings = watched.read(reduced([watched], 20))
    assert math.isnan(readings[ROUTER][2][0])
    watched.on_router(2, torch.zeros(4, 8))  # frozen: nothing to hook


def _half_a_vocabulary_each(rank: int) -> dict:
    """Two tensor-parallel ranks; micro-batches need not be of one size."""
    watched = monitor(GroupSum(dist.group.WORLD))
    assert watched.collective
    packed = Packed(watched.schema(), CPU)
    for i, tokens in enumerate((6, 4)):
        shard = normal(tokens, 1, 32, seed=i)[..., 16 * rank : 16 * rank + 16]
        give(partial(watched.on_output, 2), torch.zeros_like(shard), shard)
    watched.collect(10, packed.fields)
    return watched.read(packed.reduce())


def test_a_vocabulary_over_two_ranks_equals_a_whole_one() -> None:
    alone = monitor()
    for i, tokens in enumerate((6, 4)):
        give(partial(alone.on_output, 2), torch.zeros(tokens, 1, 32), normal(tokens, 1, 32, seed=i))
    wanted = sample([alone], 10)[OUTPUT][2]
    for readings in distributed.run(2, _half_a_vocabulary_each):
        assert readings[OUTPUT][2] == pytest.approx(wanted, rel=1e-5)
