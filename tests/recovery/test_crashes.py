"""A run that is killed at every write in turn, before or after it, still ends healthy.

The host of these tests dies, with whatever was on disk then, whenever a file is replaced for the
n-th time over all its starts, and is started again by something that knows nothing: any scheduler.
"""

from __future__ import annotations

import os

import pytest

from mcore_monitors.recovery import Ledger, RecoveryConfig, Remedy
from tests.recovery.host import BATCH, Host

FAULT_AT, END = 305, 500
#: Writes of the undisturbed run: every one of them is a chance to be killed.
WRITES = 23
CONFIG = RecoveryConfig(
    mode="rollback",
    quiet=100,
    remedies={"attention_numerics": Remedy(attention="safe", pass_over=-1)},
)


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


def live(root, kill_at: int, before: bool, monkeypatch) -> tuple[list[int], int, Host]:
    """Start until the run ends; return (exit codes, writes, last host)."""
    replace, writes, codes = os.replace, 0, []

    def replace_or_die(source, target):
        nonlocal writes
        writes += 1
        if writes == kill_at and before:
            raise Killed
        replace(source, target)
        if writes == kill_at:
            raise Killed

    monkeypatch.setattr(os, "replace", replace_or_die)
    # Syncing guards against a power cut, which these tests cannot make, and takes most of the time.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    while len(codes) < 6:
        try:
            host = Host(root, CONFIG, fault_at=FAULT_AT)
            codes.append(host.run(END))
        except Killed:
            codes.append(137)
        if codes[-1] in (0, 86):
            return codes, writes, host
    raise AssertionError(f"started {codes} and never ended")


def test_the_undisturbed_run_writes_as_often_as_the_test_kills(tmp_path, monkeypatch):
    codes, writes, _ = live(tmp_path, 0, True, monkeypatch)
    assert codes == [85, 0]
    assert writes == WRITES


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_write(tmp_path, monkeypatch, before):
    for kill_at in range(1, WRITES + 1):
        root = tmp_path / str(kill_at)
        codes, _, host = live(root, kill_at, before, monkeypatch)
        plans = Ledger.load(host.run_dir).plans
        where = f"killed {'before' if before else 'after'} write {kill_at}: {codes}"
        assert codes[-1] == 0, where
        assert codes.count(85) <= 1, where
        assert [plan.status for plan in plans] == ["done"], where
        # Healthy weights, the samples up to the alarm passed over exactly once.
        assert host.damage == 0, where
        (plan,) = plans
        passed = (plan.alarm_iteration - plan.checkpoint_iteration) * BATCH
        assert plan.pass_over_samples == passed, where
        assert host.consumed == END * BATCH + passed, where
