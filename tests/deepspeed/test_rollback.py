"""From an alarm back to health on real DeepSpeed engines: in place and by relaunch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_monitors.errors import EXIT_ROLLBACK
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader, effective_history

from .gone_through import Rollbacks
from .inside.rollbacks import BATCH, END, FAULT, INTERVAL

ALARM, BACK_TO = FAULT + INTERVAL, 8
#: samples between the checkpoint and the alarm, which the plan passes over
PASSED = (ALARM - BACK_TO) * BATCH
WAYS = ("moe 0", "moe 2", "hf 3")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in EventReader(folder / "run").read() if e["kind"] == kind]


def ledger(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "recovery.json").read_text())


def after_the_rollback(steps: list[list[Any]]) -> list[list[Any]]:
    """What was seen since the last time that a step number went back."""
    back = [i for i in range(1, len(steps)) if steps[i][0] < steps[i - 1][0]]
    return steps[back[-1] :] if back else steps


def plain(samples: list[Sample]) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    return [
        {k: v for k, v in s.to_record().items() if k not in ("time", "cost_seconds")}
        for s in samples
    ]


@pytest.mark.parametrize("what", WAYS)
def test_a_run_goes_back_in_place(rollbacks: Rollbacks, what: str) -> None:
    folder = rollbacks.folder / f"in_place {what}"
    alarm = events(folder, "alarm")[0]
    assert alarm["signal"].startswith("attention/")
    assert (alarm["onset_iteration"], alarm["iteration"]) == (FAULT, ALARM)
    plan = events(folder, "rollback")[0]["plan"]
    assert plan["checkpoint_iteration"] == BACK_TO
    assert Path(plan["checkpoint_path"]).name == f"global_step{BACK_TO}"
    assert plan["pass_over_samples"] == PASSED
    (resume,) = events(folder, "resume")
    assert resume["from_iteration"] == BACK_TO
    assert len(events(folder, "start")) == 1  # the processes lived on
    remedy = events(folder, "remedy")[0]
    assert (remedy["attention"], remedy["learning_rate_factor"]) == ("safe", 0.5)
    for seen in rollbacks.seen[f"in_place {what}"]:
        assert seen["codes"] == [None]
        assert seen["rolled_back"] == [BACK_TO * BATCH + PASSED]
        # step → where its data began, and the rate it was taken with
        positions = after_the_rollback(seen["positions"])
        assert positions == [[i, (i - 1) * BATCH + PASSED] for i in range(BACK_TO + 1, END + 1)]
        before = dict(map(tuple, seen["rates"][:ALARM]))
        for step, rate in after_the_rollback(seen["rates"])[: ALARM - BACK_TO]:
            assert rate == pytest.approx(before[step] / 2)
    course = effective_history(folder / "run")
    assert [s.iteration for s in course] == list(range(INTERVAL, END + 1, INTERVAL))
    late = [s for s in course if s.iteration > BACK_TO]
    assert {s.attempt for s in late} == {1}
    shifts = [v for s in late for row in s.signals["attention/key_shift"].values() for v in row]
    assert max(shifts) < 1e-5
    # two layers in turn, each with the step that led to its sample
    turns = [list(s.signals["optimizer/adam_update_rms"]) for s in course]
    assert turns == [[1 if s.iteration // INTERVAL % 2 else 2] for s in course]
    # the abandoned course stays on record
    left = [s.iteration for s in HistoryReader(folder / "run").read() if s.attempt == 0]
    assert left[-1] == ALARM
    assert ledger(folder)["plans"][0]["status"] in ("applied", "done")


@pytest.mark.parametrize("what", WAYS)
def test_in_place_equals_a_fresh_start_bit_for_bit(rollbacks: Rollbacks, what: str) -> None:
    """In place without the patch against by relaunch with it: losses, norms, weights, history."""
    in_place, relaunch = (rollbacks.folder / f"{way} {what}" for way in ("in_place", "relaunch"))
    for here, there in zip(
        rollbacks.seen[in_place.name], rollbacks.seen[relaunch.name], strict=True
    ):
        assert there["codes"] == [EXIT_ROLLBACK, None]
        for column in ("losses", "positions", "rates"):
            assert after_the_rollback(here[column]) == there[column], column
        # the last step before the rollback has a norm of its own, in place only
        assert after_the_rollback(here["norms"]) == there["norms"]
        assert here["weights"] == there["weights"]
    assert plain(effective_history(in_place / "run")) == plain(effective_history(relaunch / "run"))
    states = [
        [(c["iteration"], c["attempt"], c["status"], c["consumed_samples"], Path(c["path"]).name)
         for c in ledger(f)["checkpoints"]]
        for f in (in_place, relaunch)
    ]  # fmt: skip
    assert states[0] == states[1]


def test_a_script_gets_the_plans_checkpoint_whatever_it_loads(rollbacks: Rollbacks) -> None:
    assert [s["rolled_back"] for s in rollbacks.seen["relaunch moe 0"]] == [[BACK_TO], [BACK_TO]]
    # the one that never loads anything stands there as well
    assert rollbacks.seen["relaunch moe 2"][0]["positions"][0][0] == BACK_TO + 1


def test_what_fails_in_place_leaves_a_plan_for_the_next_start(rollbacks: Rollbacks) -> None:
    folder = rollbacks.folder / "crash"
    (waiting,) = json.loads((folder / "0.json").read_text())["plans"]
    assert waiting["status"] == "planned"
    for seen in rollbacks.seen["crash"]:
        assert seen["codes"] == [EXIT_ROLLBACK, None]
        assert seen["losses"][-1][0] == END
    assert ledger(folder)["plans"][0]["status"] in ("applied", "done")
    assert [e["from_iteration"] for e in events(folder, "resume")] == [BACK_TO]


def test_deepspeeds_own_loader_is_put_back(rollbacks: Rollbacks) -> None:
    """A script that knows nothing of monitors; the order of the data is the sampler's."""
    from torch.utils.data import DistributedSampler

    for rank, seen in enumerate(rollbacks.seen["own loader"]):
        order = list(DistributedSampler(range(1000), num_replicas=2, rank=rank))
        size = BATCH // 2
        back = PASSED // BATCH
        expected = [
            *([i, order[(i - 1) * size : i * size]] for i in range(1, ALARM + 1)),
            *(
                [i, order[(i - 1 + back) * size : (i + back) * size]]
                for i in range(BACK_TO + 1, END + 1)
            ),
        ]
        assert seen["positions"] == expected
