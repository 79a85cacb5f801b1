"""What the patched DeepSpeed calls, and nothing else.

Each function stands behind one added line in DeepSpeed (``docs/patches.md``) and is only reached
with the key ``"mcore_monitors"`` in its JSON. The settings there are those of the YAML file.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ... import __version__
from ...config import Config, from_dict
from ...errors import EXIT_BAD_CONFIG, ConfigError, HostError, MonitorsError
from ...messages import say
from ...parallel import GroupSum
from ...runtime import Runtime
from ..attach import Progress, attach, check_run_dir
from .model import describe

#: attribute of an engine that holds its monitors
_OURS = "_mcore_monitors"


class _Engine:
    """The monitors of one engine and the losses of its step in progress."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.loss: torch.Tensor | None = None
        self.micro_batches = 0

    def add_loss(self, loss: torch.Tensor) -> None:
        loss = loss.detach().float().mean()
        self.loss = loss if self.loss is None else self.loss + loss
        self.micro_batches += 1

    def take_loss(self) -> torch.Tensor | None:
        loss = None if self.loss is None else self.loss / self.micro_batches
        self.loss, self.micro_batches = None, 0
        return loss


def _start(engine: Any) -> _Engine:
    config = _settings(engine)
    view, gates = describe(engine)
    runtime = attach(
        config,
        view,
        GroupSum(None),
        # each rank's loss is that of its own tokens: all ranks report, and the mean is recorded
        Progress(iteration=engine.global_steps, attempt=0, reports_loss=True),
        host="deepspeed",
        versions={
            "mcore-monitors": __version__,
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
        },
    )
    router = next((m for m in runtime.monitors if m.name == "router"), None)
    watched = {v.layer for v in view.routers}
    for layer, gate in gates.items():
        if router is not None and layer in watched:
            gate.mcore_monitors_tap = _tap(gate, layer, runtime.guarded(router, router.on_logits))
    return _Engine(runtime)


def _settings(engine: Any) -> Config:
    config = from_dict(engine._config.mcore_monitors, source="mcore_monitors")
    check_run_dir(config.run_dir)
    if isinstance(engine, PipelineEngine):
        raise HostError("DeepSpeed's PipelineEngine never calls step(); it can't be monitored yet.")
    if config.recovery.mode == "rollback":
        raise ConfigError("recovery.mode", "rollback", "log or notify on DeepSpeed, for now")
    if config.drill is not None:
        raise ConfigError("drill", config.drill.fault, "no drill on DeepSpeed, for now")
    return config


def _tap(gate: Any, layer: int, hook: Any) -> Any:
    def tap(logits: torch.Tensor) -> None:
        # Evaluation doesn't count; a checkpointed layer's first pass runs without grad.
        if gate.training and torch.is_grad_enabled():
            hook(layer, logits)

    return tap


def on_engine(engine: Any) -> None:
    """An engine with the key ``mcore_monitors`` is built."""
    try:
        ours = _start(engine)
    except MonitorsError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            say(str(error))
        sys.exit(EXIT_BAD_CONFIG)
    setattr(engine, _OURS, ours)
    backward = engine.backward

    def watched_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ours.add_loss(loss)
        return backward(loss, *args, **kwargs)

    engine.backward = watched_backward


def on_step(engine: Any) -> None:
    """The optimizer step of a full batch is done, on every rank."""
    ours = getattr(engine, _OURS)
    rates = engine.get_lr()
    ours.runtime.on_step(
        engine.global_steps,
        loss=ours.take_loss(),
        grad_norm=engine.get_global_grad_norm(),
        learning_rate=float(rates[0]) if rates else None,
        consumed_samples=engine.global_samples,
    )


def on_checkpoint(engine: Any, save_dir: str, tag: str) -> None:
    """A checkpoint is complete on disk, on every rank."""
    ours = getattr(engine, _OURS)
    path = os.path.join(save_dir, str(tag))
    ours.runtime.on_checkpoint(engine.global_steps, path, engine.global_samples)


def on_load(engine: Any, load_path: str | None) -> None:
    """A checkpoint was loaded: go on from its iteration."""
    ours = getattr(engine, _OURS, None)
    if ours is not None:
        ours.runtime.resume(engine.global_steps)
