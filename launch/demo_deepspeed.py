"""The whole story on DeepSpeed: a fault in a running training, the alarm, the way back in place.

    make demo-deepspeed            # or: .venv/bin/python launch/demo_deepspeed.py --seed 0

Trains a small mixture-of-experts language model on the standard library's sources with the real
DeepSpeed (``launch/pretrain_moe_deepspeed.py``, ``configs/deepspeed_moe.json``: ZeRO 1,
DeepSpeed's own ``MoE`` layer, two processes with expert parallelism), on the CPU: once with a fault
that the run recovers from without ending, once without the fault, once with the fault left alone
(``launch/demo_runs.py``). Prints a table, writes ``runs/demo-deepspeed-SEED/summary.json`` and one
HTML report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_runs import BIN, ROOT, SAVE_INTERVAL, Story, main  # noqa: E402


class DeepSpeedStory(Story):
    """The story in DeepSpeed."""

    latest = "latest"

    def __init__(self, seed: int, folder: Path) -> None:
        self.deepspeed = json.loads((ROOT / "configs" / "deepspeed_moe.json").read_text())
        super().__init__(seed, folder)

    def base(self) -> dict[str, Any]:
        settings = self.deepspeed["mcore_monitors"]
        return settings | {"recovery": settings["recovery"] | {"how": "in_place"}}

    def write(self, name: str, settings: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(self.deepspeed | {"mcore_monitors": settings}, indent=1))
        return path

    def checkpoint(self, iteration: int) -> tuple[str, str]:
        return f"global_step{iteration}", f"global_step{iteration}"

    def command(self, settings: Path, checkpoints: Path, end: int) -> list[str]:
        return [
            str(BIN / "deepspeed"), "--num_accelerators", "2", "--no_local_rank",
            "--master_port", str(29900 + self.seed % 400),
            str(ROOT / "launch" / "pretrain_moe_deepspeed.py"),
            "--deepspeed_config", str(settings),
            "--model", "deepspeed",
            "--seed", str(self.seed),
            "--steps", str(end),
            "--save", str(checkpoints),
            "--save-interval", str(SAVE_INTERVAL),
        ]  # fmt: skip


if __name__ == "__main__":
    main(
        DeepSpeedStory,
        "demo-deepspeed",
        __doc__,
        "python launch/demo_deepspeed.py --seed 1 --json result.json",
    )
