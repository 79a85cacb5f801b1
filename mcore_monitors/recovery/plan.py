"""Making a plan: which checkpoint, which samples to leave out, which remedy, or giving up.

A plan goes back to the newest *verified* checkpoint that lies before the onset. A pending one is
never used, and neither is the beginning of the run: both would trade a question that a person can
answer in a minute (is this checkpoint good? is this run worth starting over?) for a risk that the
run takes on its own at night.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from mcore_monitors.detection.alarm import Diagnosis
from mcore_monitors.recovery import files
from mcore_monitors.recovery.config import UP_TO_THE_ALARM, RecoveryConfig, Remedy
from mcore_monitors.recovery.ledger import FAILED, SUSPECT, Checkpoint, Ledger, Plan


@dataclass(frozen=True, kw_only=True)
class GaveUp:
    """No rollback is possible or allowed any more."""

    reason: str
    """For the person who has to look: what was tried, why it ends, what to do."""


def first_sound(
    candidates: Iterable[Checkpoint],
) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """Return the first candidate whose files match, and those before it with what is wrong."""
    wrong: list[tuple[Checkpoint, str]] = []
    for checkpoint in candidates:
        difference = files.difference(checkpoint.path, checkpoint.digest)
        if difference is None:
            return checkpoint, wrong
        wrong.append((checkpoint, difference))
    return None, wrong


def reject(wrong: list[tuple[Checkpoint, str]]) -> None:
    """Mark checkpoints whose files do not match as suspect."""
    for checkpoint, why in wrong:
        checkpoint.status, checkpoint.reason = SUSPECT, why


def make_plan(
    ledger: Ledger,
    config: RecoveryConfig,
    diagnosis: Diagnosis,
    *,
    iteration: int,
    consumed_samples: int,
) -> Plan | GaveUp:
    """Return the plan for a critical diagnosis and enter it into the ledger, which is not saved.

    Checkpoints from the onset on, and those whose files do not match, become suspect; with a plan,
    so do all that are newer than its checkpoint, because the run leaves them behind.

    Args:
        ledger: changed in place.
        config: remedies and bounds.
        diagnosis: what is wrong; its onset decides how far to go back.
        iteration: iteration of the alarm.
        consumed_samples: training samples consumed by then.
    """
    onset = diagnosis.onset_iteration
    suspect_from_onset(ledger, onset)
    episode = ledger.episode
    if episode and episode[-1].status != FAILED:
        episode[-1].status = FAILED
    if len(episode) >= config.max_attempts:
        return GaveUp(reason=_spent(config, episode, diagnosis, iteration))
    checkpoint, wrong = first_sound(ledger.good(onset - config.margin))
    reject(wrong)
    if checkpoint is None:
        return GaveUp(reason=_nothing_good(ledger, config, diagnosis, iteration))
    for newer in ledger.checkpoints:
        if newer.iteration > checkpoint.iteration and newer.status != SUSPECT:
            newer.status, newer.reason = SUSPECT, "left behind by a rollback"
    before = ledger.last_plan
    remedy = config.remedy(diagnosis.cause).on_top_of(before.remedy if before else Remedy())
    number = len(ledger.plans) + 1
    passed = _pass_over(ledger, remedy, checkpoint, episode, consumed_samples)
    plan = Plan(
        id=f"rollback-{number}",
        attempt=number,
        episode_attempt=len(episode) + 1,
        created_at=time.time(),
        alarm_iteration=iteration,
        onset_iteration=onset,
        cause=diagnosis.cause,
        sentence=diagnosis.sentence,
        checkpoint_iteration=checkpoint.iteration,
        checkpoint_path=checkpoint.path,
        remedy=remedy,
        pass_over_samples=passed,
        passed_over_total=checkpoint.passed_over_samples + passed,
    )
    ledger.plans.append(plan)
    return plan


def move_plan(plan: Plan, checkpoint: Checkpoint, before: Checkpoint | None) -> None:
    """Let a plan go to another checkpoint, because the files of its own no longer match.

    What was to be passed over stays so: the stretch is extended backwards to the new checkpoint. If
    nothing was to be passed over, nothing is.

    Args:
        plan: changed in place.
        checkpoint: the older checkpoint to go to.
        before: the checkpoint that the plan named.
    """
    if plan.pass_over_samples and before is not None:
        plan.pass_over_samples += before.consumed_samples - checkpoint.consumed_samples
    plan.checkpoint_iteration, plan.checkpoint_path = checkpoint.iteration, checkpoint.path
    plan.passed_over_total = checkpoint.passed_over_samples + plan.pass_over_samples


def suspect_from_onset(ledger: Ledger, onset: int) -> list[Checkpoint]:
    """Mark every checkpoint from the onset on as suspect; return those that were not yet."""
    found = [c for c in ledger.checkpoints if c.iteration >= onset and c.status != SUSPECT]
    for checkpoint in found:
        checkpoint.status, checkpoint.reason = SUSPECT, f"a fault began at iteration {onset}"
    return found


def _pass_over(
    ledger: Ledger,
    remedy: Remedy,
    checkpoint: Checkpoint,
    episode: list[Plan],
    consumed_samples: int,
) -> int:
    """Return the samples to leave out, those that earlier attempts of the episode left out included.

    Samples can only be left out in one stretch behind the checkpoint, so it reaches at least as far
    as each of theirs did.
    """
    wanted = remedy.pass_over
    if wanted == UP_TO_THE_ALARM:
        wanted = consumed_samples - checkpoint.consumed_samples
    starts = {c.path: c.consumed_samples for c in ledger.checkpoints}
    ends = [
        starts[plan.checkpoint_path] + plan.pass_over_samples - checkpoint.consumed_samples
        for plan in episode
        if plan.pass_over_samples and plan.checkpoint_path in starts
    ]
    return max([0, wanted, *ends])


def _spent(
    config: RecoveryConfig, episode: list[Plan], diagnosis: Diagnosis, iteration: int
) -> str:
    tried = "; ".join(
        f"{plan.id} went back to iteration {plan.checkpoint_iteration} "
        f"({_words(plan.remedy, plan.pass_over_samples)})"
        for plan in episode
    )
    return (
        f"The fault is back at iteration {iteration} after {len(episode)} rollback(s), which is "
        f"all that recovery.max_attempts ({config.max_attempts}) allows. Tried: {tried}. Now: "
        f"{diagnosis.sentence}"
    )


def _nothing_good(
    ledger: Ledger, config: RecoveryConfig, diagnosis: Diagnosis, iteration: int
) -> str:
    limit = diagnosis.onset_iteration - config.margin
    counts = ", ".join(
        f"iteration {c.iteration} is {c.status}{f' ({c.reason})' if c.reason else ''}"
        for c in ledger.checkpoints[-5:]
    )
    return (
        f"Alarm at iteration {iteration}, and there is no verified checkpoint before iteration "
        f"{limit} to go back to. Checkpoints on record: {counts or 'none'}. A checkpoint is "
        f"verified after recovery.quiet ({config.quiet}) iterations without an alarm. "
        f"{diagnosis.sentence}"
    )


def _words(remedy: Remedy, passed: int) -> str:
    parts = []
    if remedy.attention == "safe":
        parts.append("safe attention path")
    if remedy.learning_rate_factor != 1.0:
        parts.append(f"learning rate × {remedy.learning_rate_factor:g}")
    if passed:
        parts.append(f"{passed} samples passed over")
    return ", ".join(parts) or "no remedy"
