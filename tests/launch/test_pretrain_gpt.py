"""The launch script trains, saves and goes on exactly where it stopped."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_monitors import cpu

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import runpy, sys
from mcore_monitors import cpu
cpu.install()
runpy.run_path("launch/pretrain_gpt.py", run_name="__main__")
"""


def train(folder: Path, iterations: int, *more: str) -> list[tuple[int, float, float]]:
    """Train a small mixture of experts in one process.

    Returns:
        What was logged: iteration, mean loss since the last one, gradient norm.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = [
        *cpu.default_arguments(experts=True), "--mock-data", "--num-workers", "0",
        "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2",
        "--seq-length", "32", "--max-position-embeddings", "32", "--normalization", "RMSNorm",
        "--position-embedding-type", "rope", "--swiglu", "--num-experts", "4",
        "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32", "--micro-batch-size", "2",
        "--global-batch-size", "4", "--lr", "1e-3", "--lr-decay-style", "constant",
        "--vocab-size", "256", "--eval-iters", "0", "--eval-interval", "1000",
        "--log-interval", "3", "--train-iters", str(iterations), "--save", str(folder),
        "--save-interval", "3", *more,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCH, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": port}
        | {"MASTER_ADDR": "localhost", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logged = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+).*?grad norm: (\S+)", done.stdout)
    return [(int(iteration), float(loss), float(norm)) for iteration, loss, norm in logged]


def test_trains_and_resumes(tmp_path):
    # Megatron logs the first iteration of a process besides every third.
    whole = train(tmp_path / "run", 6)
    assert [iteration for iteration, *_ in whole] == [1, 3, 6]
    assert whole[0][1] == pytest.approx(5.545, abs=0.1)  # ln 256: it knows nothing yet
    rest = train(tmp_path / "again", 6, "--load", str(tmp_path / "run"), "--ckpt-step", "3")
    assert [iteration for iteration, *_ in rest] == [4, 6]
    # To the last digit, dropout included: the random states of both "devices" were restored.
    assert rest[-1] == whole[-1]
