"""What follows from a verdict: checkpoints verified or suspect, a plan, or the end.

Runs on global rank 0 only. Knows nothing of how a host saves or loads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..detection.alarm import CRITICAL, Diagnosis, Verdict
from .config import RecoveryConfig
from .ledger import Checkpoint, Ledger, digest
from .plan import GaveUp, make_plan


@dataclass(kw_only=True)
class Action:
    """What the run has to do, and the events that say why."""

    kind: Literal["none", "notify", "rollback", "gave_up"] = "none"
    #: (event kind, its fields)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class Recovery:
    """Keeps the ledger and decides.

    Args:
        config: the settings.
        ledger: the run's ledger; written whenever it changes.
    """

    def __init__(self, config: RecoveryConfig, ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self._diagnosis: Diagnosis | None = None

    @classmethod
    def open(cls, run_dir: str | Path, config: RecoveryConfig) -> Recovery:
        """Read the ledger of a run folder.

        Raises:
            RecoveryError: it can't be read.
        """
        return cls(config, Ledger.load(run_dir))

    def on_start(self) -> Action:
        """The order of a plan was obeyed: the run goes on from its checkpoint."""
        plan = self.ledger.plan
        if plan is not None and plan.status == "planned":
            plan.status = "applied"
            self.ledger.save()
        return Action()

    def on_checkpoint(self, *, iteration: int, path: str, consumed_samples: int) -> Action:
        """A checkpoint is complete on disk."""
        checkpoint = Checkpoint(
            iteration=iteration,
            attempt=self.ledger.attempt,
            path=str(Path(path).absolute()),
            consumed_samples=consumed_samples,
            digest=digest(path),
        )
        self.ledger.enter(checkpoint)
        self.ledger.save()
        return Action(events=[_status(checkpoint)])

    def on_verdict(self, verdict: Verdict, *, iteration: int, consumed_samples: int) -> Action:
        """Take in what detection says of one sample.

        Only critical alarms make checkpoints suspect, hold back verification and start a rollback.
        """
        self._diagnosis = verdict.diagnosis or self._diagnosis
        critical = [a for a in verdict.active if a.severity == CRITICAL]
        if not critical:
            return self._calm(iteration)
        action = Action(events=self._suspect(min(a.onset_iteration for a in critical)))
        if self._diagnosis is not None and self.config.mode == "rollback":
            self._plan(action, iteration, consumed_samples)
        elif self.config.mode == "notify" and verdict.alarms:
            action.kind = "notify"
        if action.events:
            self.ledger.save()
        return action

    def _suspect(self, onset: int) -> list[tuple[str, dict[str, Any]]]:
        events = []
        for checkpoint in self.ledger.checkpoints:
            if checkpoint.iteration >= onset and checkpoint.status != "suspect":
                checkpoint.status = "suspect"
                events.append(_status(checkpoint))
        return events

    def _calm(self, iteration: int) -> Action:
        """Verify what has been quiet for long enough."""
        action = Action()
        for checkpoint in self.ledger.checkpoints:
            # an abandoned course's checkpoint is suspect or was written over
            if checkpoint.status == "pending" and checkpoint.attempt == self.ledger.attempt:
                if iteration - checkpoint.iteration >= self.config.quiet:
                    checkpoint.status = "verified"
                    action.events.append(_status(checkpoint))
        plan = self.ledger.plan
        if plan is not None and plan.status == "applied":
            if iteration >= plan.alarm_iteration + self.config.quiet:
                plan.status = "done"
                action.events.append(("recovered", {"plan_id": plan.attempt}))
        if action.events:
            self.ledger.save()
        return action

    def _plan(self, action: Action, iteration: int, consumed_samples: int) -> None:
        plan = make_plan(
            self.ledger, self.config, self._diagnosis, iteration, consumed_samples
        )
        if isinstance(plan, GaveUp):
            action.kind = "gave_up"
            action.events.append(("gave_up", {"reason": plan.reason}))
            return
        # What was written on the abandoned course after the checkpoint must never be loaded.
        for checkpoint in self.ledger.checkpoints:
            if checkpoint.iteration > plan.checkpoint_iteration:
                checkpoint.status = "suspect"
        self.ledger.plans.append(plan)
        action.kind = "rollback"
        action.events.append(("rollback", {"plan": asdict(plan)}))


def _status(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    return "checkpoint", {
        "path": checkpoint.path,
        "status": checkpoint.status,
        "checkpoint_iteration": checkpoint.iteration,
    }
