"""Healthy runs: no conservation residual over its limit, in any layout or number format.

    nice -n 19 python benchmarks/conservation_healthy.py --json healthy.json

Trains a small GPT on the standard library's sources with the real Megatron-core, one layout and
number format after another, and a Hugging Face model under DeepSpeed
(conservation_healthy_deepspeed.py), and samples every step. A row says how near to its limit each
residual came. Can be stopped and started again: rows that the file holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "launch")]

import text  # noqa: E402

from mcore_monitors.config import MonitorsConfig  # noqa: E402
from mcore_monitors.cpu.arguments import default_arguments  # noqa: E402
from mcore_monitors.sinks.events import EventReader  # noqa: E402
from mcore_monitors.sinks.history import HistoryReader  # noqa: E402

MODEL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm
--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
--untie-embeddings-and-output-weights --micro-batch-size 4 --global-batch-size 4
--lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --lr-decay-iters 1000000 --lr-warmup-iters 50
--weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
--split 98,2,0 --tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0 --eval-iters 0
--eval-interval 1000000 --log-interval 500
""".split()
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-aux-loss-coeff 0.01"
#: layout -> (processes, arguments, whether it has experts)
LAYOUTS: dict[str, tuple[int, str, bool]] = {
    "dense": (1, "", False),
    "experts": (1, EXPERTS, True),
    "grouped queries": (1, "--group-query-attention --num-query-groups 2", False),
    "LayerNorm and QK norm": (1, "--normalization LayerNorm --qk-layernorm", False),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        False,
    ),
    "TP 2 with sequence parallelism": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
        False,
    ),
    "PP 2": (2, "--pipeline-model-parallel-size 2", False),
    "DP 2 with experts on both": (
        2,
        f"{EXPERTS} --expert-model-parallel-size 2 --micro-batch-size 2",
        True,
    ),
}
FORMATS = {"fp32": "", "bf16": "--bf16"}
HUGGING_FACE = "Hugging Face under DeepSpeed"


PACKAGES = ("mcore-monitors", "megatron-core", "deepspeed", "transformers", "torch")
NAMES = [*LAYOUTS, HUGGING_FACE]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/conservation_healthy.py --steps 100 --only dense",
    )
    parser.add_argument("--steps", type=int, default=2000, help="sampled steps of each run")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the data's order")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", type=Path, help="write the rows to this file, and start from it")
    arguments = parser.parse_args()

    rows = _known(arguments)
    for layout in arguments.only:
        for form in arguments.formats:
            if any((row["layout"], row["format"]) == (layout, form) for row in rows):
                continue
            rows.append(measure(layout, form, arguments.steps, arguments.seed))
            print_row(rows[-1])
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(summary(rows), indent=1) + "\n")
    result = summary(rows)
    print(
        f"{result['healthy_runs']} healthy runs, {result['samples']} samples: "
        f"{result['healthy_over_limit']} with a residual over its limit, "
        f"{result['alarms']} alarms"
    )


def _known(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that the file holds already, of the same seed and length."""
    if arguments.json is None or not arguments.json.exists():
        return []
    rows = json.loads(arguments.json.read_text())["rows"]
    wanted = (arguments.seed, arguments.steps)
    return [row for row in rows if (row["seed"], row["samples"]) == wanted]


def measure(layout: str, form: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one run and read how near each residual came to its limit."""
    folder = Path(tempfile.mkdtemp(prefix="conservation-healthy-"))
    monitors = {f: {"enabled": f == "conservation"} for f in MonitorsConfig.__dataclass_fields__}
    config = folder / "monitors.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(folder / "run"),
                "interval": 1,
                "monitors": monitors,
                "console": False,
                "wandb": {"enabled": False},
            }
        )
    )
    if layout == HUGGING_FACE:
        processes = 1
        command = [
            sys.executable, str(ROOT / "benchmarks" / "conservation_healthy_deepspeed.py"),
            "--monitors", str(config), "--steps", str(steps), "--seed", str(seed),
            *FORMATS[form].split(),
        ]  # fmt: skip
    else:
        processes = LAYOUTS[layout][0]
        command = _megatron(layout, form, steps, seed, folder, config)
    began = time.time()
    _train(command, processes, folder)
    samples = HistoryReader(folder / "run").read()
    events = EventReader(folder / "run").read()
    limits = next(e for e in events if e["kind"] == "start")["limits"]
    row = _row(samples, limits)
    disabled = [e["error"] for e in events if e["kind"] == "monitor_disabled"]
    if disabled or len(samples) != steps:
        sys.exit(f"{layout}, {form}: {len(samples)} samples of {steps}. {disabled}")
    shutil.rmtree(folder)
    return {
        "layout": layout,
        "format": form,
        "seed": seed,
        "samples": len(samples),
        "alarms": sum(e["kind"] == "alarm" for e in events),
        **row,
        "limits": limits,
        "seconds": round(time.time() - began),
    }


def _megatron(
    layout: str, form: str, steps: int, seed: int, folder: Path, config: Path
) -> list[str]:
    """The command of one Megatron process."""
    _, arguments, experts = LAYOUTS[layout]
    data = text.build(ROOT / "data" / "stdlib")
    return [
        sys.executable, str(ROOT / "launch" / "pretrain_gpt.py"),
        *MODEL, *default_arguments(experts=experts), *arguments.split(), *FORMATS[form].split(),
        "--train-iters", str(steps), "--seed", str(seed), "--data-path", str(data),
        "--data-cache-path", str(folder / "cache"),
        "--mcore-monitors", str(config), "--mcore-monitors-cpu",
    ]  # fmt: skip


def _train(command: list[str], processes: int, folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(processes):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        log = (folder / f"rank{rank}.log").open("w")
        children.append(
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        )
    codes = [child.wait() for child in children]
    if any(codes):
        tail = (folder / "rank0.log").read_text(errors="replace")[-2000:]
        sys.exit(f"{tail}\nThe run ended with codes {codes}; see {folder}")


def _row(samples: list[Any], limits: dict[str, float]) -> dict[str, Any]:
    """Largest value over its limit of each residual, and the samples in which one was over."""
    largest: dict[str, float] = {}
    over = 0
    for sample in samples:
        worst = 0.0
        for signal, layers in sample.signals.items():
            for values in layers.values():
                for value in values:
                    if math.isfinite(value):
                        size = value / limits[signal]
                        largest[signal] = max(largest.get(signal, 0.0), size)
                        worst = max(worst, size)
        over += worst > 1
    return {"over_limit": over, "largest_over_limit": {n: float(f"{x:.3g}") for n, x in
                                                       largest.items()}}  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """One line a run: the nearest to its limit of all residuals."""
    name, size = max(row["largest_over_limit"].items(), key=lambda item: item[1])
    print(
        f"{row['layout']:32} {row['format']}  {row['samples']} samples, {row['over_limit']} over a "
        f"limit, {row['alarms']} alarms; nearest {name} at {size:.3g} of its limit; "
        f"{row['seconds']} s",
        flush=True,
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file: headline figures, rows, and what made them."""
    return {
        "healthy_runs": len(rows),
        "healthy_over_limit": sum(row["over_limit"] > 0 for row in rows),
        "samples": sum(row["samples"] for row in rows),
        "alarms": sum(row["alarms"] for row in rows),
        "rows": rows,
        "made_by": {
            "command": " ".join(["python", "benchmarks/conservation_healthy.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {n: version(n) for n in PACKAGES},
        },
    }


if __name__ == "__main__":
    main()
