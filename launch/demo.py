"""The whole story in one command: a fault in a running training, the alarm, the way back.

    make demo            # or: .venv/bin/python launch/demo.py --seed 0

Trains a small mixture-of-experts GPT on the standard library's sources with the real Megatron-core,
two processes with expert parallelism, started by the real ``deepspeed`` runner, on the CPU: once
with a fault that the run recovers from, once without the fault, once with the fault left alone
(``launch/demo_runs.py``). Prints a table, writes ``runs/demo-SEED/summary.json`` and one HTML
report.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

import text  # noqa: E402
from demo_model import MEGATRON_ARGUMENTS  # noqa: E402
from demo_runs import BIN, ROOT, SAVE_INTERVAL, Story, main  # noqa: E402


class MegatronStory(Story):
    """The story in Megatron-core."""

    latest = "latest_checkpointed_iteration.txt"

    def __init__(self, seed: int, folder: Path) -> None:
        self.data = text.build(ROOT / "data" / "stdlib")
        super().__init__(seed, folder)

    def base(self) -> dict[str, Any]:
        return yaml.safe_load((ROOT / "configs" / "moe.yaml").read_text())

    def write(self, name: str, settings: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    def checkpoint(self, iteration: int) -> tuple[str, str]:
        return f"iter_{iteration:07d}", str(iteration)

    def command(self, settings: Path, checkpoints: Path, end: int) -> list[str]:
        return [
            str(BIN / "deepspeed"), "--num_accelerators", "2", "--no_local_rank",
            "--master_port", str(29500 + self.seed % 400),
            str(ROOT / "launch" / "pretrain_gpt.py"),
            *MEGATRON_ARGUMENTS,
            "--seed", str(1234 + self.seed),
            "--train-iters", str(end),
            "--data-path", str(self.data),
            "--data-cache-path", str(self.folder.parent / "cache"),
            "--save", str(checkpoints), "--load", str(checkpoints),
            "--save-interval", str(SAVE_INTERVAL),
            "--mcore-monitors", str(settings), "--mcore-monitors-cpu",
        ]  # fmt: skip


if __name__ == "__main__":
    main(
        MegatronStory,
        "demo",
        __doc__,
        "python launch/demo.py --seed 1 --json result.json",
    )
