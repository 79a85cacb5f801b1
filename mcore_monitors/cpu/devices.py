"""Send to the CPU what Megatron asks to be on "cuda": factories, ``Tensor.to`` and the like.

A wrapper looks at one argument and costs a fraction of a microsecond, and only these functions pay
it; a TorchFunctionMode would be called for every operation on every tensor.

Under a dispatch mode such as FakeTensorMode a "cuda" tensor can exist without a card, and is meant:
there the request passes unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mcore_monitors.cpu import generator

CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)
_RANDOM_FACTORIES = (
    "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
)  # fmt: skip
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def on_cpu(device: Any) -> Any:
    """Return the CPU for anything that names a CUDA device, otherwise what was given."""
    kind = type(device)
    if kind is torch.device:
        is_cuda = device.type == "cuda"
    elif kind is str:
        is_cuda = device.startswith("cuda")
    else:
        is_cuda = kind is int
    if is_cuda and torch._C._len_torch_dispatch_stack() == 0:
        return CPU
    return device


def _with_device_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:  # there is no device to pin it for
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        kwargs["device"] = on_cpu(device)
        if kwargs["device"] is device:  # asked for on the CPU
            return function(*args, **kwargs)
        with generator.default_is_gpu():
            return function(*args, **kwargs)

    return wrapped


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            first = args[0]
            device = on_cpu(first)
            if device is not first:
                args = (device, *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


def _cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch._C._len_torch_dispatch_stack():
            return original(self, *args, **kwargs)
        return self

    return cuda


def _type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original(self)
            # Megatron's optimizers assert "torch.cuda.FloatTensor" of what they are given. Under a
            # TorchFunctionMode, like torch.device as a context, this runs inside itself.
            if self.is_cpu and not name.startswith("torch.cuda."):
                return name.replace("torch.", "torch.cuda.", 1)
            return name
        if isinstance(dtype, type) and dtype.__module__ == "torch.cuda":
            dtype = f"torch.{dtype.__name__}"
        elif isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(f, on_cpu(map_location), *args, **kwargs)

    return load


def install() -> None:
    """Replace the factories and the tensor methods that take a device."""
    for name in _FACTORIES:
        setattr(torch, name, _with_device_keyword(getattr(torch, name)))
    for name in _RANDOM_FACTORIES:
        setattr(torch, name, _drawing(getattr(torch, name)))
    torch.nn.functional.dropout = generator.dropping(torch.nn.functional.dropout)
    for name in _METHODS:
        setattr(torch.Tensor, name, _with_device_keyword(getattr(torch.Tensor, name)))
    torch.Tensor.to = _to(torch.Tensor.to)
    torch.Tensor.cuda = _cuda(torch.Tensor.cuda)
    torch.Tensor.type = _type(torch.Tensor.type)
    torch.load = _load(torch.load)
    # A stream of ours is not one of torch's, and nothing runs behind the back of the allocator.
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = lambda self, device=None: self
