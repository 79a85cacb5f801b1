"""The random generator that plays the GPU's part.

Megatron keeps two kinds of random state apart: the CPU's (data order, initialisation) and the GPU's
(dropout, per tensor-parallel rank). A stand-in that maps both to one generator would not be
faithful, and Megatron warns about it: so the "GPU" has a generator of its own, and inside
Megatron's ``fork`` the default generator takes its state, since operations on CPU tensors draw from
the default one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch

#: Draws nothing by itself: its state is what ``torch.cuda.get_rng_state`` returns.
GPU = torch.Generator(device="cpu")


def get_state(device: Any = None) -> torch.Tensor:
    """State of the "GPU" generator, uint8 [bytes]; the device is ignored."""
    return GPU.get_state()


def set_state(new_state: torch.Tensor, device: Any = None) -> None:
    """Set the state of the "GPU" generator from a uint8 tensor; the device is ignored."""
    GPU.set_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the "GPU" generator."""
    GPU.manual_seed(int(seed))


def initial_seed() -> int:
    """Seed that the "GPU" generator was last given."""
    return GPU.initial_seed()


@contextlib.contextmanager
def as_default() -> Iterator[None]:
    """Let the default generator draw from the "GPU" state inside, and be as before outside."""
    cpu_state = torch.get_rng_state()
    torch.set_rng_state(GPU.get_state())
    try:
        yield
    finally:
        GPU.set_state(torch.get_rng_state())
        torch.set_rng_state(cpu_state)


def forking(fork: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CudaRNGStatesTracker.fork`` so that what runs inside draws from the forked state."""

    @functools.wraps(fork)
    @contextlib.contextmanager
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with fork(self, *args, **kwargs), as_default():
            yield

    return wrapped
