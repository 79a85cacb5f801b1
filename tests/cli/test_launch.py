"""``mcore-monitors launch``: when it starts a command again, when not, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mcore_monitors.cli.launch import find_run_dir
from mcore_monitors.cli.main import main
from mcore_monitors.recovery import Ledger
from tests.recovery.host import Host

#: A run in a nutshell: plays one step of the script per start, "CODE" or "CODE+plan", where "plan"
#: is a run that alarms and writes a real plan. Obeying is left to the script, too: "obey".
PLAYER = """
import sys
from pathlib import Path
from tests.recovery.host import Host, QUIET
root, *script = sys.argv[1:]
starts = Path(root) / "starts"
n = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (n + 1))
step = script[min(n, len(script) - 1)]
if "obey" in step:
    Host(Path(root))
if "plan" in step:
    host = Host(Path(root), fault_at=305 + 300 * n)
    host.safe = False
    host.run(2000)
sys.exit(int(step.split("+")[0]))
"""


@pytest.fixture
def player(tmp_path, monkeypatch):
    """Return a function that launches the script and returns (exit code, starts)."""
    (tmp_path / "player.py").write_text(PLAYER)
    (tmp_path / "moe.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def play(*script: str, options: tuple[str, ...] = (), settings: bool = True):
        words = [sys.executable, str(tmp_path / "player.py"), str(tmp_path), *script]
        if settings:
            # The player takes it for one more step of its script, which is never reached.
            words += [f"--mcore-monitors={tmp_path / 'moe.yaml'}"]
        code = main(["launch", "--delay", "0", *options, "--", *words])
        return code, len((tmp_path / "starts").read_text())

    return play


def test_a_run_that_ends_well_is_not_started_again(player, capfd):
    assert player("0") == (0, 1)
    assert "the run has ended (exit code 0)" in capfd.readouterr().err


@pytest.mark.parametrize("code", [1, 78, 86, 137])
def test_a_run_that_fails_is_not_started_again(player, capfd, code):
    assert player(str(code)) == (code, 1)
    assert f"exit code {code}" in capfd.readouterr().err


def test_a_rollback_starts_the_command_again_and_says_why(player, capfd):
    assert player("85+plan", "0+obey") == (0, 2)
    said = capfd.readouterr().err
    assert "rollback-1: alarm at iteration 320 (attention_numerics), back to iteration 200" in said
    assert "(1 of at most 10 relaunches)" in said


@pytest.mark.parametrize("code", [1, 0, 250])
def test_a_new_plan_counts_more_than_a_code_that_a_runner_changed(player, code):
    assert player(f"{code}+plan", "0+obey") == (0, 2)


def test_a_code_without_a_plan_is_a_loop_and_ends(player, capfd):
    assert player("85") == (86, 1)
    assert "holds no plan that waits to be obeyed" in capfd.readouterr().err


def test_a_plan_that_is_not_obeyed_is_a_loop_and_ends(player, capfd):
    assert player("85+plan", "85") == (86, 2)
    assert "rollback-1 was waiting at the start and still is" in capfd.readouterr().err


def test_a_failure_before_the_plan_was_obeyed_ends(player):
    assert player("85+plan", "1") == (1, 2)


def test_relaunches_are_bounded(player, capfd):
    assert player("85+plan", options=("--max-relaunches", "0")) == (85, 1)
    assert "--max-relaunches (0) is used up" in capfd.readouterr().err


def test_without_settings_the_code_is_trusted(player):
    assert player("85", "85", "3", settings=False) == (3, 3)


def test_giving_up_is_explained(player, capfd, tmp_path):
    Host(tmp_path, fault_at=95).run(200)
    assert player("86") == (86, 1)
    said = capfd.readouterr().err
    assert "no verified checkpoint before iteration 100" in said
    assert f"mcore-monitors report {tmp_path / 'run'}" in said


def test_a_ledger_that_cannot_be_read_ends_it(player, capfd, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recovery.json").write_text("{")
    assert player("85") == (86, 1)
    assert "recovery.json cannot be used" in capfd.readouterr().err


@pytest.mark.parametrize("words", [[], ["--"]])
def test_no_command(words, capfd):
    assert main(["launch", *words]) == 1
    assert "no command" in capfd.readouterr().err


def test_a_command_that_does_not_exist(capfd):
    assert main(["launch", "--", "no-such-command-anywhere"]) == 1
    assert "cannot start 'no-such-command-anywhere'" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--max-relaunches", "-1"], ["--delay", "nan"]])
def test_bad_options(words):
    with pytest.raises(SystemExit):
        main(["launch", *words, "--", "true"])


def test_the_run_folder_is_found_in_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("moe.yaml").write_text("run_dir: runs/a\n")
    Path("ds.json").write_text(json.dumps({"mcore_monitors": {"run_dir": "runs/b"}}))
    Path("bare.json").write_text("{}")
    found = {
        "train.py --mcore-monitors moe.yaml": "runs/a",
        "train.py --mcore-monitors=moe.yaml": "runs/a",
        "train.py --deepspeed --deepspeed_config ds.json": "runs/b",
        "train.py --deepspeed ds.json": "runs/b",
        "train.py --deepspeed_config=bare.json": None,
        "train.py --mcore-monitors missing.yaml": None,
        "train.py --mcore-monitors": None,
        "train.py": None,
    }
    for command, folder in found.items():
        assert find_run_dir(command.split()) == (folder and Path(folder)), command


def launched(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mcore_monitors", "launch", "--delay", "30", "--", *words],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.05)
    return path.read_text().strip()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_whole_chain_and_nothing_is_left(tmp_path, number):
    # The first link waits for a second one, as a runner does; only the second one is the worker.
    worker = f"import os,time; open('{tmp_path}/pid','w').write(str(os.getpid())); time.sleep(60)"
    runner = f"import subprocess,sys; subprocess.call([sys.executable, '-c', {worker!r}])"
    process = launched(sys.executable, "-c", runner)
    pid = int(wait_for(tmp_path / "pid"))
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode not in (0, 85)
    assert f"stopped by {signal.Signals(number).name}; not started again" in said
    assert not running(pid)


def test_a_signal_between_two_starts_ends_it(tmp_path):
    process = launched("sh", "-c", f"echo x > {tmp_path}/done; exit 85")
    wait_for(tmp_path / "done")
    line = process.stderr.readline()
    assert "Starting again in 30 s" in line
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before the relaunch" in said


RANKS = """
import os, sys, time
from pathlib import Path
from tests.recovery.host import Host
root, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def meet(name):
    (root / f"{name}-{rank}").write_text("x")
    while len(list(root.glob(f"{name}-*"))) < 2:
        time.sleep(0.01)

if (root / "planned-0").exists():
    if rank == 0:
        Host(root)
    sys.exit(0)
meet("started")
if rank == 0:
    assert Host(root).run(2000) == 85
meet("planned")
time.sleep(0.7 * (1 - rank))
sys.exit(85)
"""


def test_the_real_deepspeed_runner_passes_the_code_through(tmp_path, monkeypatch, capfd):
    # Rank 1 leaves first; the runner looks once a second and ends rank 0, whose plan is on disk.
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "moe.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = ["deepspeed", "--num_accelerators", "2", "--no_local_rank", "--master_port", "29713"]
    command += [str(tmp_path / "ranks.py"), str(tmp_path)]
    command += ["--mcore-monitors", str(tmp_path / "moe.yaml")]
    assert main(["launch", "--delay", "0", "--", *command]) == 0
    assert "rollback-1: alarm at iteration 620" in capfd.readouterr().err
    assert Ledger.load(tmp_path / "run").last_plan.status == "applied"
