"""The added lines in the real training loops: who is called, when, and nobody without the flag."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

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


def _start(
    module: str, *words: object, cwd: Path, megatron: Path | None = None
) -> subprocess.Popen:
    """Start a recording script of this folder as the only rank of a job of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cwd.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"DS_ACCELERATOR": "cpu", "MCORE_MONITORS_CPU": "1"},
        "PYTHONPATH": os.pathsep.join(str(path) for path in (megatron, ROOT) if path),
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.patching.{module}", *map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _megatron(exit_at: int, *words: str, cwd: Path, megatron: Path | None) -> subprocess.Popen:
    script = [ROOT / "launch/pretrain_gpt.py", *default_arguments(), *ARGUMENTS, *words]
    return _start("record_megatron", "record.json", exit_at, *script, cwd=cwd, megatron=megatron)


def _finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output[-4000:]
    return output


@pytest.fixture(scope="session")
def older(tmp_path_factory) -> Path:
    """All of the older Megatron-core, patched."""
    root = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(older_wheel()) as archive:
        archive.extractall(root)
    actions.apply(Tree(host="megatron-core", version="0.18.2", root=root))
    return root


@pytest.mark.parametrize("release", ["installed", "0.18.2"])
def test_megatron_calls(release, tmp_path, request):
    """To the natural end, and to one asked for after iteration 3."""
    megatron = request.getfixturevalue("older") if release == "0.18.2" else None
    flag = ["--mcore-monitors", "any.yaml"]
    whole = _megatron(0, *flag, cwd=tmp_path / "whole", megatron=megatron)
    left = _megatron(3, *flag, cwd=tmp_path / "left", megatron=megatron)
    _finish(whole)
    _finish(left, 85)
    calls = json.loads((tmp_path / "whole/record.json").read_text())["calls"]
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
    calls_left = json.loads((tmp_path / "left/record.json").read_text())["calls"]
    third = names.index("on_step") + 4
    assert calls_left == [*calls[:third], ["on_end", None]]


def test_megatron_without_the_flag(tmp_path):
    """The checkpoint has the bytes that the released files give: weights, optimizer, arguments."""
    (installed,) = find_trees("megatron-core")
    released = replace(installed, root=tmp_path / "site")
    shutil.copytree(
        installed.root / "megatron",
        released.root / "megatron",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    actions.revert(released)
    runs = [
        _megatron(0, cwd=tmp_path / "patched", megatron=None),
        _megatron(0, cwd=tmp_path / "released", megatron=released.root),
    ]
    for run in runs:
        _finish(run)
    one, other = (tmp_path / name / "checkpoints/iter_0000004" for name in ("patched", "released"))
    nothing = {"calls": [], "ours": []}
    assert json.loads((tmp_path / "patched/record.json").read_text()) == nothing
    (shard,) = one.glob("*.distcp")
    assert shard.read_bytes() == (other / shard.name).read_bytes()


def test_deepspeed_calls_and_silence(tmp_path):
    """With the key, in order; without it the same losses and nothing of ours imported."""
    key = _start("record_deepspeed", "record.json", "saved", "any.yaml", cwd=tmp_path / "key")
    none = _start("record_deepspeed", "record.json", "saved", cwd=tmp_path / "none")
    _finish(key)
    _finish(none)
    with_key, without = (
        json.loads((tmp_path / name / "record.json").read_text()) for name in ("key", "none")
    )
    two_taps = [["tap", [6, 4]], ["tap", [6, 4]]]
    assert with_key["calls"] == [
        ["on_engine", "any.yaml"],
        *two_taps,
        ["on_step", 1, 2],
        ["on_checkpoint", 1, "saved", "first"],
        *two_taps,
        ["on_step", 2, 4],
        ["on_load", 1, "saved/first/mp_rank_00_model_states.pt"],
    ]
    assert without == {"calls": [], "losses": with_key["losses"], "ours": []}
