"""Snapshots on the device and on the host: what is copied when, on which stream, and used again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.monitors.snapshots import Snapshots
from mcore_monitors.parallel import Packed
from mcore_monitors.signals import update_spectra
from mcore_monitors.views import AttentionView, ModelView

from .models import TinyModel, sample

CUDA = torch.device("cuda")


class Streams:
    """Stands for the card's streams: writes down who waits for whom, and what is copied where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.pinned: list[tuple[int, ...]] = []
        streams = self
        self.now = "main"

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = "main" if name == "main" else "side"

            def wait_stream(self, other: Stream) -> None:
                streams.log.append((self.name, "waits for", other.name))

        @contextmanager
        def stream(chosen: Stream):
            self.now = chosen.name
            yield
            self.now = "main"

        copy, to, empty = torch.Tensor.copy_, torch.Tensor.to, torch.empty

        def logged_copy(into, source, non_blocking=False):
            if into.device != source.device:
                assert non_blocking
                self.log.append((self.now, "copies to", into.device.type))
            return copy(into, source, non_blocking=non_blocking)

        def logged_to(tensor, *args, **kwargs):
            if tensor.device.type == "cpu" and args and args[0] == CUDA:
                assert kwargs.get("non_blocking")
                self.log.append((self.now, "copies to", "cuda"))
            return to(tensor, *args, **kwargs)

        def pinning_empty(*args, pin_memory=False, **kwargs):
            if pin_memory:
                self.pinned.append(tuple(args[0]))
            return empty(*args, **kwargs)

        def record(tensor, by):
            self.log.append((by.name, "holds"))

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", record)
        monkeypatch.setattr(torch.Tensor, "copy_", logged_copy)
        monkeypatch.setattr(torch.Tensor, "to", logged_to)
        monkeypatch.setattr(torch, "empty", pinning_empty)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        yield Streams(monkeypatch)


def weights() -> torch.Tensor:
    return torch.ones(4, 8, device=CUDA)


def test_copies_wait_for_each_other_on_the_device_only(streams: Streams) -> None:
    snapshots = Snapshots("host", CUDA)
    snapshots.keep(10, [weights(), weights()])
    out = [("side", "copies to", "cpu"), ("side", "holds")]
    assert streams.log == [("side", "waits for", "main"), *out, *out]
    streams.log.clear()
    assert snapshots.get(10, 1).device.type == "cuda"
    assert streams.log == [("main", "waits for", "side"), ("main", "copies to", "cuda")]
    assert snapshots.nbytes == 2 * 4 * 8 * 4


def test_pinned_buffers_are_used_again(streams: Streams) -> None:
    snapshots = Snapshots("host", CUDA)
    for iteration in range(0, 100, 10):
        snapshots.drop(lambda kept, now=iteration: kept < now - 20)
        snapshots.keep(iteration, [weights()])
    assert streams.pinned == [(4, 8)] * 3
    # a buffer is filled again only behind what the main stream has read from it
    assert streams.log.count(("side", "waits for", "main")) == 10


def test_on_the_device_nothing_is_copied(streams: Streams) -> None:
    snapshots, tensor = Snapshots("device", CUDA), weights()
    snapshots.keep(10, [tensor])
    assert snapshots.get(10, 0) is tensor
    assert not streams.log and not streams.pinned


def model(device: torch.device) -> ModelView:
    view = TinyModel(layers=3).view()
    view.device = device
    query, key = torch.ones(4, 4, 16, device=device), torch.ones(2, 4, 16, device=device)
    view.attention = [
        AttentionView(
            layer=layer, first_group=0, groups=2, heads_per_group=2, read=lambda: (query, key)
        )
        for layer in (1, 2, 3)
    ]
    return view


@pytest.mark.parametrize("place", ["device", "host"])
def test_one_eigensolver_call_for_all_windows_and_layers(
    place: str, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side they cost a card little more than one; anything that waited would raise here."""
    solve, calls = update_spectra.symmetric_eigenvalues, []

    def counted(matrices: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(matrices.shape))
        return solve(matrices)

    monkeypatch.setattr(update_spectra, "symmetric_eigenvalues", counted)
    monitor = AttentionUpdateMonitor(model(CUDA), [10, 20, 50], 10, snapshots=place)
    packed = Packed(monitor.schema(), CUDA)
    for iteration in range(10, 160, 10):
        calls.clear()
        monitor.collect(iteration, packed.fields)
    heads, groups = 3 * 4, 3 * 2
    # Δ2 in one call; Δ3, ΔW_q and ΔW_k in another
    assert sorted(calls) == [(3 * heads, 8, 8), (3 * (2 * heads + groups), 4, 4)]
    moved = {entry[2] for entry in streams.log if entry[1] == "copies to"}
    assert moved == ({"cpu", "cuda"} if place == "host" else set())


def test_on_a_cpu_both_places_are_one() -> None:
    readings = {}
    for place in ("device", "host"):
        tiny = TinyModel()
        monitor = AttentionUpdateMonitor(tiny.view(), [20], 10, snapshots=place)
        for iteration in (10, 20, 30):
            tiny.train()
            readings[place] = sample([monitor], iteration)
    assert readings["host"] == readings["device"] != {}
