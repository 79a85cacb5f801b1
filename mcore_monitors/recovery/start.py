"""What has to be obeyed at a start: read by every rank, changed by none.

Any scheduler may start the run again at any time, so the answer depends on the files alone, and
asking twice gives the same answer twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mcore_monitors.errors import EXIT_GAVE_UP, RecoveryError
from mcore_monitors.recovery.config import Remedy
from mcore_monitors.recovery.ledger import (
    FAILED,
    PENDING,
    SUSPECT,
    VERIFIED,
    Checkpoint,
    Ledger,
    Plan,
)
from mcore_monitors.recovery.plan import first_sound, move_plan


class GaveUpError(RecoveryError):
    """The run has given up; it starts again only after a person has decided so."""

    exit_code = EXIT_GAVE_UP


@dataclass(frozen=True, kw_only=True)
class StartOrder:
    """How this start differs from the host's own."""

    plan_id: str
    """The plan behind it."""
    attempt: int
    """Number of rollbacks so far, this one included."""
    checkpoint_path: str
    """Checkpoint to load."""
    iteration: int
    """Its iteration."""
    pass_over_samples: int
    """Samples to leave out on top of those that the checkpoint has consumed; 0 where it was written
    after the plan was applied, because it has them behind it."""
    passed_over_total: int
    """Samples passed over since the beginning of the run, these included."""
    remedy: Remedy
    """What is in force from here on."""

    @property
    def load_dir(self) -> str:
        """Folder that the checkpoint lies in."""
        return str(Path(self.checkpoint_path).parent)

    @property
    def name(self) -> str:
        """Name of the checkpoint in that folder (DeepSpeed's tag)."""
        return Path(self.checkpoint_path).name


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A start order with what was found on the way to it."""

    order: StartOrder
    plan: Plan
    """The plan as it is obeyed: a copy, with another checkpoint where the files of its own no
    longer match."""
    wrong: list[tuple[Checkpoint, str]]
    """Checkpoints whose files no longer match, and how."""


def resolve_start(run_dir: str | os.PathLike[str], mode: str = "rollback") -> StartOrder | None:
    """Return what this start has to obey, or None where no plan was ever made.

    Once there is a plan, the ledger names the checkpoint of every start: the newest one written
    since the plan was applied, or, until there is one, the plan's own. The host's own choice, what
    was written last, could belong to the course that was left. A plan is obeyed in every mode. Reads the ledger and looks at the files of a few checkpoints;
    changes nothing, so that all ranks may ask at once.

    Args:
        run_dir: the run folder.
        mode: ``recovery.mode``; a run that gave up starts again in the modes that only watch.

    Raises:
        GaveUpError: the run gave up, or no checkpoint is left that the plan could go back to.
        RecoveryError: the ledger cannot be used.
    """
    ledger = Ledger.load(run_dir)
    if ledger.gave_up is not None and mode == "rollback":
        raise GaveUpError(
            f"this run gave up at iteration {ledger.gave_up['iteration']} and does not start again "
            f"by itself. {ledger.gave_up['reason']} When the cause is mended, either set gave_up "
            f"to null in {ledger.path} (remedies stay in force), or move the file away to forget "
            "all of it; recovery.mode: log watches without acting."
        )
    resolution = resolve(ledger)
    return None if resolution is None else resolution.order


def resolve(ledger: Ledger) -> Resolution | None:
    """Return what the ledger demands of a start, or None where it holds no plan."""
    plan = ledger.last_plan
    if plan is None:
        return None
    plan = replace(plan)
    # Behind a plan that failed the fault was there; what it left pending was never seen to be good.
    trusted = (VERIFIED,) if plan.status == FAILED else (VERIFIED, PENDING)
    later = [c for c in ledger.checkpoints if c.attempt >= plan.attempt and c.status in trusted]
    later.sort(key=lambda checkpoint: checkpoint.iteration, reverse=True)
    checkpoint, wrong = first_sound(later)
    if checkpoint is None:
        named = [c for c in ledger.checkpoints if c.path == plan.checkpoint_path]
        usable = [c for c in named if c.status != SUSPECT]
        earlier = [c for c in ledger.good(plan.checkpoint_iteration) if c not in usable]
        checkpoint, more = first_sound([*usable, *earlier])
        wrong += more
        if checkpoint is None:
            raise GaveUpError(
                f"{plan.id} has to go back to iteration {plan.checkpoint_iteration} "
                f"({plan.checkpoint_path}), but neither that checkpoint nor any verified one "
                f"before it is whole: {_list(wrong)}. Restore one, or move {ledger.path} away to "
                "start without a plan."
            )
        if checkpoint.path != plan.checkpoint_path:
            move_plan(plan, checkpoint, named[0] if named else None)
    return Resolution(order=_order(plan, checkpoint), plan=plan, wrong=wrong)


def _order(plan: Plan, checkpoint: Checkpoint) -> StartOrder:
    behind = checkpoint.attempt >= plan.attempt
    return StartOrder(
        plan_id=plan.id,
        attempt=plan.attempt,
        checkpoint_path=checkpoint.path,
        iteration=checkpoint.iteration,
        pass_over_samples=0 if behind else plan.pass_over_samples,
        passed_over_total=plan.passed_over_total,
        remedy=plan.remedy,
    )


def _list(wrong: list[tuple[Checkpoint, str]]) -> str:
    return "; ".join(f"{c.path}: {why}" for c, why in wrong) or "none is on record"
