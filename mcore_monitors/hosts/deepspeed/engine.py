"""The monitors of one DeepSpeed engine, from its start to its end."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ... import __version__, parallel
from ...config import Config
from ...errors import EXIT_ROLLBACK, ConfigError, HostError
from ...messages import say
from ...monitors.base import StepState
from ...parallel import GroupSum
from ...recovery import StartOrder
from ...runtime import Runtime
from ...views import Replica
from ..attach import Progress, attach
from ..ending import end_profiled
from ..observed_norm import observe_norm
from ..observed_output import observe_output
from ..orders import tell_remedy
from ..refusal import refusing
from ..wiring import tapped, wire
from .checkpoints import Checkpoints, order_for_all
from .data import data_way
from .describe import describe
from .kss import LossScale, shape
from .optimizer_state import take_optimizer
from .remedies import LearningRate, start_drill, use_safe_attention
from .rollback import go_back
from .stream import largest_rate, take_stream, tapped_layers

#: sequence length where the model doesn't say; only the bfloat16 limit of the key shift depends on
#: it, as its power −0.15
_LENGTH = 1024


class EngineMonitors:
    """What :func:`mcore_monitors.attach` returns: the monitors of a DeepSpeed engine.

    Args:
        engine: a built engine.
        config: the settings.
        on_rollback: puts the training script's data back; see :func:`mcore_monitors.attach`.

    Attributes:
        engine: the engine that is watched.
        config: the settings.
        runtime: carries the monitors from step to step.

    Raises:
        ConfigError: a setting can't be used with this engine or model.
        HostError: this kind of engine can't be monitored, or a recovery plan can't be obeyed.
        RecoveryError: the recovery state can't be used, or the run has given up.
    """

    def __init__(
        self, engine: Any, config: Config, on_rollback: Callable[[int], None] | None = None
    ) -> None:
        if isinstance(engine, PipelineEngine):
            raise HostError(
                "DeepSpeed's PipelineEngine takes its steps without step(); it can't be monitored."
            )
        self.engine, self.config, self.on_rollback = engine, config, on_rollback
        self.checkpoints = Checkpoints(engine)
        self.learning_rate = LearningRate(engine)
        self._loss: torch.Tensor | None = None
        self._micro_batches = 0
        self._checked = False
        order = order_for_all(config)
        if order is not None:
            self.checkpoints.answer = self.checkpoints.load_ordered(order)
        self._state = StepState()
        self._loss_scale = None if config.kss is None else LossScale(engine)
        self._model = self._describe()
        self.runtime = self._open(order)
        atexit.register(self.runtime.close)
        backward = engine.backward
        engine.backward = self._watched_backward(backward)
        if config.profile:
            self._end_before_the_step()

    def position(self) -> int:
        """Sequences of the whole run that are behind it, passed-over ones included.

        The next batch begins there: a script that counts its data from here needs nothing else to
        obey a recovery plan, in place or after a new start.
        """
        return self.engine.global_samples

    def _describe(self) -> Any:
        engine = self.engine
        everyone = Replica(rank=parallel.rank(), size=parallel.world_size())
        model = describe(
            engine.module,
            device=engine.device,
            zero_stage=engine.zero_optimization_stage(),
            # non-expert weights are the same on every rank
            replica=everyone,
            # where ranks share sequences, who shares with whom is not known
            data=everyone if engine.dp_world_size == everyone.size else Replica(),
            state=self._state,
            activation_dtype=(
                engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
            ),
        )
        config = getattr(engine.module, "config", None)
        longest = getattr(config, "max_position_embeddings", None) or _LENGTH
        model.view.sequence_length = min(int(longest), _LENGTH)
        take_stream(model, engine)
        self._adam = take_optimizer(model, engine, self._state)
        return model

    def _open(self, order: StartOrder | None) -> Runtime:
        runtime = attach(
            self.config,
            self._model.view,
            GroupSum(None),
            Progress(
                iteration=self.engine.global_steps,
                attempt=order.attempt if order else 0,
                # each rank's loss is that of its own tokens: the mean of all is recorded
                reports_loss=True,
            ),
            host="deepspeed",
            versions={
                "mcore-monitors": __version__,
                "deepspeed": deepspeed.__version__,
                "torch": torch.__version__,
            },
            state=self._state,
        )
        wire(
            runtime,
            self._model.view,
            {n: m.mcore_monitors_tap for n, m in self._model.attentions.items()},
            {n: m.mcore_monitors_tap for n, m in self._model.routers.items()},
            tapped(self._model.norms, observe_norm, runtime),
            tapped(self._model.outputs, observe_output, runtime),
            layers=tapped_layers(self._model.layers, runtime),
        )
        if self._adam is not None:
            self._adam.listen(runtime)
        if self._loss_scale is not None:
            runtime.shaping = shape(self.config.kss, self._model, self._state, self._loss_scale)
        if order is not None:
            self.apply(order)
            runtime.obey()
            tell_remedy(order, runtime)
        if self.config.drill is not None:
            start_drill(self.config.drill, self._model, runtime)
        return runtime

    def apply(self, order: StartOrder) -> None:
        """Put the remedies of a plan in force.

        Raises:
            HostError: the model's attention can't take the safe path.
        """
        if order.remedy.attention == "safe":
            use_safe_attention(self._model)
        self.learning_rate.factor = order.remedy.learning_rate_factor

    def _watched_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            loss: torch.Tensor,
            retain_graph: bool = False,
            scale_wrt_gas: bool = True,
            **kwargs: Any,
        ) -> Any:
            # what the script has divided by the number of micro-batches is a part of the sum
            whole = 1 if scale_wrt_gas else self.engine.gradient_accumulation_steps()
            mean = whole * loss.detach().float().mean()
            self._loss = mean if self._loss is None else self._loss + mean
            self._micro_batches += 1
            if self._loss_scale is not None:
                self._loss_scale.watch(loss, scale_wrt_gas)
            return backward(loss, retain_graph, scale_wrt_gas, **kwargs)

        return watched

    def _take_loss(self) -> torch.Tensor | None:
        loss = None if self._loss is None else self._loss / self._micro_batches
        self._loss, self._micro_batches = None, 0
        return loss

    def on_step(self) -> None:
        """The optimizer step of a full batch is done, on every rank."""
        engine, runtime = self.engine, self.runtime
        self.checkpoints.answer = None
        if not self._checked:
            with refusing():
                self._check_way()
        rates = engine.get_lr()
        runtime.on_step(
            engine.global_steps,
            loss=self._take_loss(),
            grad_norm=engine.get_global_grad_norm(),
            learning_rate=float(rates[0]) if rates else None,
            consumed_samples=engine.global_samples,
        )
        code = runtime.exit_code
        if code is None or (code == EXIT_ROLLBACK and self._goes_back_in_place()):
            return
        runtime.close()
        sys.exit(code)

    def _check_way(self) -> None:
        """See at the first step that in-place rollback, where demanded, can put the data back."""
        self._checked = True
        recovery = self.config.recovery
        if recovery.mode == "rollback" and recovery.how == "in_place" and not self._way():
            raise ConfigError(
                "recovery.how",
                "in_place",
                "auto or relaunch with this training script",
                "Its data can't be put back: give mcore_monitors.attach(engine, on_rollback=…), or "
                "let DeepSpeed load the data (training_data of deepspeed.initialize).",
            )

    def _way(self) -> Callable[[int], None] | None:
        return data_way(self.engine, self.on_rollback)

    def _goes_back_in_place(self) -> bool:
        """Carry out the plan that was just written; False where the process has to end for it."""
        way = self._way()
        # one rank that can't is enough: the others would wait for it
        if self.config.recovery.how == "relaunch" or parallel.any_rank(
            way is None, self.engine.device
        ):
            return False
        try:
            go_back(self, way)
        except Exception as error:
            # The plan is on disk and not yet marked as obeyed: a fresh start does all of it again.
            say(
                f"the rollback could not be carried out in place; ending, so that the next start "
                f"obeys the plan. {type(error).__name__}: {error}"
            )
            return False
        return True

    def _end_before_the_step(self) -> None:
        """Where the optimizer would take its first step, take the sample and end the process."""
        engine, step = self.engine, self.engine.step

        def last(*args: Any, **kwargs: Any) -> None:
            if not engine.is_gradient_accumulation_boundary():
                step(*args, **kwargs)
                return
            self.runtime.on_step(
                self.runtime.state.iteration,
                loss=None,
                grad_norm=None,
                learning_rate=largest_rate(engine),
                consumed_samples=engine.global_samples,
            )
            end_profiled(self.runtime, engine.device)

        engine.step = last

    def on_load(self, load_path: str | None) -> None:
        """The training script loaded a checkpoint: go on from its iteration."""
        if load_path is not None and not self.checkpoints.loading:
            self.runtime.resume(self.engine.global_steps)

    def on_checkpoint(self, path: str) -> None:
        """A checkpoint is complete on disk, on every rank."""
        self.runtime.on_checkpoint(self.engine.global_steps, path, self.engine.global_samples)
