"""Rank 0 judges and decides, through the real judge and recovery; every rank gets the decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcore_monitors import parallel
from mcore_monitors.config import Config
from mcore_monitors.detection.alarm import Verdict
from mcore_monitors.detection.judge import Judge
from mcore_monitors.errors import EXIT_GAVE_UP, EXIT_ROLLBACK
from mcore_monitors.recovery import Recovery, resolve_start
from mcore_monitors.runtime import Runtime
from mcore_monitors.sample import Sample

from .. import distributed
from .make import Mean, events, history, runtime, said, settings, step

HEALTHY, FAULTY = 1e-8, 0.5
LIMITS = {"attention/key_shift": 1e-5}


def _config(folder: Path, mode: str) -> Config:
    return settings(
        folder,
        interval=1,
        recovery={"mode": mode, "quiet": 4},
        detection={"sustain": 1},
    )


class BrokenJudge(Judge):
    """Raises at iteration 4."""

    def update(self, sample: Sample) -> Verdict:
        if sample.iteration == 4:
            raise ZeroDivisionError("no reference")
        return super().update(sample)


class Host:
    """Two ranks that watch the key shift; rank 0 has the judge and the ledger."""

    def __init__(self, folder: Path, mode: str, judge: type[Judge] = Judge) -> None:
        self.folder, config = folder, _config(folder, mode)
        monitor = Mean("shift", signal="attention/key_shift")
        self.run: Runtime = runtime(
            config,
            [monitor],
            judge=judge(config.detection, limits=LIMITS),
            recovery=Recovery.open(folder, config.recovery),
        )
        self._hook = self.run.crew.guarded(monitor, monitor.take)

    def train(self, first: int, last: int, faulty_from: int = 10**9) -> None:
        """Steps ``first`` to ``last``, or until the runtime asks to leave."""
        for iteration in range(first, last + 1):
            self._hook(FAULTY if iteration >= faulty_from else HEALTHY)
            step(self.run, iteration)
            if self.run.exit_code is not None:
                return

    def save(self, iteration: int) -> None:
        """A checkpoint that the host has finished writing."""
        path = self.folder / f"iter_{iteration:07d}"
        path.mkdir()
        (path / "weights").write_text(str(iteration))
        self.run.on_checkpoint(iteration, str(path), 4 * iteration)


def _attention_fault(rank: int, folder: Path, mode: str, checkpoint: bool) -> dict[str, Any]:
    host = Host(folder, mode)
    with said() as texts:
        host.train(1, 2)
        if checkpoint and rank == 0:
            host.save(2)
        host.train(3, 12, faulty_from=8)
        host.run.close()
    return {
        "code": host.run.exit_code,
        "left at": host.run.state.iteration - 1,
        "said": texts[0],
        "judges": parallel.rank() == 0 and host.run.judge is not None,
    }


def test_all_ranks_leave_together_to_roll_back(tmp_path: Path) -> None:
    results = distributed.run(2, _attention_fault, tmp_path, "rollback", True)
    assert [(r["code"], r["left at"]) for r in results] == [(EXIT_ROLLBACK, 9)] * 2
    assert [e["kind"] for e in events(tmp_path, "rollback")] == ["rollback"]
    assert [e["onset_iteration"] for e in events(tmp_path, "alarm")] == [8]
    assert [e["cause"] for e in events(tmp_path, "diagnosis")] == ["attention_numerics"]
    assert [e["exit_code"] for e in events(tmp_path, "stop")] == [EXIT_ROLLBACK]
    assert [s.iteration for s in history(tmp_path)] == list(range(1, 10))
    order = resolve_start(tmp_path)
    assert (order.iteration, order.name, order.attempt) == (2, "iter_0000002", 1)


def test_all_ranks_leave_together_when_there_is_no_way_back(tmp_path: Path) -> None:
    results = distributed.run(2, _attention_fault, tmp_path, "rollback", False)
    assert [(r["code"], r["left at"]) for r in results] == [(EXIT_GAVE_UP, 9)] * 2
    assert len(events(tmp_path, "gave_up")) == 1
    assert "GAVE UP" in results[0]["said"] and "GAVE UP" not in results[1]["said"]


@pytest.mark.parametrize(("mode", "aloud"), [("log", 0), ("notify", 1)])
def test_the_other_modes_go_on(mode: str, aloud: int, tmp_path: Path) -> None:
    result = _attention_fault(0, tmp_path, mode, True)
    assert (result["code"], result["left at"]) == (None, 12)
    assert len(events(tmp_path, "alarm")) == 1
    sentence = events(tmp_path, "diagnosis")[0]["sentence"]
    assert result["said"].count(sentence) == aloud
    assert [e["exit_code"] for e in events(tmp_path, "stop")] == [0]


def _judge_fails(rank: int, folder: Path) -> dict[str, Any]:
    host = Host(folder, "rollback", BrokenJudge)
    with said() as texts:
        host.train(1, 12, faulty_from=8)
        host.run.close()
    return {"code": host.run.exit_code, "said": texts[0], "left at": host.run.state.iteration - 1}


def test_a_judge_that_fails_turns_detection_off(tmp_path: Path) -> None:
    results = distributed.run(2, _judge_fails, tmp_path)
    assert [(r["code"], r["left at"]) for r in results] == [(None, 12)] * 2
    assert [s.iteration for s in history(tmp_path)] == list(range(1, 13))
    disabled = events(tmp_path, "monitor_disabled")
    assert [(e["monitor"], e["iteration"]) for e in disabled] == [("detection", 4)]
    assert disabled[0]["error"] == "ZeroDivisionError: no reference"
    assert results[0]["said"].count("detection failed at iteration 4 and is off") == 1
    assert results[1]["said"] == ""


def test_a_ledger_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    host = Host(tmp_path, "rollback")
    (tmp_path / "recovery.json").mkdir()
    with said() as texts:
        host.train(1, 2)
        host.save(2)
        host.train(3, 12, faulty_from=8)
    assert host.run.exit_code is None
    assert "checkpoint 2 could not be entered into the ledger" in texts[0]
    assert texts[0].count("no decision at iteration") == 4  # 9 to 12: it keeps trying
    assert host.run.judge is not None
    (tmp_path / "recovery.json").rmdir()
    host.train(13, 13, faulty_from=8)
    assert host.run.exit_code == EXIT_GAVE_UP  # no checkpoint was entered
    assert len(history(tmp_path)) == 13


def test_a_checkpoint_that_is_not_there_is_not_entered(tmp_path: Path) -> None:
    host = Host(tmp_path, "log")
    with said() as texts:
        host.run.on_checkpoint(2, str(tmp_path / "none"), 8)
    assert "will not be used for a rollback" in texts[0]
    assert host.run.recovery.ledger.checkpoints == []


def test_a_resumed_run_knows_what_it_has_said(tmp_path: Path) -> None:
    """The alarm that stands at the end of the first process is not raised again by the second."""
    first = Host(tmp_path, "log")
    first.train(1, 10, faulty_from=8)
    first.run.close()
    assert [e["iteration"] for e in events(tmp_path, "alarm")] == [9]
    second = Host(tmp_path, "log")
    second.run.resume(10)
    second.train(11, 14, faulty_from=8)
    assert [e["iteration"] for e in events(tmp_path, "alarm")] == [9]


def test_a_resume_before_the_fault_forgets_what_came_after(tmp_path: Path) -> None:
    first = Host(tmp_path, "log")
    first.train(1, 10, faulty_from=8)
    first.run.close()
    second = Host(tmp_path, "log")
    second.run.resume(6)
    second.train(7, 9, faulty_from=8)
    assert [e["iteration"] for e in events(tmp_path, "alarm")] == [9, 9]
