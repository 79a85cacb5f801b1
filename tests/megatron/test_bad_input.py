"""What a user can get wrong, in real launches: one sentence, the right exit code, no training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mcore_monitors.cpu.arguments import default_arguments
from mcore_monitors.errors import EXIT_BAD_CONFIG

from .train import BATCH, MODEL, ROOT, train

#: starts Megatron once a configuration, in one process: imports take most of a start
_STARTS = """
import json, runpy, sys
script, configs, command = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
for config in configs:
    sys.argv = [script, *command, "--mcore-monitors", config]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(f"CODE {end.code} {config}", file=sys.stderr, flush=True)
"""


def refused_starts(configs: list[Path]) -> dict[Path, tuple[int, str]]:
    """Launch ``launch/pretrain_gpt.py`` with each file; file -> (exit code, standard error)."""
    command = [*MODEL, *BATCH.split(), *default_arguments(), "--train-iters", "4"]
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-c", _STARTS,
            str(ROOT / "launch" / "pretrain_gpt.py"), json.dumps([str(c) for c in configs]),
            *command, "--mcore-monitors-cpu",
        ],
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "iteration" not in done.stdout  # Megatron's log lines
    outcomes, lines = {}, []
    for line in done.stderr.splitlines():
        if line.startswith("CODE "):
            _, code, config = line.split(" ", 2)
            outcomes[Path(config)] = (int(code), "\n".join(lines))
            lines = []
        else:
            lines.append(line)
    return outcomes


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    def write(name: str, settings: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    run = str(tmp_path / "run")
    detection = {"run_dir": run, "detection": {"treshold": 5.0}}
    said = {
        write("unknown", detection): [
            "detection.treshold: 5.0 cannot be used", "Did you mean 'threshold'?",
        ],
        tmp_path / "missing.yaml": ["--mcore-monitors:", "missing.yaml", "No such file"],
        write("below a file", {"run_dir": str(in_the_way / "run")}): [
            "run_dir:", "a folder that this user may write", "Not a directory",
        ],
        write("a file", {"run_dir": str(in_the_way)}): ["run_dir:", "File exists"],
        write("type", {"run_dir": run, "interval": "10"}): ["interval: '10'", "an integer"],
        write("in place", {"run_dir": run, "recovery": {"how": "in_place"}}): [
            "recovery.how: 'in_place'", "relaunch on Megatron-core",
        ],
    }  # fmt: skip
    outcomes = refused_starts(list(said))
    assert outcomes.keys() == said.keys()
    for config, words in said.items():
        code, text = outcomes[config]
        ours = [line for line in text.splitlines() if line.startswith("mcore-monitors:")]
        assert code == EXIT_BAD_CONFIG, config
        assert len(ours) == 1, text
        assert all(word in ours[0] for word in words), ours
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_a_monitor_that_the_model_cannot_have(tmp_path: Path) -> None:
    result = train(
        tmp_path,
        experts=False,
        iterations=4,
        monitors={"monitors": {"router": {"enabled": True}}, "wandb": {"enabled": False}},
    )
    assert result.exit_code == EXIT_BAD_CONFIG, result.output[-4000:]
    assert (
        "mcore-monitors: monitors.router.enabled: True cannot be used; allowed: auto or false for "
        "this model. It has no mixture-of-experts router." in result.output
    )
    assert result.losses == {} and result.samples == []


def test_a_dense_model_and_a_wandb_server_that_is_away(tmp_path: Path) -> None:
    """Both are said, and neither stops the training."""
    result = train(
        tmp_path,
        experts=False,
        iterations=4,
        monitors={"interval": 2, "monitors": {"attention_update": {"windows": [2]}}},
        environment={
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_MODE": "online",
        },
    )
    assert result.exit_code == 0, result.output[-4000:]
    assert "monitor 'router' is off: the model has no mixture-of-experts router" in result.output
    assert result.output.count("W&B is offline: the server could not be used") == 1
    assert sorted(result.losses) == [1, 2, 3, 4]
    (start,) = result.kinds("start")
    assert start["monitors"] == [
        "attention_update",
        "conservation",
        "attention_activity",
        "optimizer",
    ]
    assert [s.iteration for s in result.samples] == [2, 4]
    read = set(result.samples[-1].signals)
    assert {"attention/key_shift", "attention/delta2_effective_rank@2"} < read
    assert not [name for name in read if name.startswith("router/")]
    assert [e["exit_code"] for e in result.kinds("stop")] == [0]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
