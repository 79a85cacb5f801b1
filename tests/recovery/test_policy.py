"""The life of a ledger: pending, verified, suspect; planned, applied, done, failed; giving up."""

from __future__ import annotations

import os

import pytest

from mcore_monitors.errors import ConfigError
from mcore_monitors.recovery import GaveUpError, Ledger, RecoveryConfig, Remedy, resolve_start
from tests.recovery.host import BATCH, CONFIG, QUIET, Host, verdict


def statuses(host: Host) -> dict[int, str]:
    return {c.iteration: c.status for c in Ledger.load(host.run_dir).checkpoints}


def plan_of(host: Host):
    return Ledger.load(host.run_dir).last_plan


def test_a_checkpoint_is_verified_after_its_quiet_time(tmp_path):
    host = Host(tmp_path)
    host.run(140)
    assert statuses(host) == {50: "pending", 100: "pending"}
    host.run(150)
    assert statuses(host) == {50: "verified", 100: "pending", 150: "pending"}
    last = host.events("checkpoint")[-2]
    assert (last["checkpoint_iteration"], last["status"]) == (50, "verified")


def test_an_alarm_sends_the_run_back_to_the_newest_verified_checkpoint(tmp_path):
    host = Host(tmp_path)
    assert host.run(2000) == 85
    plan = plan_of(host)
    # Faulty from 606 on: the samples at 610 and 620 are bad, so the onset is 610.
    assert (plan.alarm_iteration, plan.onset_iteration, plan.checkpoint_iteration) == (
        620,
        610,
        500,
    )
    assert plan.status == "planned" and plan.attempt == plan.episode_attempt == 1
    assert plan.remedy.attention == "safe" and plan.pass_over_samples == 0
    assert statuses(host)[500] == "verified"
    assert statuses(host)[550] == statuses(host)[600] == "suspect"
    assert host.events("rollback")[0]["plan"]["id"] == "rollback-1"


def test_the_relaunched_run_obeys_heals_and_ends(tmp_path):
    Host(tmp_path).run(2000)
    again = Host(tmp_path)
    assert (again.order.iteration, again.order.attempt) == (500, 1)
    assert again.order.load_dir == str(tmp_path / "checkpoints")
    assert again.order.name == "iter_0000500"
    assert plan_of(again).status == "applied"
    assert again.run(710) == 0
    assert plan_of(again).status == "applied"
    assert again.run(2000) == 0
    assert plan_of(again).status == "done"
    assert again.events("recovered") == [{"plan_id": "rollback-1"}]
    assert again.damage == 0
    later = Host(tmp_path)
    assert (later.order.iteration, later.order.attempt, later.safe) == (2000, 1, True)


def test_a_restart_right_after_the_rollback_obeys_again(tmp_path):
    Host(tmp_path).run(2000)
    Host(tmp_path).run(540)
    again = Host(tmp_path)
    assert (again.iteration, again.order.iteration) == (500, 500)
    again.run(560)
    assert Host(tmp_path).iteration == 550


def test_samples_up_to_the_alarm_are_passed_over_once(tmp_path):
    remedies = {"attention_numerics": Remedy(attention="safe", pass_over=-1)}
    config = RecoveryConfig(mode="rollback", remedies=remedies)
    Host(tmp_path, config).run(2000)
    first = Host(tmp_path, config)
    assert first.order.pass_over_samples == first.order.passed_over_total == 120 * BATCH
    assert first.consumed == (500 + 120) * BATCH
    first.run(560)
    second = Host(tmp_path, config)
    assert second.order.iteration == 550
    assert second.order.pass_over_samples == 0 and second.order.passed_over_total == 120 * BATCH
    assert second.consumed == (550 + 120) * BATCH


def test_remedies_add_up_and_the_passed_over_stretch_never_shrinks(tmp_path):
    remedies = {
        "data": Remedy(pass_over=-1, learning_rate_factor=0.5),
        "router_or_learning_rate": Remedy(learning_rate_factor=0.5),
    }
    config = RecoveryConfig(mode="rollback", max_attempts=3, remedies=remedies)
    host = Host(tmp_path, config, fault_at=10**9)
    host.run(600)
    plans = []
    for cause in ("data", "router_or_learning_rate", "attention_numerics"):
        found = verdict(610, cause)
        now = host.iteration + 20
        samples = host.consumed + 20 * BATCH
        host.recovery.on_verdict(found, iteration=now, consumed_samples=samples)
        plans.append(plan_of(host))
        host = Host(tmp_path, config, fault_at=10**9)
    assert [p.remedy.learning_rate_factor for p in plans] == [0.5, 0.25, 0.25]
    assert [p.remedy.attention for p in plans] == ["keep", "keep", "safe"]
    assert [p.pass_over_samples for p in plans] == [120 * BATCH] * 3
    assert [p.status for p in Ledger.load(host.run_dir).plans] == ["failed", "failed", "applied"]
    assert host.order.remedy.learning_rate_factor == 0.25


def test_attempts_are_bounded_and_a_run_that_gave_up_stays_down(tmp_path):
    config = RecoveryConfig(mode="rollback", remedies={"attention_numerics": Remedy()})
    codes = [Host(tmp_path, config).run(2000) for _ in range(3)]
    assert codes == [85, 85, 86]
    with pytest.raises(GaveUpError, match="max_attempts") as error:
        Host(tmp_path, config)
    assert error.value.exit_code == 86
    reason = Ledger.load(tmp_path / "run").gave_up["reason"]
    assert "rollback-1 went back to iteration 500 (no remedy)" in reason
    # The modes that only watch start, with what is in force, from the last good checkpoint.
    assert resolve_start(tmp_path / "run", "log").iteration == 500


def test_a_person_who_clears_giving_up_grants_new_attempts(tmp_path):
    config = RecoveryConfig(mode="rollback", remedies={"attention_numerics": Remedy()})
    for _ in range(3):
        Host(tmp_path, config).run(2000)
    ledger = Ledger.load(tmp_path / "run")
    ledger.gave_up = None
    ledger.save()
    assert [Host(tmp_path, config).run(2000) for _ in range(3)] == [85, 85, 86]
    attempts = [(p.attempt, p.episode_attempt) for p in Ledger.load(tmp_path / "run").plans]
    assert attempts == [(1, 1), (2, 2), (3, 1), (4, 2)]


def test_a_success_ends_the_episode(tmp_path):
    config = RecoveryConfig(mode="rollback", max_attempts=1)
    Host(tmp_path, config).run(2000)
    host = Host(tmp_path, config)
    host.run(1000)
    action = host.recovery.on_verdict(verdict(1010), iteration=1020, consumed_samples=1020 * BATCH)
    assert action.kind == "rollback"
    assert (action.plan.attempt, action.plan.episode_attempt) == (2, 1)
    assert action.plan.checkpoint_iteration == 900


def test_without_a_verified_checkpoint_the_run_gives_up_and_says_why(tmp_path):
    host = Host(tmp_path, fault_at=95)
    assert host.run(2000) == 86
    reason = host.actions[-1].reason
    assert "no verified checkpoint before iteration 100" in reason
    assert "iteration 50 is pending" in reason and "iteration 100 is suspect" in reason


def test_the_margin_keeps_away_from_the_onset(tmp_path):
    host = Host(tmp_path, RecoveryConfig(mode="rollback", margin=150))
    host.run(2000)
    assert plan_of(host).checkpoint_iteration == 450
    assert statuses(host)[500] == "suspect"


def test_files_that_changed_or_went_are_not_gone_back_to(tmp_path):
    host = Host(tmp_path)
    host.run(600)
    (tmp_path / "checkpoints" / "iter_0000500" / "state.json").unlink()
    state = tmp_path / "checkpoints" / "iter_0000450" / "state.json"
    state.write_text(state.read_text() + " ")
    assert host.run(2000) == 85
    assert plan_of(host).checkpoint_iteration == 400
    reasons = {c.iteration: c.reason for c in Ledger.load(host.run_dir).checkpoints}
    assert reasons[500] == "its files are missing"
    assert reasons[450] == "its files are not those that were written"


def test_files_that_change_after_the_plan_move_it_back(tmp_path):
    remedies = {"attention_numerics": Remedy(attention="safe", pass_over=40)}
    config = RecoveryConfig(mode="rollback", remedies=remedies)
    Host(tmp_path, config).run(2000)
    (tmp_path / "checkpoints" / "iter_0000500" / "state.json").write_text("{}")
    host = Host(tmp_path, config)
    assert host.order.iteration == 450
    assert host.order.pass_over_samples == 50 * BATCH + 40
    assert plan_of(host).checkpoint_iteration == 450 and plan_of(host).status == "applied"
    assert statuses(host)[500] == "suspect"


def test_when_no_checkpoint_is_whole_the_start_refuses(tmp_path):
    Host(tmp_path).run(2000)
    for folder in (tmp_path / "checkpoints").glob("iter_*"):
        (folder / "state.json").unlink()
    with pytest.raises(GaveUpError, match="its files are missing"):
        resolve_start(tmp_path / "run")


@pytest.mark.parametrize("mode, kind", [("log", "none"), ("notify", "notify")])
def test_modes_that_watch_never_plan(tmp_path, mode, kind):
    host = Host(tmp_path, RecoveryConfig(mode=mode))
    assert host.run(700) == 0
    assert host.damage == 95
    told = [action for action in host.actions if action.diagnosis is not None]
    assert {action.kind for action in told} == {kind}
    assert plan_of(host) is None and resolve_start(host.run_dir, mode) is None
    assert statuses(host)[650] == statuses(host)[700] == "suspect"
    assert statuses(host)[500] == "verified"


def test_warnings_neither_act_nor_spoil(tmp_path):
    host = Host(tmp_path, fault_at=10**9)
    host.run(600)
    warning = verdict(300, severity="warning")
    action = host.recovery.on_verdict(warning, iteration=610, consumed_samples=0)
    assert action.kind == "notify"
    assert "suspect" not in statuses(host).values()


def test_an_open_alarm_after_a_restart_still_acts(tmp_path):
    host = Host(tmp_path, fault_at=10**9)
    host.run(600)
    known = verdict(610)
    carried_on = type(known)(active=known.active, standing=known.standing)
    action = host.recovery.on_verdict(carried_on, iteration=620, consumed_samples=620 * BATCH)
    assert action.kind == "rollback"


def test_asking_again_after_the_plan_gives_the_same_plan(tmp_path):
    host = Host(tmp_path)
    host.run(2000)
    again = host.recovery.on_verdict(verdict(610), iteration=630, consumed_samples=630 * BATCH)
    assert again.kind == "rollback" and again.plan.id == "rollback-1"
    assert len(Ledger.load(host.run_dir).plans) == 1


def test_a_checkpoint_written_on_the_way_out_is_suspect(tmp_path):
    host = Host(tmp_path)
    host.run(2000)
    host.save()
    assert statuses(host)[620] == "suspect"
    assert Host(tmp_path).order.iteration == 500


def test_a_checkpoint_overwritten_by_a_later_attempt_counts_anew(tmp_path):
    Host(tmp_path).run(2000)
    host = Host(tmp_path)
    host.run(600)
    entries = [c for c in Ledger.load(host.run_dir).checkpoints if c.iteration == 600]
    assert [(c.attempt, c.status) for c in entries] == [(1, "pending")]


def test_pending_checkpoints_that_a_restart_left_behind_are_suspect(tmp_path):
    Host(tmp_path, fault_at=10**9).run(200)
    (tmp_path / "checkpoints" / "latest").write_text(str(tmp_path / "checkpoints" / "iter_0000100"))
    host = Host(tmp_path, fault_at=10**9)
    host.run(110)
    assert statuses(host) == {50: "verified", 100: "verified", 150: "suspect", 200: "suspect"}


def test_a_full_disk_leaves_the_decision_untaken(tmp_path, monkeypatch):
    host = Host(tmp_path)
    host.run(610)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            host.recovery.on_verdict(verdict(610), iteration=620, consumed_samples=620 * BATCH)
    assert host.recovery.ledger.plans == [] and plan_of(host) is None
    action = host.recovery.on_verdict(verdict(610), iteration=630, consumed_samples=630 * BATCH)
    assert action.kind == "rollback" and plan_of(host).id == "rollback-1"


def test_quiet_samples_write_nothing(tmp_path):
    host = Host(tmp_path)
    host.run(120)
    before = host.recovery.ledger.path.stat()
    host.recovery.on_verdict(QUIET, iteration=130, consumed_samples=0)
    after = host.recovery.ledger.path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"mode": "rolback"}, "recovery.mode"),
        ({"quiet": 0}, "recovery.quiet"),
        ({"margin": -1}, "recovery.margin"),
        ({"max_attempts": 0}, "recovery.max_attempts"),
        ({"remedies": {"router": Remedy()}}, "recovery.remedies.router"),
        ({"remedies": {"data": {"pass_over": 1}}}, "recovery.remedies.data"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ConfigError) as error:
        RecoveryConfig(**settings)
    assert error.value.setting == name


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "sfe"},
        {"learning_rate_factor": 0.0},
        {"learning_rate_factor": 1.5},
        {"learning_rate_factor": float("nan")},
        {"pass_over": -2},
        {"pass_over": 1.5},
    ],
)
def test_bad_remedies_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Remedy(**settings)


def test_quiet_must_outlast_the_slowest_rule():
    CONFIG.check_quiet(100)
    with pytest.raises(ConfigError, match=">= 101"):
        CONFIG.check_quiet(101)
