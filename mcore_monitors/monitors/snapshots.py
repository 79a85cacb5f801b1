"""Where earlier weights are kept: on the device, or copied to the host without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch


class Snapshots:
    """Tensors by iteration, the same number and shapes at each.

    In the host's memory they are pinned and copied on a stream of their own: training does not wait
    for the copy out, and the copy back, which one comparison needs, is ordered behind it on the
    device. Pinned buffers are used again. On a CPU there is nothing to choose.

    Args:
        place: ``device`` or ``host``.
        device: where the model's parameters live.
    """

    def __init__(self, place: Literal["device", "host"], device: torch.device) -> None:
        self._held: dict[int, Sequence[Any]] = {}
        on_host = place == "host" and device.type == "cuda"
        self._host = _HostMemory(device) if on_host else None

    def __contains__(self, iteration: int) -> bool:
        return iteration in self._held

    @property
    def nbytes(self) -> int:
        """Bytes held, wherever they are."""
        return sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors)

    def keep(self, iteration: int, tensors: Sequence[torch.Tensor]) -> None:
        """Keep tensors that nobody writes to any more."""
        self._held[iteration] = self._host.out(tensors) if self._host else list(tensors)

    def get(self, iteration: int, index: int) -> torch.Tensor:
        """Tensor number ``index`` of an iteration, on the device."""
        kept = self._held[iteration][index]
        return self._host.back(kept) if self._host else kept

    def drop(self, unneeded: Callable[[int], bool]) -> None:
        """Forget the iterations for which ``unneeded`` is true."""
        for iteration in [i for i in self._held if unneeded(i)]:
            tensors = self._held.pop(iteration)
            if self._host:
                self._host.free(tensors)


class _HostMemory:
    """Pinned buffers of the host and the stream that fills them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._free: list[torch.Tensor] = []

    def out(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy to the host behind what the current stream has queued so far."""
        buffers = [self._buffer(tensor) for tensor in tensors]
        # Also behind the last copy back: a buffer that is used again may still be read from.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
                # or the allocator would give its memory away before the copy has run
                tensor.record_stream(self._stream)
        return buffers

    def back(self, buffer: torch.Tensor) -> torch.Tensor:
        """Copy to the device behind the copies to the host."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return buffer.to(self._device, non_blocking=True)

    def free(self, buffers: Sequence[torch.Tensor]) -> None:
        """Take buffers back."""
        self._free += buffers

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        for i, buffer in enumerate(self._free):
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return self._free.pop(i)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
