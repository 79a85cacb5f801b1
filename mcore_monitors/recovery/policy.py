"""Acting on verdicts: the one place where a run is sent back, and the keeper of the ledger.

Global rank 0 has one of these; what it decides is given to all ranks by the runtime.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcore_monitors.detection.alarm import CRITICAL, Diagnosis, Verdict
from mcore_monitors.recovery import files
from mcore_monitors.recovery.config import RecoveryConfig
from mcore_monitors.recovery.ledger import (
    APPLIED,
    DONE,
    PENDING,
    PLANNED,
    SUSPECT,
    VERIFIED,
    Checkpoint,
    Ledger,
    Plan,
)
from mcore_monitors.recovery.plan import GaveUp, make_plan, reject, suspect_from_onset
from mcore_monitors.recovery.start import resolve

NONE, NOTIFY, ROLLBACK, GAVE_UP = "none", "notify", "rollback", "gave_up"


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the runtime has to do now."""

    kind: str
    """``none``, ``notify`` (say ``diagnosis`` aloud), ``rollback`` (end with exit code 85) or
    ``gave_up`` (end with exit code 86)."""
    events: tuple[tuple[str, dict[str, Any]], ...] = ()
    """What changed, as (kind, fields) of events to record."""
    diagnosis: Diagnosis | None = None
    """With ``notify``: what to say."""
    plan: Plan | None = None
    """With ``rollback``: the plan, which is on disk already."""
    reason: str | None = None
    """With ``gave_up``: for the person who has to look."""


class Recovery:
    """Keeps the ledger and decides, for one process of global rank 0.

    Only critical alarms count: warnings neither send a run back nor spoil a checkpoint.
    """

    def __init__(self, config: RecoveryConfig, ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self._started = False
        self._noisy_at: int | None = None
        self._onset: int | None = None

    @classmethod
    def open(
        cls, run_dir: str | os.PathLike[str], config: RecoveryConfig, *, interval: int = 1
    ) -> Recovery:
        """Read the ledger of a run folder; changes nothing.

        Args:
            run_dir: the run folder.
            config: the settings.
            interval: iterations between two samples.

        Raises:
            ConfigError: ``quiet`` is not even one interval.
            RecoveryError: the ledger cannot be used.
        """
        config.check_quiet(interval)
        return cls(config, Ledger.load(run_dir))

    @property
    def attempt(self) -> int:
        """Number of rollbacks that this process runs after."""
        return sum(plan.status != PLANNED for plan in self.ledger.plans)

    def on_start(self) -> Action:
        """Take note that the host has obeyed the order of :func:`.resolve_start`.

        Without this call the first sample or checkpoint takes note of it.

        Raises:
            GaveUpError: no checkpoint is left that the plan could go back to.
            OSError: the ledger could not be written.
        """
        ledger = self.ledger.copy()
        resolution = resolve(ledger)
        if resolution is None:
            self._started = True
            return Action(kind=NONE)
        reject(resolution.wrong)
        if resolution.plan.status == PLANNED:
            resolution.plan.status = APPLIED
        if resolution.plan != ledger.plans[-1] or resolution.wrong:
            ledger.plans[-1] = resolution.plan
            self._keep(ledger)
        self._started = True
        return Action(kind=NONE, events=tuple(_status_event(c) for c, _ in resolution.wrong))

    def on_verdict(self, verdict: Verdict, *, iteration: int, consumed_samples: int) -> Action:
        """Act on one sample's verdict.

        Args:
            verdict: what the judge found.
            iteration: iteration of the sample.
            consumed_samples: training samples consumed by then.

        Raises:
            OSError: the ledger could not be written; the decision was not taken.
        """
        if not self._started:
            self.on_start()
        standing = verdict.standing
        if standing is None or standing.severity != CRITICAL:
            self._onset = None
            events = self._quiet(iteration)
            if standing is not None and verdict.diagnosis is not None:
                return self._say(verdict.diagnosis, events)
            return Action(kind=NONE, events=tuple(events))
        self._noisy_at, self._onset = iteration, standing.onset_iteration
        if self.config.mode == "rollback":
            return self._go_back(standing, iteration, consumed_samples)
        ledger = self.ledger.copy()
        spoilt = suspect_from_onset(ledger, standing.onset_iteration)
        if spoilt:
            self._keep(ledger)
        events = [_status_event(checkpoint) for checkpoint in spoilt]
        if verdict.diagnosis is None:
            return Action(kind=NONE, events=tuple(events))
        return self._say(verdict.diagnosis, events)

    def on_checkpoint(self, *, iteration: int, path: str, consumed_samples: int) -> Action:
        """Enter a checkpoint that the host has finished writing.

        Raises:
            OSError: its files cannot be read, or the ledger could not be written.
        """
        if not self._started:
            self.on_start()
        plan = self.ledger.last_plan
        checkpoint = Checkpoint(
            iteration=iteration,
            attempt=self.attempt,
            path=str(Path(path).absolute()),
            written_at=time.time(),
            consumed_samples=consumed_samples,
            passed_over_samples=0 if plan is None else plan.passed_over_total,
            digest=files.digest(path),
        )
        if self._onset is not None:
            checkpoint.status = SUSPECT
            checkpoint.reason = f"a fault began at iteration {self._onset}"
        ledger = self.ledger.copy()
        ledger.enter(checkpoint)
        self._keep(ledger)
        return Action(kind=NONE, events=(_status_event(checkpoint),))

    def _say(self, diagnosis: Diagnosis, events: list[tuple[str, dict[str, Any]]]) -> Action:
        kind = NONE if self.config.mode == "log" else NOTIFY
        return Action(kind=kind, events=tuple(events), diagnosis=diagnosis)

    def _quiet(self, iteration: int) -> list[tuple[str, dict[str, Any]]]:
        """Verify what has proved itself by a quiet ``iteration``; return the events."""
        events, ledger = [], self.ledger.copy()
        since = -1 if self._noisy_at is None else self._noisy_at
        for checkpoint in ledger.checkpoints:
            if checkpoint.status != PENDING:
                continue
            if checkpoint.iteration > iteration:
                # The host went back by itself; nobody will see how this one would have gone on.
                checkpoint.status, checkpoint.reason = SUSPECT, "left behind by a restart"
            elif iteration - max(checkpoint.iteration, since) >= self.config.quiet:
                checkpoint.status = VERIFIED
            else:
                continue
            events.append(_status_event(checkpoint))
        plan = ledger.last_plan
        if (
            plan is not None
            and plan.status == APPLIED
            and iteration - max(plan.alarm_iteration, since) >= self.config.quiet
        ):
            plan.status = DONE
            events.append(("recovered", {"plan_id": plan.id}))
        if events:
            self._keep(ledger)
        return events

    def _keep(self, ledger: Ledger) -> None:
        """Write a changed copy of the ledger, and only then go by it.

        A disk that refuses leaves both the file and this process with the state before the change.
        """
        ledger.save()
        self.ledger = ledger

    def _go_back(self, diagnosis: Diagnosis, iteration: int, consumed_samples: int) -> Action:
        if self.ledger.gave_up is not None:
            return Action(kind=GAVE_UP, reason=self.ledger.gave_up["reason"])
        plan = self.ledger.last_plan
        if plan is not None and plan.status == PLANNED:
            return Action(kind=ROLLBACK, plan=plan)
        ledger = self.ledger.copy()
        made = make_plan(
            ledger,
            self.config,
            diagnosis,
            iteration=iteration,
            consumed_samples=consumed_samples,
        )
        if isinstance(made, GaveUp):
            ledger.gave_up = {
                "iteration": iteration,
                "time": time.time(),
                "reason": made.reason,
            }
        # One write for all of it: a kill leaves either no plan and no new status, or both.
        before = {c.path: c.status for c in self.ledger.checkpoints}
        self._keep(ledger)
        events = [_status_event(c) for c in ledger.checkpoints if before[c.path] != c.status]
        if isinstance(made, GaveUp):
            events.append(("gave_up", {"reason": made.reason}))
            return Action(kind=GAVE_UP, events=tuple(events), reason=made.reason)
        events.append(("rollback", {"plan": asdict(made)}))
        return Action(kind=ROLLBACK, events=tuple(events), plan=made)


def _status_event(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    return "checkpoint", {
        "path": checkpoint.path,
        "status": checkpoint.status,
        "checkpoint_iteration": checkpoint.iteration,
        "reason": checkpoint.reason,
    }
