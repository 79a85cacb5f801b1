"""Attach the monitors to a built Megatron run, and carry out what a recovery plan orders."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.package_info import __version__ as megatron_version
from megatron.training import get_args, get_wandb_writer

from ... import __version__, parallel
from ...config import Config, DrillConfig
from ...errors import ConfigError, HostError
from ...messages import say
from ...recovery import StartOrder
from ...runtime import Runtime
from ..attach import Progress, attach
from ..ending import end_profiled
from ..observed_layer import LayerTap, observe_layer
from ..observed_norm import observe_norm
from ..observed_output import observe_output
from ..orders import put_fault, tell_remedy
from ..taps import AttentionTap, RouterTap, Tap
from ..wiring import tapped, wire
from .graphs import captured
from .kernels import faulty_kernel, safe_kernel, why_not_safe
from .kss import shape
from .model import MegatronModel
from .router_weights import routing_rule
from .stream import take_stream


def set_up(
    config: Config,
    order: StartOrder | None,
    chunks: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
) -> Runtime:
    """Describe the model, make the runtime, tap the modules, apply remedies.

    Raises:
        ConfigError: a monitor is required and the model has nothing for it; a drill names a layer
            that does not exist.
        HostError: the model was not built from a registered spec, or an ordered checkpoint was not
            loaded, or an ordered remedy can't be applied to this model.
    """
    args = get_args()
    model = MegatronModel(chunks, optimizer)
    model.view.sequence_length = args.seq_length
    take_stream(model.view, model.layers, model.config, model.groups, args)
    if not parallel.any_rank(bool(model.attentions or model.routers), model.view.device):
        raise HostError(
            "no layer of this model was built from a registered spec, so there is nothing to "
            "watch. Only models built by GPTModel are registered by the flag; for others give "
            "mcore_monitors.hosts.megatron.registration.register(spec) to the model."
        )
    _check_start(order, args)
    runtime = attach(
        config,
        model.view,
        model.context,
        Progress(
            iteration=args.iteration,
            attempt=order.attempt if order else 0,
            reports_loss=model.reports_loss,
        ),
        host="megatron-core",
        versions={
            "mcore-monitors": __version__,
            "megatron-core": megatron_version,
            "torch": torch.__version__,
        },
        wandb_run=get_wandb_writer(),
        wandb_rank=parallel.world_size() - 1 if getattr(args, "wandb_project", "") else 0,
        vocabulary=model.vocabulary,
    )
    _tap(runtime, model)
    if config.kss is not None:
        runtime.shaping = shape(config.kss, model, runtime.state)
    if order is not None:
        _obey(order, args, model, scheduler, runtime)
    if config.drill is not None:
        _start_drill(config.drill, model, runtime)
    _warn_of_graphs(model.config)
    if config.profile:
        _end_before_the_step(optimizer, runtime, args, model.view.device)
    return runtime


def _end_before_the_step(
    optimizer: Any, runtime: Runtime, args: Any, device: torch.device
) -> None:
    """Where the optimizer would take its first step, take the sample and end the process."""

    def step(*_: Any, **__: Any) -> None:
        runtime.on_step(
            runtime.state.iteration,
            loss=None,
            grad_norm=None,
            # the largest of the schedule, not that of the first step of a warm-up
            learning_rate=args.lr,
            consumed_samples=args.consumed_train_samples,
        )
        end_profiled(runtime, device)

    optimizer.step = step


def _check_start(order: StartOrder | None, args: Any) -> None:
    if order is not None and order.iteration != args.iteration:
        raise HostError(
            f"the recovery plan orders checkpoint {order.iteration} from {order.load_dir}, but "
            f"Megatron loaded iteration {args.iteration}. Nothing was trained; check the files."
        )


def _tap(runtime: Runtime, model: MegatronModel) -> None:
    for module in model.routers.values():
        module.mcore_monitors_tap = RouterTap()
        module.mcore_monitors_tap.tells_choice = routing_rule(module).chooses_by == "host"
    for module in model.attentions.values():
        module.mcore_monitors_tap = AttentionTap(runtime.state)
    wire(
        runtime,
        model.view,
        {layer: module.mcore_monitors_tap for layer, module in model.attentions.items()},
        {layer: module.mcore_monitors_tap for layer, module in model.routers.items()},
        tapped(model.norms, observe_norm, runtime),
        tapped(model.outputs, observe_output, runtime),
        _tapped_layers(model, runtime),
    )


def _tapped_layers(model: MegatronModel, runtime: Runtime) -> dict[int, Tap]:
    """Give each layer a tap of its own, where its profile is wanted."""
    koopman = next((m for m in runtime.crew.monitors if m.name == "koopman"), None)
    if koopman is None:
        return {}
    taps = {n: LayerTap(runtime.state, koopman.every) for n in model.view.residual.layers}
    for number, tap in taps.items():
        observe_layer(model.layers[number], tap, batch_first=False)
    return taps


def _obey(
    order: StartOrder, args: Any, model: MegatronModel, scheduler: Any, runtime: Runtime
) -> None:
    """Pass over samples and apply the remedies that are in force."""
    # The sampler resumes at consumed_train_samples; raising it passes data over on every pipeline
    # stage alike and leaves the learning-rate schedule, which counts its own steps, where it was.
    if order.pass_over_samples and getattr(args, "phase_transition_iterations", None):
        say(
            "the plan passes samples over, but with --phase-transition-iterations Megatron counts "
            "data by iterations; they are trained on again"
        )
    args.consumed_train_samples += order.pass_over_samples
    args.mcore_monitors_passed_over_samples = order.passed_over_total
    if order.remedy.attention == "safe":
        reason = why_not_safe(model.config)
        if reason is not None:
            raise HostError(
                "the recovery plan orders the safe attention path, which does not support "
                f"{reason}. Set recovery.remedies for this cause to another remedy, or repair the "
                "kernel."
            )
        for module in model.attentions.values():
            module.mcore_monitors_tap.safe = safe_kernel
    factor = order.remedy.learning_rate_factor
    if factor != 1.0:
        scale_learning_rate(scheduler, factor)
    runtime.obey()
    tell_remedy(order, runtime)


def scale_learning_rate(scheduler: Any, factor: float) -> None:
    """Multiply every learning rate that Megatron's schedule gives by ``factor``.

    The schedule's own settings stay as they are: they are saved in checkpoints and compared with
    the arguments on load.
    """
    given = scheduler.get_lr
    scheduler.get_lr = lambda group: factor * given(group)
    scheduler.step(increment=0)


def _start_drill(drill: DrillConfig, model: MegatronModel, runtime: Runtime) -> None:
    layers = drill.layers or list(range(1, model.view.layers + 1))
    for layer in layers:
        if not 1 <= layer <= model.view.layers:
            raise ConfigError("drill.layers", layer, f"1 to {model.view.layers}")
    taps = [m.mcore_monitors_tap for n, m in model.attentions.items() if n in layers]
    put_fault(drill, layers, taps, faulty_kernel(drill.strength), runtime)


def _warn_of_graphs(config: Any) -> None:
    if captured(config, "attention") and parallel.rank() == 0:
        say(
            "CUDA graphs capture the attention; Python hooks do not run in their replay, so its "
            "conservation residuals are missing. Signals from weights are complete."
        )
