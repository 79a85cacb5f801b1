"""The few places inside Megatron that need more than an answer from ``torch.cuda``.

Each is adjusted when its module gets imported, and only where the function is there: releases move
them, so that a missing one means that there is nothing to adjust.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from mcore_monitors.cpu import generator
from mcore_monitors.cpu.on_import import AfterImport
from mcore_monitors.errors import HostError


def _random(module: ModuleType) -> None:
    """``tensor_parallel.random``: the "GPU" state, and draws inside ``fork``."""
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        generator.get_state()
    )
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: generator.set_state(
        new_state
    )
    tracker = module.CudaRNGStatesTracker
    tracker.fork = generator.forking(tracker.fork)


def _moe_utils(module: ModuleType) -> None:
    """``moe_utils``: the split sizes of the all-to-all have to leave the tensor world."""
    original = getattr(module, "maybe_move_tensor_to_cpu", None)
    if original is None:
        return

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        # The original does both only for tensors that say is_cuda.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _dataset_utils(module: ModuleType) -> None:
    """``datasets.utils``: the wheel ships the compiled helper and no makefile."""
    original = module.compile_helpers

    @functools.wraps(original)
    def compile_helpers() -> None:
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            original()

    module.compile_helpers = compile_helpers


def _torch_norm(module: ModuleType) -> None:
    """``torch_norm``: torch's norm under sequence parallelism.

    Megatron refuses it because nobody marks the parameters, whose gradients have to be summed over
    the tensor-parallel ranks. Marked, they are treated like those of its own norms.
    """
    norm = module.WrappedTorchNorm
    original = norm.__new__

    @functools.wraps(original)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel = config.sequence_parallel
        if sequence_parallel:
            config = copy.copy(config)
            config.sequence_parallel = False
        built = original(cls, config, *args, **kwargs)
        for parameter in built.parameters():
            parameter.sequence_parallel = sequence_parallel
        return built

    norm.__new__ = new


def _filesystem_async(module: ModuleType) -> None:
    """``filesystem_async``: start the helper process of a checkpoint by a fork.

    Megatron spawns it because a CUDA context does not survive a fork. There is none here, and a
    spawned process imports the training script again: 5 to 20 seconds at the first checkpoint.
    """
    original = getattr(module, "get_write_results_queue", None)
    if original is None:
        return
    module.get_write_results_queue = lambda mp_mode="fork": original("fork")


ADJUSTMENTS: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.tensor_parallel.random": _random,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
    "megatron.core.datasets.utils": _dataset_utils,
    "megatron.core.transformer.torch_norm": _torch_norm,
    "megatron.core.dist_checkpointing.strategies.filesystem_async": _filesystem_async,
}


def refuse_if_too_late() -> None:
    """Raise HostError when one of the modules to adjust has been imported already."""
    late = sorted(set(ADJUSTMENTS) & set(sys.modules))
    if late:
        raise HostError(
            f"the CPU stand-in has to be installed before Megatron is imported, but {late[0]} "
            "already is; call mcore_monitors.cpu.install() first, or set MCORE_MONITORS_CPU=1 "
            "and use a patched host."
        )


def install() -> None:
    """Adjust the call sites as their modules get imported."""
    AfterImport(ADJUSTMENTS).install()
