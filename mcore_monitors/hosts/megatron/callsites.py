"""What the patched Megatron calls, and nothing else.

Each function stands behind one added line in Megatron (``docs/patches.md``) and is only reached
with ``--mcore-monitors``. What can't be used ends the start with one sentence and an exit code of
ours before anything is trained; after that no error of ours reaches the host.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ...config import Config, load
from ...errors import EXIT_BAD_CONFIG, ConfigError, MonitorsError
from ...messages import say
from ...recovery import StartOrder, resolve_start
from ...runtime import Runtime
from ..attach import check_run_dir
from .registration import register
from .setup import set_up


class _Run:
    """The run of this process, from the arguments to the end."""

    config: Config | None = None
    order: StartOrder | None = None
    runtime: Runtime | None = None
    #: Megatron's arguments as they are now
    host_args: Callable[[], argparse.Namespace]


_run = _Run()


def _refuse(error: MonitorsError) -> None:
    if int(os.environ.get("RANK", "0")) == 0:  # before the process groups exist, too
        say(str(error))
    sys.exit(getattr(error, "exit_code", EXIT_BAD_CONFIG))


def on_arguments(args: argparse.Namespace) -> None:
    """Behind argument parsing: read the settings and obey a recovery plan, if there is one."""
    try:
        _run.config = load(args.mcore_monitors)
        if _run.config.recovery.how == "in_place":
            raise ConfigError(
                "recovery.how",
                "in_place",
                "auto or relaunch on Megatron-core",
                "Its training loop can't load a checkpoint while it runs.",
            )
        check_run_dir(_run.config.run_dir)
        _run.order = resolve_start(_run.config.run_dir, _run.config.recovery.mode)
    except MonitorsError as error:
        _refuse(error)
    _run.runtime = None
    if _run.config.check or _run.config.profile:
        _only_look(args)
    order = _run.order
    if order is not None:
        args.load = order.load_dir
        args.ckpt_step = order.iteration


def _only_look(args: argparse.Namespace) -> None:
    """For a check or a profile: nothing of the run is to stay behind."""
    args.save = args.save_interval = args.non_persistent_save_interval = None
    args.tensorboard_dir = None
    args.wandb_project = ""
    args.eval_iters = 0


def on_layer_spec(spec: Any) -> Any:
    """Before a GPT model stores its layer spec: observe its routers and attentions."""
    return spec if _run.config is None else register(spec)


def on_setup(model: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
    """Model, optimizer and schedule are built and loaded; data iterators are not yet."""
    if _run.config is None:
        return
    from megatron.training import get_args

    _run.host_args = get_args
    try:
        _run.runtime = set_up(_run.config, _run.order, model, optimizer, scheduler)
    except MonitorsError as error:
        _refuse(error)


def on_step(
    iteration: int,
    loss_dict: dict[str, torch.Tensor],
    grad_norm: float | None,
    learning_rate: float | None,
    skipped_iter: int,
) -> None:
    """After a training step and its log line, on every rank."""
    if _run.runtime is None:
        return
    loss = loss_dict.get("lm loss", next(iter(loss_dict.values()), None))
    _run.runtime.on_step(
        iteration,
        loss=loss,
        grad_norm=None if grad_norm is None else float(grad_norm),
        learning_rate=learning_rate,
        consumed_samples=_run.host_args().consumed_train_samples,
    )


def on_checkpoint(iteration: int, path: str) -> None:
    """A checkpoint is complete on disk. Called on global rank 0 only."""
    if _run.runtime is None:
        return
    consumed = _run.host_args().consumed_train_samples
    _run.runtime.on_checkpoint(int(iteration), str(path), consumed)


def exit_code() -> int | None:
    """The code to leave with when the run has to end here, else None. The same on every rank."""
    return None if _run.runtime is None else _run.runtime.exit_code


def on_end() -> None:
    """The run ends, by any of Megatron's ways out: close what is open."""
    if _run.runtime is not None:
        _run.runtime.close()
