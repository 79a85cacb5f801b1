"""The added lines in the real training loops: who is called, when, and nobody without the flag."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mcore_monitors.cpu.arguments import default_arguments
from mcore_monitors.patching import actions
from mcore_monitors.patching.hosts import Tree, find_trees
from tests.patching.trees import older_wheel

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 "
    "--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --num-workers 0 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 --save checkpoints --save-interval 2"
).split()
FLAG = ["--mcore-monitors", "any.yaml"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recording script of this folder, under way as the only rank of a job of its own."""

    process: subprocess.Popen
    folder: Path

    def record(self, code: int = 0) -> dict[str, Any]:
        """Wait for the script to leave with this code and return what it wrote down."""
        assert self.process.wait() == code, (self.folder / "log").read_text()[-4000:]
        return json.loads((self.folder / "record.json").read_text())


@pytest.fixture
def start(tmp_path):
    """Start a script in a folder of its own; what still runs when a test fails is ended."""
    runs = []

    def starter(name: str, module: str, *words: object, megatron: Path | None = None) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        environment = {
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
            # A job of one rank may leave the choice of a port to the system: no race for one.
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
            **{"DS_ACCELERATOR": "cpu", "MCORE_MONITORS_CPU": "1"},
            "PYTHONPATH": os.pathsep.join(str(path) for path in (megatron, ROOT) if path),
        }
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"tests.patching.{module}", "record.json", *map(str, words)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        runs.append(Run(process=process, folder=folder))
        return runs[-1]

    yield starter
    for run in runs:
        run.process.kill()
        run.process.wait()


def _megatron(exit_at: int, *words: str) -> list[object]:
    """Return the words after the record's name for a training of 4 iterations."""
    return [exit_at, ROOT / "launch/pretrain_gpt.py", *default_arguments(), *ARGUMENTS, *words]


@pytest.fixture(scope="session")
def older(tmp_path_factory) -> Path:
    """All of the older Megatron-core, patched."""
    root = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(older_wheel()) as archive:
        archive.extractall(root)
    actions.apply(Tree(host="megatron-core", version="0.18.2", root=root))
    return root


@pytest.mark.parametrize("release", ["installed", "0.18.2"])
def test_megatron_calls(release, start, request):
    """To the natural end, and to one asked for after iteration 3."""
    megatron = request.getfixturevalue("older") if release == "0.18.2" else None
    whole, left = (
        start(f"exit-{at}", "record_megatron", *_megatron(at, *FLAG), megatron=megatron)
        for at in (0, 3)
    )
    calls = whole.record()["calls"]
    names = [name for name, _ in calls]
    # Arguments are parsed again for the fault tolerance package, which throws them away.
    assert names[:4] == ["on_arguments", "on_arguments", "on_layer_spec", "on_setup"]
    step, checkpoint = ["on_step"], ["on_step", "on_checkpoint"]
    assert names[4:] == step + checkpoint + step + checkpoint + ["on_end"]

    by_name = {name: [given for called, given in calls if called == name] for name in names}
    # 4 steps of 4 samples, and the 8 that the note taker says were passed over.
    assert by_name["on_setup"] == [[1, True, 0, 24]]
    assert [given[0] for given in by_name["on_step"]] == [1, 2, 3, 4]
    assert all(3 < loss < 6 and norm > 0 for _, loss, norm, _, _ in by_name["on_step"])
    assert by_name["on_checkpoint"] == [
        [2, "checkpoints/iter_0000002"],
        [4, "checkpoints/iter_0000004"],
    ]
    third = names.index("on_step") + 4
    assert left.record(85)["calls"] == [*calls[:third], ["on_end", None]]


def test_megatron_without_the_flag(start, tmp_path):
    """The checkpoint has the bytes that the released files give: weights, optimizer, arguments."""
    (installed,) = find_trees("megatron-core")
    released = replace(installed, root=tmp_path / "site")
    shutil.copytree(
        installed.root / "megatron",
        released.root / "megatron",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    actions.revert(released)
    patched = start("patched", "record_megatron", *_megatron(0))
    other = start("released", "record_megatron", *_megatron(0), megatron=released.root)
    assert patched.record() == {"calls": [], "ours": []}
    other.record()
    last = "checkpoints/iter_0000004"
    (shard,) = (patched.folder / last).glob("*.distcp")
    assert shard.read_bytes() == (other.folder / last / shard.name).read_bytes()


def test_deepspeed_calls_and_silence(start):
    """With the key, in order; without it the same losses and nothing of ours imported."""
    with_key = start("key", "record_deepspeed", "saved", "any.yaml")
    without = start("none", "record_deepspeed", "saved")
    record = with_key.record()
    two_taps = [["tap", [6, 4]], ["tap", [6, 4]]]
    assert record["calls"] == [
        ["on_engine", "any.yaml"],
        *two_taps,
        ["on_step", 1, 2],
        ["on_checkpoint", 1, "saved", "first"],
        *two_taps,
        ["on_step", 2, 4],
        ["on_load", 1, "saved/first/mp_rank_00_model_states.pt"],
    ]
    assert without.record() == {"calls": [], "losses": record["losses"], "ours": []}
