"""What an engine's steps and checkpoints give: loss, gradient norm, learning rate, ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader

from .gone_through import Rollbacks
from .inside.rollbacks import FAULT


def test_loss_and_norm_of_accumulated_steps(rollbacks: Rollbacks) -> None:
    """Four micro-batches a step, on two ranks, with an evaluation before every step."""
    folder = rollbacks.folder / "accumulation"
    samples = HistoryReader(folder / "run").read()
    assert [s.iteration for s in samples] == [2, 4]
    ranks = rollbacks.seen["accumulation"]
    of_ranks = [[float.fromhex(x) for _, x in seen["losses"]] for seen in ranks]
    losses = [sum(pair) / 2 for pair in zip(*of_ranks, strict=True)]
    norms = [float.fromhex(x) for _, x in ranks[0]["norms"]]
    assert len(losses) == len(norms) == 4 and len(set(losses)) == 4
    assert [x for s in samples for x in s.loss] == pytest.approx(losses, rel=1e-6)
    assert [x for s in samples for x in s.grad_norm] == pytest.approx(norms, rel=1e-6)
    assert [s.learning_rate for s in samples] != [None, None]
    assert [s.consumed_samples for s in samples] == [16, 32]


def test_checkpoints_go_into_the_ledger_by_tag(rollbacks: Rollbacks) -> None:
    folder = rollbacks.folder / "accumulation"
    (entry,) = json.loads((folder / "run" / "recovery.json").read_text())["checkpoints"]
    assert entry["path"] == str(folder / "ckpt" / "by hand")
    assert (entry["iteration"], entry["consumed_samples"]) == (4, 32)
    assert (entry["status"], entry["attempt"]) == ("pending", 0)
    # the same without the patch
    other = json.loads((rollbacks.folder / "in_place moe 2" / "run" / "recovery.json").read_text())
    names = {Path(c["path"]).name for c in other["checkpoints"]}
    assert names == {f"global_step{i}" for i in (4, 8, 12, 16, 20, 24)}


def test_losses_are_bitwise_those_without(rollbacks: Rollbacks) -> None:
    for with_monitors, without in zip(
        rollbacks.seen["in_place moe 2"], rollbacks.seen["plain"], strict=True
    ):
        healthy = FAULT  # the fault shows in the loss after the step that it begins in
        assert with_monitors["losses"][:healthy] == without["losses"][:healthy]
        assert with_monitors["norms"][: healthy - 1] == without["norms"][: healthy - 1]


def test_a_run_is_closed(rollbacks: Rollbacks) -> None:
    events = EventReader(rollbacks.folder / "relaunch moe 0" / "run").read()
    assert [(e["kind"], e.get("exit_code")) for e in events if e["kind"] in ("start", "stop")] == [
        ("start", None), ("stop", 85), ("start", None), ("stop", 0),
    ]  # fmt: skip
