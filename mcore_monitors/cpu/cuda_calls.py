"""What ``torch.cuda`` and ``torch.accelerator`` answer when the CPU stands in for the GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import torch

from mcore_monitors.cpu import generator

CPU = torch.device("cpu")


class Stream:
    """A stream of a device that does everything at once: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.cuda_stream, self.stream_id = CPU, 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def synchronize(self) -> None:
        """Nothing to wait for."""

    wait_stream = wait_event = lambda self, other: None

    def query(self) -> bool:
        """All work is done, always."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record and return an event."""
        event = Event() if event is None else event
        event.record(self)
        return event

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return 0, 0


class Event:
    """A moment on the clock of the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to another one."""
        return ((end._time or 0.0) - (self._time or 0.0)) * 1e3

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done, always."""
        return True


_STREAM = Stream()
_PROPERTIES = SimpleNamespace(
    name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1, uuid="cpu",
    warp_size=32, is_integrated=False, is_multi_gpu_board=False,
)  # fmt: skip


def _always(answer: Any) -> Callable[..., Any]:
    def respond(*args: Any, **kwargs: Any) -> Any:
        return answer

    return respond


@contextlib.contextmanager
def _no_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    return {}


def answers() -> dict[str, Any]:
    """Name in ``torch.cuda`` -> what takes its place."""
    nothing = _always(None)
    table: dict[str, Any] = {
        # An index like that of a card; devices.py sends what is put there to the CPU.
        "current_device": _always(0), "device_count": _always(1), "is_available": _always(True),
        "is_initialized": _always(True), "get_device_name": _always("cpu"),
        # 8.0 is what Megatron asks of a card for bf16 and for its default kernels
        "get_device_capability": _always((8, 0)),
        "get_device_properties": _always(_PROPERTIES), "is_bf16_supported": _always(True),
        "Stream": Stream, "ExternalStream": Stream, "Event": Event,
        "current_stream": _always(_STREAM), "default_stream": _always(_STREAM),
        "stream": _no_context, "device": _no_context,
        "is_current_stream_capturing": _always(False),
        "get_rng_state": generator.get_state, "set_rng_state": generator.set_state,
        "manual_seed": generator.manual_seed, "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
        "memory_stats": _memory_stats, "memory_snapshot": _always([]),
        "mem_get_info": _always((0, 0)), "temperature": _always(0), "utilization": _always(0),
        "power_draw": _always(0), "clock_rate": _always(0),
    }  # fmt: skip
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect", "init",
                 "_lazy_init", "reset_peak_memory_stats", "reset_max_memory_allocated"):  # fmt: skip
        table[name] = nothing
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated",
                 "max_memory_reserved", "device_memory_used"):  # fmt: skip
        table[name] = _always(0)
    # What Megatron defers until CUDA is initialised: it is, always.
    table["_lazy_call"] = lambda call, **kwargs: call()
    return table


def install() -> None:
    """Put the answers into ``torch.cuda``, its ``random`` module and ``torch.accelerator``."""
    for name, answer in answers().items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))
    # The data loader asks these before it pins memory, for which there is no device.
    torch.accelerator.is_available = _always(False)
    torch.accelerator.current_accelerator = _always(None)
    torch.accelerator.current_device_index = _always(0)
