"""Run Megatron-core without a GPU: answer the calls it makes into ``torch.cuda`` from the CPU.

For rehearsals, drills and tests on a machine without a card. Never on by itself: a process asks for
it with the flag ``--mcore-monitors-cpu`` or the environment variable ``MCORE_MONITORS_CPU=1``, and
:func:`install` has to run before any module of ``megatron`` is imported, because those modules keep
names of ``torch.cuda`` from their import on.

How it works: a handful of functions is replaced (``torch.cuda.*``, tensor factories that are given
``device="cuda"``, ``Tensor.to`` and a few more), and some call sites inside Megatron are adjusted
when their module gets imported. No TorchFunctionMode is involved, since that would tax every
operation of a step.

Not possible this way: Transformer Engine, CUDA graphs, NCCL, FSDP. See
:func:`default_arguments` for the arguments that a run needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from mcore_monitors.cpu.arguments import default_arguments

__all__ = ["ENVIRONMENT", "FLAG", "asked_for", "default_arguments", "install", "installed"]

#: The command-line switch and the environment variable that ask for the stand-in.
FLAG = "--mcore-monitors-cpu"
ENVIRONMENT = "MCORE_MONITORS_CPU"

_installed = False


def asked_for(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> bool:
    """Say whether this process was asked to run on the CPU.

    Args:
        argv: command line to look at, ``sys.argv`` by default.
        environ: environment to look at, ``os.environ`` by default.
    """
    argv = sys.argv if argv is None else argv
    environ = os.environ if environ is None else environ
    return environ.get(ENVIRONMENT) == "1" or FLAG in argv


def installed() -> bool:
    """Say whether :func:`install` has run in this process."""
    return _installed


def install() -> None:
    """Let the CPU answer for the GPU, from now on and in this process. A second call does nothing.

    Raises:
        HostError: when modules of Megatron that keep names of ``torch.cuda`` are imported already.
    """
    global _installed
    if _installed:
        return
    _prepare_environment()

    # Imported here so that importing this package stays light (no torch).
    import torch
    import torch._dynamo

    from mcore_monitors.cpu import call_sites, cuda_calls, devices

    call_sites.refuse_if_too_late()
    if torch.cuda.is_available() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            "mcore-monitors: running on the CPU as asked; the CUDA devices of this machine are "
            "ignored.",
            file=sys.stderr,
            flush=True,
        )
    cuda_calls.install()
    devices.install()
    call_sites.install()
    _installed = True


def _prepare_environment() -> None:
    # torch.compile asks the accelerator what it can do; the fused functions run eagerly instead.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron refuses to start some parallel layouts without it.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Processes share the cores of one machine: more threads than that would fight each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
