"""From an alarm back to health in the real Megatron: exit codes, checkpoint, data, remedies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_monitors.errors import EXIT_GAVE_UP, EXIT_ROLLBACK
from mcore_monitors.sinks.history import effective_history

from .train import launch, train

SETTINGS = {
    "interval": 2,
    "monitors": {"attention_update": {"windows": [4]}},
    "drill": {"strength": 0.01, "from_iteration": 30},
    "wandb": {"enabled": False},
}
#: everything a plan can order at once
EVERYTHING = {"attention": "safe", "learning_rate_factor": 0.5, "pass_over": -1}


def test_a_fault_is_seen_and_the_run_comes_back_by_itself(tmp_path: Path) -> None:
    """Through the real `deepspeed` runner and `mcore-monitors launch`, two processes, EP 2."""
    settings = SETTINGS | {
        "recovery": {
            "mode": "rollback",
            "quiet": 10,
            "remedies": {"attention_numerics": EVERYTHING},
        }
    }
    result = launch(
        tmp_path,
        f"--expert-model-parallel-size 2 --save {tmp_path}/ckpt --load {tmp_path}/ckpt "
        "--save-interval 5",
        processes=2,
        iterations=50,
        monitors=settings,
    )
    assert result.exit_code == 0, result.output[-4000:]

    (alarm, *_) = result.kinds("alarm")
    assert (alarm["signal"], alarm["onset_iteration"]) == ("attention/key_shift", 30)
    assert alarm["iteration"] == 32
    assert result.kinds("diagnosis")[0]["cause"] == "attention_numerics"
    plan = result.kinds("rollback")[0]["plan"]
    # at 32, what was saved up to 22 has been quiet for 10 iterations
    assert plan["checkpoint_iteration"] == 20
    assert plan["pass_over_samples"] == (32 - 20) * 4
    assert result.kinds("resume")[0]["from_iteration"] == 20
    assert result.kinds("recovered"), "the plan was not marked as done"

    course = effective_history(tmp_path / "run")
    assert [s.iteration for s in course] == list(range(2, 51, 2))
    before = next(s for s in course if s.iteration == 20)
    after = [s for s in course if s.iteration > 20]
    assert {s.attempt for s in after} == {1}
    assert all(s.consumed_samples == 4 * s.iteration + 48 for s in after)
    assert all(s.learning_rate == pytest.approx(before.learning_rate / 2) for s in after)
    shifts = [v for s in after for row in s.signals["attention/key_shift"].values() for v in row]
    assert max(shifts) < 1e-5
    # the abandoned course stays on record
    assert [s.iteration for s in result.samples if s.attempt == 0][-1] == 32
    state = json.loads((tmp_path / "run" / "recovery.json").read_text())
    assert state["plans"][0]["status"] == "done"


def test_attempts_are_bounded_and_any_restart_obeys(tmp_path: Path) -> None:
    """A remedy that does not help: two rollbacks, then the run stops, whoever starts it again."""
    settings = SETTINGS | {
        "recovery": {
            "mode": "rollback",
            "quiet": 10,
            "max_attempts": 2,
            "remedies": {"attention_numerics": {"attention": "keep"}},
        }
    }
    arguments = f"--save {tmp_path}/ckpt --load {tmp_path}/ckpt --save-interval 5"
    codes = []
    for _ in range(4):
        result = train(tmp_path, arguments, iterations=50, monitors=settings)
        codes.append(result.exit_code)
    # the fourth start refuses: the run gave up
    assert codes == [EXIT_ROLLBACK, EXIT_ROLLBACK, EXIT_GAVE_UP, EXIT_GAVE_UP]
    assert [e["from_iteration"] for e in result.kinds("resume")] == [20, 20]
    assert "gave up" in result.output
    assert result.samples[-1].iteration == 32


def test_modes_that_only_watch_change_nothing(tmp_path: Path) -> None:
    for mode in ("log", "notify"):
        result = train(
            tmp_path / mode,
            iterations=34,
            monitors=SETTINGS | {"recovery": {"mode": mode, "quiet": 10}},
        )
        assert result.exit_code == 0
        assert result.kinds("alarm") and not result.kinds("rollback")
        said = [x for x in result.output.splitlines() if x.startswith("mcore-monitors: ")]
        assert any("Likely fault" in line for line in said) == (mode == "notify")


