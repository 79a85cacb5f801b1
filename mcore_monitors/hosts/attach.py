"""Turn a described model and settings into a running set of monitors; shared by all hosts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from ..config import Config
from ..detection.judge import Judge
from ..errors import ConfigError
from ..messages import say
from ..monitors.attention_update import AttentionUpdateMonitor
from ..monitors.base import Monitor
from ..monitors.conservation import ConservationMonitor
from ..monitors.router import RouterMonitor
from ..parallel import GroupSum
from ..recovery import Recovery
from ..runtime import Runtime
from ..signals.conservation import key_shift_limit
from ..sinks import open_sinks
from ..views import ModelView


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands when the monitors are attached."""

    iteration: int
    #: number of rollbacks so far
    attempt: int
    #: whether the loss that this rank gives is to be recorded
    reports_loss: bool


def build_monitors(config: Config, model: ModelView, context: GroupSum) -> list[Monitor]:
    """The monitors that are asked for and for which the model, on any rank, has something.

    Raises:
        ConfigError: a monitor is required (``enabled: true``) and the model has nothing for it.
    """
    wanted = config.monitors
    candidates = {
        "attention_update": (
            wanted.attention_update.enabled,
            bool(model.attention),
            "attention layer with query and key weights that can be read",
            lambda: AttentionUpdateMonitor(
                model, wanted.attention_update.windows, config.interval
            ),
        ),
        "router": (
            wanted.router.enabled,
            bool(model.routers),
            "mixture-of-experts router",
            lambda: RouterMonitor(model),
        ),
        "conservation": (
            wanted.conservation.enabled,
            bool(model.key_shift),
            "attention that keeps the key-shift identity",
            lambda: ConservationMonitor(model, context),
        ),
    }
    monitors = []
    for name, (enabled, here, what, make) in candidates.items():
        # every rank asks for every name: a pipeline stage without a router still takes part
        somewhere = parallel.any_rank(here, model.device)
        if enabled is False:
            continue
        if somewhere:
            monitors.append(make())
        elif enabled is True:
            raise ConfigError(
                f"monitors.{name}.enabled",
                True,
                "auto or false for this model",
                f"It has no {what}. " + " ".join(dict.fromkeys(model.left_out)),
            )
        elif parallel.rank() == 0:
            say(f"monitor {name!r} is off: the model has no {what}.")
    return monitors


def attach(
    config: Config,
    model: ModelView,
    context: GroupSum,
    progress: Progress,
    *,
    host: str,
    versions: dict[str, str],
    wandb_run: Any = None,
    wandb_rank: int = 0,
) -> Runtime:
    """Make the runtime of this rank.

    Args:
        wandb_run: the host's own W&B writer where this rank has one.
        wandb_rank: the rank that writes to W&B: the host's writer rank, or 0.
    """
    monitors = build_monitors(config, model, context)
    writes = parallel.rank() == 0
    sinks = open_sinks(
        config,
        local=writes,
        wandb_run=wandb_run,
        wandb=parallel.rank() == wandb_rank,
    )
    judge = recovery = None
    limits = _limits(config, model)
    if writes:
        judge = Judge(config.detection, limits=limits)
        recovery = Recovery.open(config.run_dir, config.recovery)
    runtime = Runtime(
        config,
        monitors,
        model.device,
        sinks,
        judge=judge,
        recovery=recovery,
        attempt=progress.attempt,
        reports_loss=progress.reports_loss,
    )
    # each pipeline stage knows of its own layers only
    for sentence in parallel.union_of_texts(model.left_out):
        if writes:
            say(f"left out: {sentence}.")
    runtime.event(
        "start",
        progress.iteration,
        host=host,
        world_size=parallel.world_size(),
        layers=model.layers,
        monitors=[m.name for m in monitors],
        mode=config.recovery.mode,
        limits=limits,
        versions=versions,
    )
    if progress.iteration > 0:
        runtime.resume(progress.iteration)
    return runtime


def _limits(config: Config, model: ModelView) -> dict[str, float]:
    """The limits of conservation residuals: as set, else by number format and sequence length."""
    if not model.sequence_length:
        return {}
    limit = config.detection.limit
    if limit is None:
        limit = key_shift_limit(
            model.activation_dtype,
            model.sequence_length,
            tf32=model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        )
    return {"attention/key_shift": limit}


def check_run_dir(run_dir: str) -> None:
    """See that the run folder can be written, before anything expensive starts.

    Raises:
        ConfigError: it can't be made or written.
    """
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(
            "run_dir", run_dir, "a folder that this user may write", f"{error.strerror}."
        ) from None
