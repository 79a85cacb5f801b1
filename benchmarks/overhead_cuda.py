"""What monitoring costs a training step on a GPU: on, off and each monitor alone, in one run.

    python benchmarks/overhead_cuda.py --json overhead_cuda.json

The training of ``overhead.py`` on one CUDA card, with a larger model: 8 layers of hidden size 2,048
with 16 heads of 128 on 4 query groups and 8 experts, two micro-batches of two sequences of 2,048
tokens a step, bfloat16 with the distributed optimizer, Megatron's local layers. As there, every ten
steps other monitors are on, with their default settings, and a block holds one sample. Every step
is waited for, so wall time has the card's work in it. A share is (time of the mode) / (time with
none) − 1, with 95% intervals from 1,000 bootstrap draws over rounds; "inside" is the time of the
Python thread in the monitors' calls, most of which a card that is behind hides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from overhead import INTERVAL, block_time, full_samples, inside_shares, made_by, shares  # noqa: E402
from overhead_worker import MODES  # noqa: E402

from mcore_monitors.cpu.arguments import default_arguments  # noqa: E402
from mcore_monitors.windows import SELDOM  # noqa: E402

MODEL = [
    *"--num-layers 8 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632".split(),
    *"--group-query-attention --num-query-groups 4".split(),
    *"--seq-length 2048 --max-position-embeddings 2048 --position-embedding-type rope".split(),
    *"--normalization RMSNorm --swiglu --attention-dropout 0 --hidden-dropout 0".split(),
    "--untie-embeddings-and-output-weights",
    *"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 2048".split(),
    *"--moe-aux-loss-coeff 0.01 --micro-batch-size 2 --global-batch-size 4".split(),
    *"--lr 1e-4 --min-lr 1e-4 --lr-decay-style constant".split(),
    *"--lr-warmup-iters 100 --lr-decay-iters 1000000".split(),
    *"--weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16".split(),
    *"--use-distributed-optimizer --mock-data --num-workers 0".split(),
    *"--tokenizer-type NullTokenizer --vocab-size 32000".split(),
    *"--eval-iters 0 --eval-interval 1000000 --log-interval 50".split(),
    # what the local layers need is what a CPU needs; initial weights and NCCL as on any card
    *(word for word in default_arguments(experts=True) if word != "--use-cpu-initialization"),
    *"--distributed-backend nccl".split(),
]


def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Train; what the worker wrote."""
    config, times, log = (folder / name for name in ("monitors.yaml", "times.json", "log"))
    settings = {"run_dir": str(folder / "run"), "interval": INTERVAL, "console": False}
    config.write_text(yaml.safe_dump(settings | {"wandb": {"enabled": False}}))
    command = [
        sys.executable, str(Path(__file__).resolve()), *MODEL,
        "--train-iters", str(INTERVAL * len(MODES) * (rounds + 2)),
        "--data-cache-path", str(folder / "cache"), "--mcore-monitors", str(config),
    ]  # fmt: skip
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29478"}
    environment = os.environ | alone | {"MCORE_MONITORS_BENCHMARK": str(times)}
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if code:
        sys.exit(log.read_text()[-5000:])
    return json.loads(times.read_text())


class Card:
    """Stands where ``overhead_worker`` measures replicas, of which one card has none."""

    def __init__(self, *parts: Any) -> None:
        pass

    def measure(self) -> None:
        """Nothing to measure between blocks."""

    def result(self) -> dict[str, Any]:
        """The card, and the most bytes of it that were in use."""
        import torch

        return {
            "card": torch.cuda.get_device_name(),
            "most_bytes": torch.cuda.max_memory_allocated(),
        }


def waited_for() -> tuple[float, float]:
    """Wall time and CPU time of this process once the card has done all it was given."""
    import torch

    torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def worker() -> None:
    """Train and time."""
    import overhead_worker

    overhead_worker.clocks, overhead_worker.Replicas = waited_for, Card
    overhead_worker.main()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/overhead_cuda.py --rounds 10 --json overhead_cuda.json",
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="blocks of each mode, a multiple of 5"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.rounds % SELDOM:
        parser.error(f"--rounds: {arguments.rounds} cannot be used; allowed: multiples of {SELDOM}")
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments.rounds, Path(folder))
    steps = np.array(found["steps"]).reshape(-1, len(MODES), INTERVAL, 2)[2:]
    inside = found["inside"][list(MODES).index("all") :: len(MODES)][2:]
    wall = steps[..., 0]
    step = float(block_time(wall[:, 0], full_samples(len(wall))) / INTERVAL)
    tables = {"wall": shares(wall), "inside": inside_shares(inside, wall)}
    print(f"\n{found['replicas']['card']}: one step without monitors {1000 * step:.1f} ms\n")
    print(f"{'monitors':20}{'ms a sample':>12}{'wall time on/off':>28}{'inside':>10}")
    for name, row in tables["inside"].items():
        line = f"{name.removeprefix('share_'):20}{row['milliseconds_a_sample']:12.2f}"
        on = tables["wall"].get(name)
        part = ""
        if on is not None:
            part = f"{100 * on['share']:.2f}% ({100 * on['low']:.2f} to {100 * on['high']:.2f})"
        print(f"{line}{part:>28}{100 * row['share']:9.2f}%")
    if arguments.json:
        result = {name: row["share"] for name, row in tables["wall"].items()}
        result |= {"shares_with_interval": tables, "step_seconds": step, **found["replicas"]}
        result["wall_steps"] = {
            mode: steps[:, i, :, 0].round(5).tolist() for i, mode in enumerate(MODES)
        }
        result |= {"made_by": made_by()}
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    worker() if "MCORE_MONITORS_BENCHMARK" in os.environ else main()
