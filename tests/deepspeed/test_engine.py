"""The patched DeepSpeed, with the key in its JSON: real engines in one and two gloo processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader

WORKER = Path(__file__).with_name("worker.py")
STEPS = 6


def train(
    folder: Path,
    *,
    processes: int,
    ep_size: int = 1,
    accumulate: int = 1,
    stage: int = 0,
    monitors: dict[str, Any] | None,
) -> tuple[int, str]:
    """Train and return the worst exit code and all output."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4 // processes // accumulate,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "ep_size": ep_size,
    }
    if monitors is not None:
        config["mcore_monitors"] = {"run_dir": str(folder / "run"), **monitors}
    (folder / "ds.json").write_text(json.dumps(config))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "ds.json"), str(folder / "ckpt"), str(STEPS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(processes)
    ]
    outputs = [child.communicate(timeout=560)[0] for child in children]
    return max(child.returncode for child in children), "\n".join(outputs)


def samples(folder: Path) -> list[Sample]:
    return HistoryReader(folder / "run").read()


SETTINGS = {"interval": 2, "wandb": {"enabled": False}, "monitors": {"attention_update": {"windows": [2]}}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "x"
    code, output = train(folder, processes=1, monitors=SETTINGS)
    assert code == 0, output[-4000:]
    return folder


def test_router_signals_of_an_engine(alone: Path) -> None:
    recorded = samples(alone)
    assert [s.iteration for s in recorded] == [2, 4, 6]
    for sample in recorded:
        assert sample.signals.keys() == {
            "router/weight_similarity",
            "router/centred_conditioning",
            "router/routing_entropy",
            "router/routing_entropy_normalised",
        }
        assert all(layers.keys() == {1, 2} for layers in sample.signals.values())
        assert len(sample.loss) == 2 and all(v is not None and v > 0 for v in sample.loss)
    events = EventReader(alone / "run").read()
    (start,) = (e for e in events if e["kind"] == "start")
    assert start["host"] == "deepspeed" and start["monitors"] == ["router"]
    checkpoints = [e for e in events if e["kind"] == "checkpoint"]
    assert [Path(e["path"]).name for e in checkpoints] == [f"step{STEPS}"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("EP 2", {"processes": 2, "ep_size": 2}),
        ("DP 2, 2 micro-batches", {"processes": 2, "accumulate": 2}),
    ],
)
def test_layout_equals_one_process(
    name: str, layout: dict[str, int], alone: Path, tmp_path: Path
) -> None:
    code, output = train(tmp_path / "x", monitors=SETTINGS, **layout)
    assert code == 0, output[-4000:]
    for sample, expected in zip(samples(tmp_path / "x"), samples(alone), strict=True):
        for signal, layers in expected.signals.items():
            for layer, values in layers.items():
                assert sample.signals[signal][layer] == pytest.approx(values, rel=1e-5), signal
        assert sample.loss == pytest.approx(expected.loss, rel=1e-5)


def test_losses_are_bitwise_those_without(alone: Path, tmp_path: Path) -> None:
    outputs = {}
    for name, monitors in (("with", SETTINGS), ("without", None)):
        code, output = train(tmp_path / name, processes=2, ep_size=2, monitors=monitors)
        assert code == 0, output[-4000:]
        outputs[name] = sorted(x for x in output.splitlines() if x.startswith("LOSS"))
    assert len(outputs["with"]) == 2 * STEPS
    assert outputs["with"] == outputs["without"]


def test_bad_settings_stop_the_start(tmp_path: Path) -> None:
    code, output = train(
        tmp_path / "x", processes=1, monitors=SETTINGS | {"recovery": {"mode": "rollback"}}
    )
    assert code == 78
    assert "recovery.mode" in output and "log or notify" in output
    assert "LOSS" not in output
