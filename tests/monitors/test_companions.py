"""The recorded companions: attention activity and optimizer signals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.calls import AttentionCall
from mcore_monitors.monitors.attention_activity import AttentionActivityMonitor
from mcore_monitors.monitors.optimizer import NAMES, OptimizerMonitor
from mcore_monitors.parallel import Packed
from mcore_monitors.signals.attention import attention_activity
from mcore_monitors.signals.optimizer import AdamStep, StepSums, step_readings
from mcore_monitors.views import ActivityView, AdamState, ModelView, OptimizerView

from .models import sample

S, B, d = 12, 2, 4
MADE = AdamStep(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=9)


def empty(device: str = "cpu") -> ModelView:
    return ModelView(
        layers=2,
        heads=4,
        groups=2,
        experts=1,
        device=torch.device(device),
        activation_dtype=torch.float32,
        sequence_length=S,
    )


def call(seed: int, heads: slice = slice(0, 4), **more: object) -> AttentionCall:
    """A micro-batch whose tensors are those of all four heads, cut to a rank's."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(S, B, 4, d, generator=generator)[:, :, heads]
    key = torch.randn(S, B, 2, d, generator=generator)[:, :, heads.start // 2 : heads.stop // 2]
    query.requires_grad_()
    return AttentionCall(
        query=query, key=key, value=key, output=query, heads=query.shape[2],
        groups=key.shape[2], layout="sbhd", **more,
    )  # fmt: skip


def activity(first: int = 0, heads: int = 4, queries: int = 5) -> AttentionActivityMonitor:
    model = empty()
    model.activity[1] = ActivityView(first_head=first, heads=heads, scale=0.5)
    return AttentionActivityMonitor(model, queries)


def test_activity_is_a_mean_over_all_sequences() -> None:
    monitor = activity()
    sums = []
    for seed in (1, 2, 3):
        monitor.on_attention(1, call(seed))
        one = call(seed)
        sums.append(attention_activity(one.query.detach(), one.key, scale=0.5, queries=5))
    readings = sample([monitor], 10)
    expected = sum(s.max_logit for s in sums) / (3 * B), sum(s.entropy for s in sums) / (3 * B)
    assert list(readings) == ["attention/max_logit", "attention/entropy"]
    for by_layer, mean in zip(readings.values(), expected, strict=True):
        assert list(by_layer) == [1]  # nobody has the second layer
        assert by_layer[1] == pytest.approx(mean.tolist())
    assert sample([monitor], 20) == {}  # nothing is left over


def test_activity_of_heads_on_two_ranks_and_replicas_is_that_of_one() -> None:
    alone = activity()
    for seed in (1, 2):
        alone.on_attention(1, call(seed))
    ranks = [activity(first, 2) for first in (0, 2) for _ in (1, 2)]
    for number, monitor in enumerate(ranks):  # ranks of two halves of heads, each with a replica
        first = 2 * (number // 2)
        monitor.on_attention(1, call(1 + number % 2, slice(first, first + 2)))
    expected = sample([alone], 10)
    for name, by_layer in sample(ranks, 10).items():
        assert by_layer[1] == pytest.approx(expected[name][1])


def test_packed_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="packed sequences"):
        activity().on_attention(1, call(1, packed=object()))


def test_a_restart_forgets_what_was_added_up() -> None:
    monitor = activity()
    monitor.on_attention(1, call(1))
    monitor.restart()
    assert sample([monitor], 10) == {}


def state(seed: int, size: int = 30) -> AdamState:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient, m, v = torch.randn(4, size, generator=generator)
    return AdamState(weight=weight, gradient=gradient, m=m, v=v.square(), made=MADE)


def optimizer(layers: dict[int, list[int]], every: int = 1) -> OptimizerMonitor:
    """A monitor of states by their seeds, layer by layer."""
    model = empty()
    model.optimizer = [
        OptimizerView(layer=layer, read=lambda s=seed: state(s))
        for layer, seeds in layers.items()
        for seed in seeds
    ]
    return OptimizerMonitor(model, 10, every)


def test_optimizer_signals_are_of_all_parameters_of_a_layer() -> None:
    whole = optimizer({1: [1, 2, 3], 2: [4]})
    readings = sample([whole], 10)
    assert tuple(readings) == NAMES
    states = [state(s) for s in (1, 2, 3)]
    total = StepSums(torch.device("cpu"))
    for s in states:
        total.add(0, s.weight, s.gradient, s.m, s.v, s.made)
    sums = total.result(1)[0]
    for name, value in zip(NAMES, step_readings(sums), strict=True):
        assert readings[name][1] == pytest.approx([value.item()])
        assert list(readings[name]) == [1, 2]
    parts = sample([optimizer({1: [1, 3]}), optimizer({1: [2], 2: [4]})], 10)
    for name, by_layer in parts.items():
        assert by_layer == {k: pytest.approx(v) for k, v in readings[name].items()}


def test_layers_take_turns() -> None:
    monitor = optimizer({1: [1], 2: [2]}, every=2)
    seen = [list(sample([monitor], i)[NAMES[0]]) for i in (10, 20, 30, 40)]
    assert seen == [[1], [2], [1], [2]]


def test_before_the_first_step_there_is_nothing() -> None:
    model = empty()
    model.optimizer = [OptimizerView(layer=1, read=lambda: None)]
    assert sample([OptimizerMonitor(model, 10, 1)], 10) == {}


def test_nothing_waits_for_the_card() -> None:
    with FakeTensorMode():
        cuda = torch.device("cuda")
        model = empty("cuda")
        model.activity[1] = ActivityView(first_head=0, heads=4, scale=0.5)
        tensors = torch.empty(4, 30, device=cuda).unbind(0)
        model.optimizer = [
            OptimizerView(
                layer=2,
                read=lambda: AdamState(
                    weight=tensors[0], gradient=tensors[1], m=tensors[2], v=tensors[3], made=MADE
                ),
            )
        ]
        monitors = AttentionActivityMonitor(model, 5), OptimizerMonitor(model, 10, 1)
        query = torch.empty(S, B, 4, d, device=cuda, dtype=torch.bfloat16)
        key = torch.empty(S, B, 2, d, device=cuda, dtype=torch.bfloat16)
        monitors[0].on_attention(
            1,
            AttentionCall(
                query=query, key=key, value=key, output=query, heads=4, groups=2, layout="sbhd"
            ),
        )
        for monitor in monitors:
            packed = Packed(monitor.schema(), cuda)
            monitor.collect(10, packed.fields)
            assert all(f.device.type == "cuda" for f in packed.fields.values())
