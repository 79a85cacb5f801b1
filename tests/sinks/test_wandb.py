"""W&B with the real package: offline, against a server, without one, and without the package."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import wandb

from mcore_monitors.sinks import wandb_sink
from mcore_monitors.sinks.config import WandbConfig
from mcore_monitors.sinks.wandb_sink import keys_of, open_wandb
from tests.sinks import wandb_file
from tests.sinks.make import alarm, diagnosis, sample
from tests.sinks.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No key, no home, no run left over."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home"))
    wandb.teardown()
    yield
    wandb.teardown()


class Said(list):
    def __call__(self, text):
        self.append(text)


def offline_files(run_dir):
    wandb_file.settle()
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_key_names_are_frozen_and_few():
    row = keys_of(sample(600))
    assert list(row) == [
        "monitors/iteration",
        "monitors/attempt",
        "monitors/loss",
        "monitors/grad_norm_max",
        "monitors/learning_rate",
        "monitors/cost_seconds",
        "attention/key_shift/layer1/min",
        "attention/key_shift/layer1/median",
        "attention/key_shift/layer1/max",
        "attention/key_shift/layer1/worst_group",
        "attention/key_shift/layer2/min",
        "attention/key_shift/layer2/median",
        "attention/key_shift/layer2/max",
        "attention/key_shift/layer2/worst_group",
        "attention/delta2_effective_rank@50/layer1/min",
        "attention/delta2_effective_rank@50/layer1/median",
        "attention/delta2_effective_rank@50/layer1/max",
        "attention/delta2_effective_rank@50/layer1/p25",
        "attention/delta2_effective_rank@50/layer1/p75",
        "attention/delta2_effective_rank@50/layer1/worst_head",
        "attention/delta2_effective_rank@50/layer2/min",
        "attention/delta2_effective_rank@50/layer2/median",
        "attention/delta2_effective_rank@50/layer2/max",
        "attention/delta2_effective_rank@50/layer2/p25",
        "attention/delta2_effective_rank@50/layer2/p75",
        "attention/delta2_effective_rank@50/layer2/worst_head",
        "router/routing_entropy/layer1",
        "router/routing_entropy/layer2",
    ]
    assert row["attention/delta2_effective_rank@50/layer1/min"] == 4.0
    assert row["attention/delta2_effective_rank@50/layer1/p25"] == 4.75
    assert row["attention/delta2_effective_rank@50/layer1/median"] == 5.5
    assert row["attention/delta2_effective_rank@50/layer1/p75"] == 6.25
    assert row["attention/delta2_effective_rank@50/layer1/worst_head"] == 1
    assert row["attention/key_shift/layer1/worst_group"] == 1
    assert row["attention/key_shift/layer2/max"] == 1.5e-7
    assert row["monitors/grad_norm_max"] == 1.5


def test_what_is_recorded_only_has_three_keys_however_many_layers():
    values = {layer: [float(layer), 3.0 * layer] for layer in range(1, 41)}
    full = sample(600)
    base = len(keys_of(full, windows=[50]))
    full.signals |= {
        "attention/delta2_effective_rank@200": values,  # a window that no rule judges
        "attention/query_update_spike_strength@50": values,
        "router/unheard_of": values,
    }
    row = keys_of(full, windows=[50])
    assert len(row) == base + 3 * 3
    for name in ("attention/delta2_effective_rank@200", "router/unheard_of"):
        three = row[f"{name}/min"], row[f"{name}/median"], row[f"{name}/max"]
        assert three == (1.0, 30.5, 120.0)
    everything = keys_of(full, signals="all", windows=[50])
    assert everything["attention/query_update_spike_strength@50/layer7/max"] == 21.0
    assert len(everything) > base + 40 * 3 * 5


def test_the_setting_reaches_the_run(tmp_path):
    for signals, there in (("judged", False), ("all", True)):
        folder = tmp_path / signals
        folder.mkdir()
        sink = open_wandb(WandbConfig(signals=signals), folder, say=Said(), windows=[10])
        sink.sample(sample(10))
        sink.close()
        [row] = wandb_file.history(offline_files(folder)[0])
        assert ("attention/delta2_effective_rank@50/layer1/min" in row) is there
        assert ("attention/delta2_effective_rank@50/min" in row) is not there


def test_offline_without_a_key_keeps_replayed_rows_and_alarms(tmp_path):
    said = Said()
    sink = open_wandb(WandbConfig(name="night"), tmp_path, say=said)
    assert sink.offline
    assert "offline: no API key" in said[0] and "wandb sync" in said[0]
    for attempt, iterations in ((0, (590, 600, 610)), (1, (600, 610, 620))):
        for iteration in iterations:
            sink.sample(sample(iteration, attempt))
        if attempt == 0:
            sink.event(alarm(610))
    sink.event(
        {"kind": "recovered", "iteration": 620, "attempt": 1, "plan_id": "p1"},
    )
    sink.close()

    [path] = offline_files(tmp_path)
    rows = wandb_file.history(path)
    course = [(row["monitors/attempt"], row["monitors/iteration"]) for row in rows]
    assert course == [(0, 590), (0, 600), (0, 610), (1, 600), (1, 610), (1, 620)]
    assert [row["monitors/alarms"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert rows[0]["attention/delta2_effective_rank@50/layer1/min"] == 4.0
    kept = wandb_file.summary(path)
    assert kept["monitors/last_alarm"].startswith("iteration 610: attention/key_shift in layer 2")
    assert kept["monitors/recovered"].startswith("iteration 620")
    metrics = {metric.glob_name or metric.name: metric for metric in wandb_file.metrics(path)}
    assert metrics["attention/key_shift/*"].step_metric == "monitors/iteration"


def test_a_relaunch_joins_the_same_group(tmp_path):
    for _ in range(2):
        sink = open_wandb(WandbConfig(), tmp_path, say=Said())
        sink.sample(sample(10))
        sink.close()
    group = (tmp_path / "wandb_run_id").read_text().strip()
    runs = [wandb_file.runs(path)[0] for path in offline_files(tmp_path)]
    assert [run.run_group for run in runs] == [group, group]
    # Two uploads of one id would overwrite each other.
    assert len({run.run_id for run in runs}) == 2


@pytest.mark.parametrize("writer", [None, "module", "run"])
def test_joins_the_hosts_run_and_harms_none_of_its_rows(tmp_path, writer):
    host = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    given = {None: None, "module": wandb, "run": host}[writer]
    sink = open_wandb(WandbConfig(), tmp_path, say=Said(), writer=given)

    def step(iteration, attempt):
        # As Megatron does: every call with the iteration as step, some of it after the sample.
        wandb.log({"lm loss": 2.0}, iteration)
        if iteration % 10 == 0:
            sink.sample(sample(iteration, attempt))
            wandb.log({"validation": 2.1}, iteration)

    for iteration in range(1, 31):
        step(iteration, 0)
    # Back to 10 in place: the host's own rows are dropped by W&B until 31, ours are not.
    for iteration in range(11, 42):
        step(iteration, 1)
    sink.close()
    assert wandb.run is host, "the host's run is the host's to finish"
    host.finish()

    [path] = offline_files(tmp_path)
    rows = wandb_file.history(path)
    ours = [
        (row["monitors/attempt"], row["monitors/iteration"])
        for row in rows
        if "monitors/iteration" in row
    ]
    assert ours == [(0, 10), (0, 20), (0, 30), (1, 20), (1, 30), (1, 40)]
    assert [row["_step"] for row in rows if "validation" in row] == [10, 20, 30, 40]
    assert {row["_step"] for row in rows if "lm loss" in row} >= set(range(1, 31)) | {40, 41}


def test_online_alerts_and_resumes_the_same_run(tmp_path, monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.KEY)
    for _ in range(2):
        said = Said()
        sink = open_wandb(WandbConfig(project="proj"), tmp_path, say=said)
        assert not sink.offline and said[0].startswith(f"W&B: {server.url}")
        sink.sample(sample(10))
        sink.event(alarm(10))
        sink.event(diagnosis(10))
        sink.close()
        wandb.teardown()
    begun = server.variables("UpsertBucket")
    assert {one["name"] for one in begun} == {(tmp_path / "wandb_run_id").read_text().strip()}
    assert begun[0]["project"] == "proj" and begun[0]["displayName"] == tmp_path.name
    [first, second] = server.variables("NotifyScriptableRunAlert")
    assert first["title"] == "Training alarm: attention numerics" and first["severity"] == "ERROR"
    assert first["text"].startswith("iteration 10: Layer 2 has broken") and second == first
    server.stop()


def test_a_server_that_goes_away_does_not_hold_the_end_up(tmp_path, monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.KEY)
    sink = open_wandb(WandbConfig(), tmp_path, say=Said(), finish_timeout=2)
    sink.sample(sample(10))
    server.stop()
    begun = time.monotonic()
    sink.sample(sample(20))
    # Left alone, W&B would retry this alert for hours and hold up the end for as long.
    sink.event(diagnosis(20))
    sink.close()
    assert time.monotonic() - begun < 20
    wandb_file.settle()
    [path] = tmp_path.glob("wandb/run-*/*.wandb")
    assert [row["monitors/iteration"] for row in wandb_file.history(path)] == [10, 20]


@pytest.mark.parametrize("trouble", ["wrong key", "no such key", "unreachable"])
def test_a_server_that_cannot_be_used_means_offline(tmp_path, monkeypatch, trouble):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "short" if trouble == "no such key" else "x" * 40)
    if trouble == "unreachable":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said, begun = Said(), time.monotonic()
    sink = open_wandb(WandbConfig(), tmp_path, say=said, init_timeout=3)
    sink.sample(sample(10))
    sink.close()
    assert time.monotonic() - begun < 10
    assert len(said) == 1 and "offline: the server could not be used" in said[0]
    [path] = offline_files(tmp_path)
    assert [row["monitors/iteration"] for row in wandb_file.history(path)] == [10]
    server.stop()


def test_a_key_in_netrc_counts(tmp_path, monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    host = server.url.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password {server.KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sink = open_wandb(WandbConfig(), tmp_path, say=Said())
    assert not sink.offline
    sink.close()
    server.stop()


@pytest.mark.parametrize(
    ("mode", "word"), [("offline", "WANDB_MODE is offline"), ("disabled", "off")]
)
def test_wandb_mode_is_obeyed(tmp_path, monkeypatch, mode, word):
    monkeypatch.setenv("WANDB_MODE", mode)
    said = Said()
    sink = open_wandb(WandbConfig(), tmp_path, say=said)
    assert word in said[0]
    assert (sink is None) == (mode == "disabled")
    if sink is not None:
        sink.close()


def test_false_means_silence(tmp_path):
    said = Said()
    assert open_wandb(WandbConfig(enabled=False), tmp_path, say=said) is None
    assert not said and not list(tmp_path.glob("wandb*"))


def test_a_run_id_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    said = Said()
    assert open_wandb(WandbConfig(), tmp_path / "file", say=said) is None
    assert said[0].startswith("W&B is off: ")


def test_without_the_package_a_run_goes_on(tmp_path):
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from types import SimpleNamespace\n"
        "from mcore_monitors.sinks import open_sinks\n"
        "from mcore_monitors.sinks.config import WandbConfig\n"
        "from tests.sinks.make import sample\n"
        "from mcore_monitors.detection import DetectionConfig\n"
        "config = SimpleNamespace(run_dir=sys.argv[1], wandb=WandbConfig(), console=True,"
        " detection=DetectionConfig(),"
        " strict=False)\n"
        "sinks = open_sinks(config, local=True, wandb=True)\n"
        "sinks.sample(sample(10)); sinks.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == [
        "mcore-monitors: W&B is off: the package wandb is not installed (pip install wandb)."
    ]
    assert "iteration 10" in done.stdout
    assert (tmp_path / "history.jsonl").stat().st_size > 0


def test_default_waits_are_bounded():
    assert wandb_sink.INIT_TIMEOUT <= 30 and wandb_sink.FINISH_TIMEOUT <= 60
