"""The one object a host calls: what happens at each step, sample, checkpoint and end.

The way of a number is tap → sample → reduce → judge → act → report; this file is the road and
holds no formula and no rule. Every rank runs it. Readings are the same on all ranks after the
collective; judging, acting and writing happen on global rank 0, whose decision is then given to
all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import parallel
from .catalogue import SIGNALS, base_name
from .config import Config
from .crew import Crew, Failed
from .detection.judge import Judge
from .errors import EXIT_CHECKED, EXIT_GAVE_UP, EXIT_ROLLBACK, MonitorsError
from .messages import say
from .monitors.base import Monitor, StepState
from .recovery import Action, Recovery
from .sample import Sample
from .sinks import Sinks, effective_history
from .steps import StepLog

if TYPE_CHECKING:
    from .hosts.kss import Shaping

_GO_ON = 0
#: samples after which a check ends without a finite residual
_CHECK_SAMPLES = 50


class Runtime:
    """Carries a run's monitors from step to step.

    Args:
        config: the settings.
        monitors: this rank's monitors; every rank has the same ones in the same order.
        device: where the model's parameters live.
        sinks: where samples and events go on this rank; a null object where nothing is written.
        judge, recovery: on global rank 0 only.
        attempt: number of rollbacks so far.
        reports_loss: whether this rank's loss is the one to record (one rank of the run).
        state: where the step in progress stands, if taps were made before this; else a new one.
    """

    def __init__(
        self,
        config: Config,
        monitors: list[Monitor],
        device: torch.device,
        sinks: Sinks,
        *,
        judge: Judge | None,
        recovery: Recovery | None,
        attempt: int,
        reports_loss: bool,
        state: StepState | None = None,
    ) -> None:
        self.config, self.sinks = config, sinks
        self.judge, self.recovery, self.attempt = judge, recovery, attempt
        self.exit_code: int | None = None
        self._closed = False
        self._check_samples = 0
        self._device = device
        self._steps = StepLog(
            config.interval, loss=reports_loss, grad_norm=parallel.rank() == 0
        )
        self.state = StepState() if state is None else state
        #: the loss term of the layers' spectra, where the host has put one on
        self.shaping: Shaping | None = None
        self._arm(1)
        self.crew = Crew(monitors, device, self.state, self._steps.schema())

    def _arm(self, iteration: int) -> None:
        self.state.iteration = iteration
        self.state.armed = iteration % self.config.interval == 0

    # ---- what the host tells ----

    def obey(self) -> None:
        """Take note that the host has obeyed the recovery plan at this start."""
        if self.recovery is not None:
            self._act(self.recovery.on_start(), self.state.iteration - 1)

    def resume(self, iteration: int) -> None:
        """Go on after iteration ``iteration``: a checkpoint of it was loaded.

        The judge goes through the history that led there, as if the run had never stopped.
        """
        self._steps.clear()
        self.crew.restart()
        self._arm(iteration + 1)
        if self.judge is not None:
            self.judge.replay(effective_history(self.config.run_dir, upto=iteration))
        self.event("resume", iteration, from_iteration=iteration)

    def gone_back(self, iteration: int, attempt: int) -> None:
        """Go on in this process after a rollback that the host has carried out, like a fresh start.

        Args:
            iteration: of the checkpoint that was loaded.
            attempt: number of rollbacks so far, this one included.
        """
        self.exit_code, self.attempt = None, attempt
        if self.recovery is not None:
            self.recovery = Recovery.open(self.config.run_dir, self.config.recovery)
        self._arm(iteration + 1)
        self.obey()
        self.resume(iteration)

    def on_step(
        self,
        iteration: int,
        *,
        loss: torch.Tensor | float | None,
        grad_norm: torch.Tensor | float | None,
        learning_rate: float | None,
        consumed_samples: int,
    ) -> None:
        """Take in one finished step; on a sampled one, reduce, judge and act.

        Args:
            iteration: absolute number of the finished iteration, counted from 1.
            loss: mean loss in nats, where this rank knows it; a tensor is not synchronised here.
            grad_norm: global gradient norm before clipping, or None; a tensor is not synchronised.
            learning_rate: of this step, or None.
            consumed_samples: sequences that training has consumed in total.
        """
        self._steps.add(iteration, loss, grad_norm, consumed_samples)
        if self.shaping is not None:
            self._agree_on_shaping(iteration)
        if iteration % self.config.interval == 0:
            self._sample(iteration, learning_rate, consumed_samples)
        self._arm(iteration + 1)

    def _agree_on_shaping(self, iteration: int) -> None:
        for event in self.shaping.on_step(iteration):
            self.event(event.pop("kind"), iteration, **event)
            if self.config.strict and "error" in event:
                raise MonitorsError(f"strict: true, and kss failed: {event['error']}.")

    def _sample(self, iteration: int, learning_rate: float | None, consumed: int) -> None:
        start = time.perf_counter()
        self._steps.write(self.crew.fields)
        self.crew.collect(iteration)
        reduced = self.crew.reduce()
        self._tell_of(self.crew.drop_failed(reduced), iteration)
        sample = self._read(reduced, iteration, learning_rate, consumed, start)
        decision = _GO_ON
        if self.judge is not None:
            decision = self._judge(sample)
        self.sinks.sample(sample)
        if self.config.recovery.mode == "rollback":
            decision = parallel.broadcast_code(decision, self._device)
        if self.config.profile or (self.config.check and self._is_checked(sample)):
            decision = EXIT_CHECKED
        self.exit_code = decision or None
        self._steps.clear()

    def _is_checked(self, sample: Sample) -> bool:
        """Whether a check has what it needs: loss scaling may make the first steps overflow."""
        self._check_samples += 1
        return self._check_samples >= _CHECK_SAMPLES or any(
            math.isfinite(value)
            for signal, layers in sample.signals.items()
            if SIGNALS[base_name(signal)].family == "conservation"
            for values in layers.values()
            for value in values
        )

    def _tell_of(self, failed: Sequence[Failed], iteration: int) -> None:
        """Say loudly which monitors are off from now on, on all ranks."""
        for monitor, ranks, here in failed:
            error = here or "see the other ranks' output"
            if here or parallel.rank() == 0:
                say(
                    f"monitor {monitor!r} failed on {ranks} rank(s) at iteration {iteration} and "
                    f"is off on all ranks from now on; training goes on. {error}"
                )
            self.event("monitor_disabled", iteration, monitor=monitor, error=error)
        if failed and self.config.strict:
            names = ", ".join(one.monitor for one in failed)
            raise MonitorsError(f"strict: true, and these monitors failed: {names}.")

    def _read(
        self,
        reduced: dict[str, torch.Tensor],
        iteration: int,
        learning_rate: float | None,
        consumed: int,
        start: float,
    ) -> Sample:
        return Sample(
            iteration=iteration,
            attempt=self.attempt,
            time=time.time(),
            consumed_samples=consumed,
            first_step=self._steps.first,
            loss=self._steps.read("loss", reduced),
            grad_norm=self._steps.read("grad_norm", reduced),
            learning_rate=learning_rate,
            signals=self.crew.read(reduced),
            cost_seconds=time.perf_counter() - start,
        )

    # ---- rank 0 ----

    def _judge(self, sample: Sample) -> int:
        """Judge a sample and let recovery act on it; returns the exit code to leave with, or 0."""
        try:
            verdict = self.judge.update(sample)
            for alarm in verdict.alarms:
                self.event("alarm", sample.iteration, **alarm.to_event())
            if verdict.diagnosis is not None:
                self.event("diagnosis", sample.iteration, **verdict.diagnosis.to_event())
            if self.recovery is None:
                return _GO_ON
            action = self.recovery.on_verdict(
                verdict, iteration=sample.iteration, consumed_samples=sample.consumed_samples
            )
            return self._act(action, sample.iteration)
        except OSError as error:
            # The ledger could not be written, so nothing was decided; the next sample tries again.
            say(
                f"no decision at iteration {sample.iteration}, the run folder "
                f"could not be written: {error}. Trying again at the next sample."
            )
            return _GO_ON
        except Exception as error:  # judging never breaks a run
            self.judge = None
            text = f"{type(error).__name__}: {error}"
            say(
                f"detection failed at iteration {sample.iteration} and is off from "
                f"now on; training and recording go on. {text}"
            )
            self.event("monitor_disabled", sample.iteration, monitor="detection", error=text)
            return _GO_ON

    def _act(self, action: Action, iteration: int) -> int:
        for kind, record in action.events:
            self.event(kind, iteration, **record)
        if action.kind == "notify" and action.diagnosis is not None:
            say(action.diagnosis.sentence)
        elif action.kind == "gave_up":
            say(f"GAVE UP. {action.reason}")
        return {"rollback": EXIT_ROLLBACK, "gave_up": EXIT_GAVE_UP}.get(action.kind, _GO_ON)

    def on_checkpoint(self, iteration: int, path: str, consumed_samples: int) -> None:
        """Enter a finished checkpoint into the ledger. Called on global rank 0 only."""
        if self.recovery is None:
            return
        try:
            self._act(
                self.recovery.on_checkpoint(
                    iteration=iteration,
                    path=path,
                    consumed_samples=self._steps.consumed_at(iteration, consumed_samples),
                ),
                iteration,
            )
        except Exception as error:  # a full disk under the run folder must not stop training
            say(
                f"checkpoint {iteration} could not be entered into the ledger and "
                f"will not be used for a rollback. {error}"
            )

    def event(self, kind: str, iteration: int, **fields: Any) -> None:
        """Write one event where this rank writes."""
        self.sinks.event(
            {"kind": kind, "iteration": iteration, "attempt": self.attempt, **fields}
        )

    def close(self) -> None:
        """End of the run or of this attempt; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self.event("stop", self.state.iteration - 1, exit_code=self.exit_code or 0)
            self.sinks.close(self.exit_code or 0)
