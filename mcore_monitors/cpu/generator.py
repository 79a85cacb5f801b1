"""The random generator that plays the GPU's part.

Megatron keeps two kinds of random state apart: the CPU's (data order, initialisation) and the GPU's
(dropout, different per tensor-parallel rank). A stand-in that maps both to one generator would not
be faithful: Megatron warns about it, and a resumed run would draw another dropout, since the data
loader has drawn in between.

So the "GPU" has a generator of its own. Operations on CPU tensors draw from torch's default one:
where a card would draw, in dropout, in factories on "cuda" and inside Megatron's ``fork``, the two
exchange their states. Other draws (the router's jitter, for one) stay the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: Holds the state of the "GPU", or that of the CPU while the two are exchanged.
_OTHER = torch.Generator(device="cpu")
_exchanged = False


def gpu() -> torch.Generator:
    """The generator that holds the "GPU" state at the moment."""
    return torch.default_generator if _exchanged else _OTHER


def get_state(device: Any = None) -> torch.Tensor:
    """State of the "GPU" generator, uint8 [bytes]; the device is ignored."""
    return gpu().get_state()


def set_state(new_state: torch.Tensor, device: Any = None) -> None:
    """Set the state of the "GPU" generator from a uint8 tensor; the device is ignored."""
    gpu().set_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the "GPU" generator."""
    gpu().manual_seed(int(seed))


def initial_seed() -> int:
    """Seed that the "GPU" generator was last given."""
    return gpu().initial_seed()


def _exchange() -> None:
    global _exchanged
    default = torch.default_generator
    state = default.get_state()
    default.set_state(_OTHER.get_state())
    _OTHER.set_state(state)
    _exchanged = not _exchanged


@contextlib.contextmanager
def default_is_gpu(wanted: bool = True) -> Iterator[None]:
    """Let torch's default generator be the "GPU" one inside, or (False) the CPU's own."""
    if _exchanged == wanted:
        yield
        return
    _exchange()
    try:
        yield
    finally:
        _exchange()


def forking(fork: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``CudaRNGStatesTracker.fork`` so that what runs inside draws from the forked state."""

    @functools.wraps(fork)
    @contextlib.contextmanager
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        # The fork itself looks at the CPU's state too, hence the first step when forks are nested.
        with default_is_gpu(False), fork(self, *args, **kwargs), default_is_gpu():
            yield

    return wrapped


def dropping(dropout: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.dropout`` so that it draws like a GPU."""

    @functools.wraps(dropout)
    def wrapped(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return dropout(input, p, training, inplace)
        with default_is_gpu():
            return dropout(input, p, training, inplace)

    return wrapped
