"""Turn a described model and settings into a running set of monitors; shared by all hosts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import parallel
from ..config import Config
from ..detection.judge import Judge
from ..errors import ConfigError
from ..messages import say
from ..monitors.attention_activity import AttentionActivityMonitor
from ..monitors.attention_update import AttentionUpdateMonitor
from ..monitors.base import Monitor, StepState
from ..monitors.conservation import ConservationMonitor
from ..monitors.conservation.limits import residual_limits
from ..monitors.koopman import KoopmanMonitor
from ..monitors.optimizer import OptimizerMonitor
from ..monitors.router import RouterMonitor
from ..parallel import GroupSum
from ..recovery import Recovery
from ..runtime import Runtime
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


def build_monitors(
    config: Config,
    model: ModelView,
    context: GroupSum,
    vocabulary: GroupSum | None = None,
    state: StepState | None = None,
) -> list[Monitor]:
    """The monitors that are asked for and for which the model, on any rank, has something.

    Args:
        context, vocabulary, state: as :func:`attach`.

    Raises:
        ConfigError: a monitor is required (``enabled: true``) and the model has nothing for it.
    """
    wanted = config.monitors
    # all ranks must agree on these, also a pipeline stage that has no attention of its own
    parts = parallel.union_of_texts([view.part for view in model.attention])
    collective = parallel.any_rank(any(v.collective for v in model.attention), model.device)
    gathered_routers = parallel.any_rank(any(v.collective for v in model.routers), model.device)
    candidates = {
        "attention_update": (
            wanted.attention_update.enabled,
            bool(model.attention),
            "attention layer with query and key weights that can be read",
            lambda: AttentionUpdateMonitor(
                model,
                wanted.attention_update.windows,
                config.interval,
                judged=config.detection.windows,
                parts=parts,
                collective=collective,
                every=wanted.attention_update.every,
                snapshots=wanted.attention_update.snapshots,
            ),
        ),
        "router": (
            wanted.router.enabled,
            bool(model.routers),
            "mixture-of-experts router",
            lambda: RouterMonitor(
                model,
                every_step=wanted.router.tokens == "all",
                collective=gathered_routers,
                interval=config.interval,
                every=wanted.router.every,
            ),
        ),
        "conservation": (
            wanted.conservation.enabled,
            model.conserves,
            "attention, norm, router or output layer that keeps its identities",
            lambda: ConservationMonitor(
                model,
                context,
                vocabulary,
                whole=config.check or wanted.conservation.whole,
                limits=_limits(config, model),
                interval=config.interval,
                state=state,
            ),
        ),
        "attention_activity": (
            wanted.attention_activity.enabled,
            bool(model.activity),
            "attention whose logits can be made again",
            lambda: AttentionActivityMonitor(
                model,
                wanted.attention_activity.queries,
                interval=config.interval,
                every=wanted.attention_activity.every,
                state=state,
            ),
        ),
        "optimizer": (
            wanted.optimizer.enabled,
            bool(model.optimizer),
            "Adam whose state can be read",
            lambda: OptimizerMonitor(model, config.interval, wanted.optimizer.every),
        ),
        "koopman": (
            wanted.koopman.enabled,
            model.residual is not None and bool(model.residual.layers),
            "layers whose residual stream can be read",
            lambda: KoopmanMonitor(
                model,
                every=wanted.koopman.every,
                rank=wanted.koopman.rank,
                tokens=wanted.koopman.tokens,
            ),
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
    state: StepState | None = None,
    vocabulary: GroupSum | None = None,
) -> Runtime:
    """Make the runtime of this rank.

    Args:
        context: adds up over the ranks that hold the rest of each sequence.
        vocabulary: adds up over the ranks that hold the rest of each token's logits.
        state: shared with taps that were made before, if there are any.
        wandb_run: the host's own W&B writer where this rank has one.
        wandb_rank: the rank that writes to W&B: the host's writer rank, or 0.
    """
    state = state or StepState()
    monitors = build_monitors(config, model, context, vocabulary, state)
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
        state=state,
    )
    # each pipeline stage knows of its own layers only
    left_out = parallel.union_of_texts(model.left_out)
    for sentence in left_out:
        if writes:
            say(f"left out: {sentence}.")
    runtime.event(
        "start",
        progress.iteration,
        host=host,
        world_size=parallel.world_size(),
        layers=model.layers,
        hidden_size=None if model.residual is None else model.residual.width,
        monitors=[m.name for m in monitors],
        mode=config.recovery.mode,
        limits=limits,
        windows=config.detection.windows,
        versions=versions,
        left_out=left_out,
    )
    if progress.iteration > 0:
        runtime.resume(progress.iteration)
    return runtime


def _limits(config: Config, model: ModelView) -> dict[str, float]:
    """The limits of conservation residuals: by number format and sizes, and as set."""
    limits = residual_limits(model)
    return {name: config.detection.limit_of(name, given) for name, given in limits.items()}


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
