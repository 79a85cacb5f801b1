"""The file: round trip, frozen schema, and what cannot be read."""

from __future__ import annotations

import json

import pytest

from mcore_monitors.errors import RecoveryError
from mcore_monitors.recovery import Ledger
from mcore_monitors.recovery.ledger import KEPT, Checkpoint
from tests.recovery.host import Host


def data_of(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "recovery.json").read_text())


def test_no_file_is_an_empty_ledger(tmp_path):
    ledger = Ledger.load(tmp_path)
    assert ledger.checkpoints == ledger.plans == ledger.episode == []
    assert ledger.last_plan is None and ledger.gave_up is None


def test_what_is_saved_is_loaded(tmp_path):
    host = Host(tmp_path)
    host.run(2000)
    loaded = Ledger.load(host.run_dir)
    assert loaded == host.recovery.ledger
    assert list(host.run_dir.iterdir()) == [host.run_dir / "recovery.json"]


def test_the_schema_is_frozen(tmp_path):
    Host(tmp_path).run(2000)
    data = data_of(tmp_path)
    assert list(data) == ["version", "checkpoints", "plans", "gave_up"]
    assert data["version"] == 1
    assert list(data["checkpoints"][0]) == [
        "iteration",
        "attempt",
        "path",
        "status",
        "reason",
        "written_at",
        "consumed_samples",
        "passed_over_samples",
        "digest",
    ]
    assert list(data["plans"][0]) == [
        "id",
        "attempt",
        "episode_attempt",
        "created_at",
        "status",
        "alarm_iteration",
        "onset_iteration",
        "cause",
        "sentence",
        "checkpoint_iteration",
        "checkpoint_path",
        "remedy",
        "pass_over_samples",
        "passed_over_total",
    ]
    assert data["plans"][0]["remedy"] == {
        "attention": "safe",
        "learning_rate_factor": 1.0,
        "pass_over": 0,
    }


def break_version(data):
    data["version"] = 2


def break_status(data):
    data["checkpoints"][0]["status"] = "fine"


def break_plan_status(data):
    data["plans"][0]["status"] = "fine"


def break_type(data):
    data["plans"][0]["checkpoint_iteration"] = "500"


def break_remedy(data):
    data["plans"][0]["remedy"]["learning_rate_factor"] = 7


def lose_field(data):
    del data["checkpoints"][0]["digest"]


def add_field(data):
    data["plans"][0]["surprise"] = 1


def lose_part(data):
    del data["plans"]


def break_gave_up(data):
    data["gave_up"] = {"reason": "tired"}


@pytest.mark.parametrize(
    "spoil",
    [
        break_version,
        break_status,
        break_plan_status,
        break_type,
        break_remedy,
        lose_field,
        add_field,
        lose_part,
        break_gave_up,
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_to_do(tmp_path, spoil):
    Host(tmp_path).run(2000)
    data = data_of(tmp_path)
    spoil(data)
    path = tmp_path / "run" / "recovery.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecoveryError, match="cannot be used") as error:
        Host(tmp_path)
    assert str(path) in str(error.value) and f"mv {path} {path}.bad" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}'])
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    (tmp_path / "recovery.json").write_bytes(content)
    with pytest.raises(RecoveryError, match="cannot be used"):
        Ledger.load(tmp_path)


def test_old_checkpoints_fall_out(tmp_path):
    ledger = Ledger(path=tmp_path / "recovery.json")
    for i in range(KEPT + 5):
        ledger.enter(
            Checkpoint(
                iteration=i,
                attempt=0,
                path=f"/c/{i}",
                written_at=0.0,
                consumed_samples=i,
                digest="sha256:0",
            )
        )
    assert [c.iteration for c in ledger.checkpoints] == list(range(5, KEPT + 5))
