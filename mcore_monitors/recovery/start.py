"""What a start has to obey. Asked at every start, so that any scheduler's restart does the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RecoveryError
from .config import Remedy
from .ledger import Ledger, damage


@dataclass(frozen=True, kw_only=True)
class StartOrder:
    """Which checkpoint to load and what is in force from there on."""

    iteration: int
    checkpoint_path: str
    #: number of rollbacks so far
    attempt: int
    #: samples to pass over behind the checkpoint; 0 where it was saved after they had been
    pass_over_samples: int
    #: samples that all plans pass over, which the data set has to hold in addition
    passed_over_total: int
    remedy: Remedy

    @property
    def load_dir(self) -> str:
        """The folder that holds the run's checkpoints."""
        return str(Path(self.checkpoint_path).parent)


def resolve_start(run_dir: str | Path) -> StartOrder | None:
    """Say what this start has to load, or None to leave the choice to the host.

    Without a plan the host chooses. After a plan, its own choice (the newest checkpoint) could be
    one of the abandoned course; then it is the newest checkpoint written since the plan was
    applied, or, until there is one, the plan's checkpoint with its samples passed over.

    Raises:
        RecoveryError: the ledger can't be read, or the ordered checkpoint is damaged.
    """
    ledger = Ledger.load(run_dir)
    plan = ledger.plan
    if plan is None:
        return None
    path, iteration, pass_over = (
        plan.checkpoint_path,
        plan.checkpoint_iteration,
        plan.pass_over_samples,
    )
    since = [
        c
        for c in ledger.checkpoints
        if c.attempt == plan.attempt and c.status != "suspect" and Path(c.path).is_dir()
    ]
    if since:
        newest = since[-1]
        path, iteration, pass_over = newest.path, newest.iteration, 0
    elif wrong := damage(path, plan.checkpoint_digest):
        raise RecoveryError(
            f"the recovery plan of {ledger.path} orders checkpoint {iteration}, but {wrong}. "
            "Restore it, or move recovery.json away and choose a checkpoint by hand."
        )
    return StartOrder(
        iteration=iteration,
        checkpoint_path=path,
        attempt=plan.attempt,
        pass_over_samples=pass_over,
        passed_over_total=ledger.passed_over_samples,
        remedy=Remedy(
            attention=plan.attention, learning_rate_factor=plan.learning_rate_factor
        ),
    )
