"""On fake CUDA tensors: no hook and no sample reads a value back or mixes devices.

PyTorch's fake tensors know device and shape but hold no values, so ``.item()`` raises, and so does
adding a tensor on the card to one on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.calls import AttentionCall, NormCall
from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.monitors.base import Monitor
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.parallel import GroupSum, Packed
from mcore_monitors.views import (
    AttentionView,
    Conserved,
    ModelView,
    Replica,
    RouterView,
    RoutingRule,
)

CUDA = torch.device("cuda")
ALONE = Replica()


@pytest.fixture(autouse=True)
def fake_tensors():
    with FakeTensorMode():
        yield


def view(replica: Replica = ALONE, dtype: torch.dtype = torch.bfloat16) -> ModelView:
    model = ModelView(
        layers=3,
        heads=8,
        groups=4,
        experts=8,
        device=CUDA,
        activation_dtype=dtype,
        sequence_length=16,
        head_dim=16,
    )
    for layer in (1, 2):  # the third lives on another pipeline stage
        query = torch.empty(8, 16, 64, device=CUDA, dtype=dtype)
        key = torch.empty(4, 16, 64, device=CUDA, dtype=dtype)
        router = torch.empty(8, 64, device=CUDA, dtype=dtype)
        model.attention.append(
            AttentionView(
                layer=layer,
                first_group=0,
                groups=4,
                heads_per_group=2,
                read=lambda q=query, k=key: (q, k),
                replica=replica,
            )
        )
        model.routers.append(RouterView(layer=layer, read=lambda w=router: w, replica=replica))
        model.conserves_attention(layer, 0, 4)
        model.conserved["router/shift"].places[layer] = (0, 1)
    for name, units, channels in (
        ("norm/scale", 5, 64),
        ("norm/shift", 5, 64),
        ("output/vocabulary_shift", 1, 32),
    ):
        model.conserved[name] = Conserved(
            units=units, dtype=dtype, channels=channels, places={2: (0, units)}
        )
    return model


def one_sample_after_another(monitor: Monitor, hooks: Callable[[Monitor], Any]) -> None:
    """Two full windows of hooks, collecting and reducing, all on the card."""
    packed = Packed(monitor.schema(), CUDA)
    for iteration in (10, 20, 30):
        hooks(monitor)
        monitor.collect(iteration, packed.fields)
        assert all(f.device.type == "cuda" for f in packed.fields.values())
        reduced = packed.reduce()  # the one copy to the host
        assert all(f.device.type == "cpu" for f in reduced.values())


def no_hooks(monitor: Monitor) -> None:
    """For a monitor that looks at weights only."""


def logits(monitor: Monitor) -> None:
    for layer in (1, 2):
        monitor.on_logits(layer, torch.empty(16, 2, 8, device=CUDA, dtype=torch.bfloat16))
        padding = torch.empty(16, 2, device=CUDA, dtype=torch.bool)
        monitor.on_logits(layer, torch.empty(16, 2, 8, device=CUDA, requires_grad=True), padding)


def chosen(monitor: Monitor) -> None:
    z = torch.empty(16, 2, 8, device=CUDA)
    monitor.on_logits(1, z, routing_map=torch.empty(16, 2, 8, device=CUDA, dtype=torch.bool))


def gradients(monitor: Monitor) -> None:
    """Everything that crosses a border in two micro-batches, and its gradients in turn.

    A backward pass needs a real card, so the hooks are caught where they are guarded, and called.
    """
    caught = []
    monitor.guard = lambda hook: caught.append(hook) or hook

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, device=CUDA, dtype=dtype)

    def arrive(*tensors: torch.Tensor) -> None:
        for hook, tensor in zip(caught, tensors, strict=True):
            assert hook(empty(*tensor.shape, dtype=tensor.dtype)) is None
        caught.clear()

    for layer in (2, 1):
        for batch in (2, 1):
            query, key, value, output = (
                empty(16, batch, heads, 16).requires_grad_() for heads in (8, 4, 4, 8)
            )
            call = AttentionCall(
                query=query, key=key, value=value, output=output, heads=8, groups=4, layout="sbhd"
            )
            monitor.on_attention(layer, call)
            arrive(query, key, value, output)
        logits = empty(16, 2, 8, dtype=torch.float32).requires_grad_()
        monitor.on_router(layer, logits, None)
        arrive(logits)
    for bias in (None, empty(64)):
        x = empty(16, 2, 64).requires_grad_()
        y = x * 1
        monitor.on_norm(2, 1, NormCall(x=x, y=y, eps=1e-5, centred=bias is not None, bias=bias))
        caught.reverse()
        arrive(y, x)
    logits = empty(16, 2, 32).requires_grad_()
    monitor.on_output(3, logits)
    arrive(logits)


class Doubling(GroupSum):
    """Stands for a group of two ranks whose shards are alike."""

    def __init__(self) -> None:
        self.size = 2

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("replica", [ALONE, Replica(rank=1, size=3)])
def test_attention_update(dtype: torch.dtype, replica: Replica) -> None:
    monitor = AttentionUpdateMonitor(view(replica, dtype), [10, 20], interval=10)
    one_sample_after_another(monitor, no_hooks)
    assert monitor.snapshot_bytes > 0


RULES = {
    "softmax": RoutingRule(top_k=2, chooses_by="logits"),
    "all experts": RoutingRule(top_k=8),
    "sigmoid": RoutingRule(score="sigmoid", top_k=3),
    "groups": RoutingRule(score="sigmoid", top_k=2, groups=4, top_groups=2, group_sum=2),
    "host": RoutingRule(top_k=2, chooses_by="host"),
    "unknown": RoutingRule(),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_router(rule: str, biased: bool) -> None:
    model = view()
    bias = torch.empty(8, device=CUDA) if biased else None
    model.routers = [replace(v, rule=RULES[rule], bias=lambda: bias) for v in model.routers]
    monitor = RouterMonitor(model)
    one_sample_after_another(monitor, chosen if rule == "host" else logits)
    monitor.restart()


@pytest.mark.parametrize("vocabulary", ["whole", "in shards"])
@pytest.mark.parametrize("context", ["whole", "in shards"])
def test_conservation(context: str, vocabulary: str) -> None:
    over, entries = (GroupSum(None) if x == "whole" else Doubling() for x in (context, vocabulary))
    monitor = ConservationMonitor(view(), over, entries, whole=True)
    one_sample_after_another(monitor, gradients)
    monitor.restart()


# The harness itself: each of these mistakes must be seen.


class RouterOnTheHost(RouterMonitor):
    """Its accumulators were put on the host."""

    def __init__(self, model: ModelView) -> None:
        super().__init__(model)
        self._tokens.sums = self._tokens.sums.cpu()


class ConservationThatLooks(ConservationMonitor):
    """Its hook reads a value back."""

    def _take_attention(self, layer: int, signal: str, terms: tuple[torch.Tensor, ...]) -> None:
        if terms[0].abs().max().item() > 0:
            super()._take_attention(layer, signal, terms)


class ConservationThatBranches(ConservationMonitor):
    """Its hook asks a tensor for a truth value."""

    def _take_attention(self, layer: int, signal: str, terms: tuple[torch.Tensor, ...]) -> None:
        if terms[0].isfinite().all():
            super()._take_attention(layer, signal, terms)


def test_a_buffer_on_the_host_is_seen() -> None:
    with pytest.raises(RuntimeError, match="device"):
        one_sample_after_another(RouterOnTheHost(view()), logits)


@pytest.mark.parametrize("wrong", [ConservationThatLooks, ConservationThatBranches])
def test_a_hook_that_waits_for_the_card_is_seen(wrong: type[ConservationMonitor]) -> None:
    with pytest.raises(Exception, match="_local_scalar_dense|data-dependent"):
        one_sample_after_another(wrong(view(), GroupSum(None), whole=True), gradients)


def test_weights_on_the_host_are_seen() -> None:
    model = view()
    on_host = tuple(torch.empty(n, 16, 64, dtype=torch.bfloat16) for n in (8, 4))
    model.attention[0] = replace(model.attention[0], read=lambda: on_host)
    with pytest.raises(RuntimeError, match="device"):
        one_sample_after_another(AttentionUpdateMonitor(model, [10], interval=10), no_hooks)
