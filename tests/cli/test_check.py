"""``mcore-monitors check``: settings in, one step of the real Megatron, site and code out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from mcore_monitors.cli.check import for_check
from mcore_monitors.cli.main import main
from mcore_monitors.cli.settings import named_file, read_settings, with_settings
from mcore_monitors.config import from_dict
from mcore_monitors.cpu.arguments import default_arguments
from mcore_monitors.errors import EXIT_BROKEN, ConfigError
from tests.megatron.train import BATCH, EXPERTS, MODEL, ROOT, free_port


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- settings ----


@pytest.mark.parametrize(
    ("words", "place", "file"),
    [
        ("train.py --mcore-monitors a.yaml", 2, "a.yaml"),
        ("train.py --mcore-monitors=a.yaml -x", 1, "a.yaml"),
        ("train.py --deepspeed --deepspeed_config d.json", 3, "d.json"),
        ("train.py --deepspeed d.json", 2, "d.json"),
    ],
)
def test_the_file_of_a_command(words: str, place: int, file: str) -> None:
    found = named_file(words.split())
    assert found is not None and (found[0], found[2]) == (place, file)


def test_a_command_without_a_file(folder: Path) -> None:
    assert named_file(["train.py", "--deepspeed"]) is None
    assert read_settings(["train.py"], None) == {}
    command = with_settings(["train.py", "x"], {"run_dir": "a"}, folder)
    assert command == ["train.py", "x", "--mcore-monitors", str(folder / "monitors.yaml")]
    assert yaml.safe_load((folder / "monitors.yaml").read_text()) == {"run_dir": "a"}


@pytest.mark.parametrize("form", ["--mcore-monitors a.yaml", "--mcore-monitors=a.yaml"])
def test_the_settings_of_a_command_are_replaced_by_others(form: str, folder: Path) -> None:
    (folder / "a.yaml").write_text("run_dir: mine\ninterval: 5\n")
    command = ["train.py", *form.split(), "--last"]
    assert read_settings(command, None) == {"run_dir": "mine", "interval": 5}
    changed = with_settings(command, {"run_dir": "other"}, folder)
    assert changed[0] == "train.py" and changed[-1] == "--last" and len(changed) == len(command)
    assert str(folder / "monitors.yaml") in changed[-2]
    assert (folder / "a.yaml").read_text().startswith("run_dir: mine")  # the user's stays


def test_the_key_in_deepspeeds_json(folder: Path) -> None:
    whole = {"train_batch_size": 8, "mcore_monitors": {"run_dir": "mine"}}
    (folder / "ds.json").write_text(json.dumps(whole))
    command = ["train.py", "--deepspeed_config", "ds.json"]
    assert read_settings(command, None) == {"run_dir": "mine"}
    changed = with_settings(command, {"run_dir": "other"}, folder)
    written = json.loads(Path(changed[2]).read_text())
    assert written == {"train_batch_size": 8, "mcore_monitors": {"run_dir": "other"}}


def test_a_given_file_wins(folder: Path) -> None:
    (folder / "a.yaml").write_text("run_dir: mine\n")
    (folder / "b.yaml").write_text("run_dir: given\n")
    command = ["train.py", "--mcore-monitors", "a.yaml"]
    assert read_settings(command, Path("b.yaml")) == {"run_dir": "given"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "run_dirs: x\n"),
        ("d.json", "{"),
        ("d.json", "[]"),
        ("d.json", '{"mcore_monitors": {"run_dirs": "x"}}'),
        ("missing.yaml", None),
    ],
)
def test_settings_that_cannot_be_used(name: str, text: str | None, folder: Path, capfd) -> None:
    if text is not None:
        (folder / name).write_text(text)
    option = "--mcore-monitors" if name.endswith("yaml") else "--deepspeed_config"
    with pytest.raises(ConfigError):
        read_settings(["train.py", option, name], None)
    assert main(["check", "--", "train.py", option, name]) == 78
    assert "cannot be used" in capfd.readouterr().err


def test_a_check_watches_residuals_alone_and_starts_a_drill_at_once(folder: Path) -> None:
    given = {
        "run_dir": "mine",
        "interval": 50,
        "recovery": {"mode": "rollback"},
        "detection": {"limit": {"norm/scale": 0.1}, "warmup": 7},
        "drill": {"strength": 0.01, "from_iteration": 600},
    }
    config = from_dict(for_check(given, folder))
    assert (config.check, config.interval, config.recovery.mode) == (True, 1, "log")
    assert config.run_dir == str(folder)
    assert config.monitors.conservation.enabled is True
    assert config.monitors.router.enabled is config.monitors.attention_update.enabled is False
    assert config.detection.limit == {"norm/scale": 0.1}
    assert (config.drill.strength, config.drill.from_iteration) == (0.01, 1)
    assert from_dict(for_check({}, folder)).drill is None


# ---- commands that can't be checked ----


def test_no_command(capfd) -> None:
    assert main(["check"]) == 1
    assert "no command" in capfd.readouterr().err


def test_a_command_that_fails_shows_its_last_lines(folder: Path, capfd) -> None:
    code = "print('once'); print('something is wrong'); raise SystemExit(3)"
    assert main(["check", "--", sys.executable, "-c", code]) == 1
    said = capfd.readouterr().err
    assert "something is wrong" in said and "ended with exit code 3" in said
    assert list(folder.iterdir()) == []


def test_a_run_that_refuses_its_settings(folder: Path) -> None:
    assert main(["check", "--", sys.executable, "-c", "raise SystemExit(78)"]) == 78


# ---- the real Megatron ----


@pytest.fixture
def training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A user's command that would train for a long time and save."""
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))
    (folder / "mine.yaml").write_text(f"run_dir: {folder / 'mine'}\n")
    save = f"--save {folder}/checkpoints --save-interval 1 --train-iters 1000"
    return [
        sys.executable, str(ROOT / "launch" / "pretrain_gpt.py"), *MODEL, *EXPERTS.split(),
        *BATCH.split(), *default_arguments(experts=True), *save.split(),
        "--data-cache-path", str(folder / "cache"), "--mcore-monitors-cpu",
        "--mcore-monitors", str(folder / "mine.yaml"),
    ]  # fmt: skip


def test_right_kernels_pass_and_nothing_is_left_behind(training, folder, capfd) -> None:
    assert main(["check", "--json", str(folder / "result.json"), "--", *training]) == 0
    said = capfd.readouterr().out
    assert "Every identity holds." in said and "BROKEN" not in said
    result = json.loads((folder / "result.json").read_text())
    assert result["holds"] and result["sites"] == []
    assert {row["signal"] for row in result["rows"]} == {
        "attention/key_shift",
        "attention/value_output",
        "attention/query_key",
        "router/shift",
        "norm/scale",
        "output/vocabulary_shift",
    }
    assert all(0 <= row["value"] < 0.5 * row["limit"] for row in result["rows"])
    assert {row["layer"] for row in result["rows"]} == {1, 2}
    for row in result["rows"]:
        assert row["signal"] in said
    left = {path.name for path in folder.iterdir()}
    assert left == {"mine.yaml", "result.json", "cache"}


def test_a_faulty_kernel_fails_and_its_site_is_named(training, folder, capfd) -> None:
    (folder / "drill.yaml").write_text(
        "run_dir: x\ndrill: {strength: 0.003, from_iteration: 600, layers: [2]}\n"
    )
    words = ["check", "--config", str(folder / "drill.yaml"), "--", *training]
    assert main(words) == EXIT_BROKEN == 87
    said = capfd.readouterr().out
    assert "BROKEN: layer 2, attention: Σ_j dK_j ≠ 0 at" in said
    assert "while ⟨V, dV⟩ = ⟨O, dO⟩ and ⟨Q, dQ⟩ = ⟨K, dK⟩: backward pass, the row term" in said
    assert "layer 1, attention" not in said
