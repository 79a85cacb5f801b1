"""On a real card: Megatron-core and DeepSpeed train with all monitors, undisturbed.

Skipped where there is none. One process, so NCCL has a group of one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader
from tests.megatron.train import EXACT, ROOT, Result, free_port, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

#: sums in a fixed order, so that two runs can be compared bit by bit
ON_CARD = "--distributed-backend nccl --deterministic-mode"
#: every monitor, all its signals at every sample
MONITORS: dict[str, Any] = {
    "interval": 2,
    "console": False,
    "wandb": {"enabled": False},
    "monitors": {
        "attention_update": {"windows": [2], "every": 1},
        "router": {"every": 1},
        "attention_activity": {"every": 1},
        "optimizer": {"every": 1},
        "koopman": {"enabled": True, "every": 4, "rank": 8},
    },
}
FIXED = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
#: makes the weights where they belong
ON_THE_CARD = "sys.argv.remove('--use-cpu-initialization')\n" + EXACT


def on_card(folder: Path, form: str, **more: Any) -> Result:
    result = train(
        folder, f"{ON_CARD} {form}", iterations=8, environment=FIXED, before=ON_THE_CARD,
        cpu_flag=False, timeout=400, **more,
    )  # fmt: skip
    assert result.exit_code == 0, result.output[-4000:]
    return result


def healthy(samples: list[Any], events: list[dict[str, Any]], count: int) -> None:
    """Everything was looked at, nothing failed and no residual is over its limit."""
    disabled = [e for e in events if e["kind"] == "monitor_disabled"]
    assert not disabled, disabled
    assert not [e for e in events if e["kind"] == "alarm"]
    assert len(samples) == count
    seen = {name.split("/")[0] for sample in samples for name in sample.signals}
    assert {"attention", "router"} <= seen
    limits = next(e for e in events if e["kind"] == "start")["limits"]
    judged = 0
    for sample in samples:
        for name in limits.keys() & sample.signals.keys():
            for layer, values in sample.signals[name].items():
                there = [v for v in values if not math.isnan(v)]  # the others: no such unit
                judged += len(there)
                assert max(there, default=0) <= limits[name], (sample.iteration, name, layer)
    assert judged


@pytest.mark.parametrize("form", ["", "--bf16"], ids=["fp32", "bf16"])
def test_megatron_trains_as_without_monitors(form: str, tmp_path: Path) -> None:
    without = on_card(tmp_path / "without", form)
    watched = on_card(tmp_path / "watched", form, monitors=MONITORS)
    assert len(without.exact) == 8
    assert watched.exact == without.exact
    healthy(watched.samples, watched.events, 4)
    names = {name for sample in watched.samples for name in sample.signals}
    assert {"koopman/near_unit", "router/routing_entropy"} <= names


@pytest.mark.parametrize("model", ["deepspeed", "hf"])
def test_deepspeed_trains_with_monitors(model: str, tmp_path: Path) -> None:
    settings = json.loads((ROOT / "configs" / "deepspeed_moe.json").read_text())
    settings["bf16"] = {"enabled": True}
    settings["mcore_monitors"] = {"run_dir": str(tmp_path / "run"), **MONITORS}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "launch" / "pretrain_moe_deepspeed.py"),
            "--deepspeed_config", str(tmp_path / "ds.json"), "--model", model,
            "--expert-parallel", "1", "--steps", "8", "--save", str(tmp_path / "checkpoints"),
            "--save-interval", "1000",
        ],
        env=os.environ | alone | {"MASTER_PORT": str(free_port())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    healthy(HistoryReader(tmp_path / "run").read(), EventReader(tmp_path / "run").read(), 4)
