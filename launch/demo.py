"""The whole story in one command: a fault in a running training, the alarm, the way back.

    make demo            # or: .venv/bin/python launch/demo.py --seed 0

Trains a small mixture-of-experts GPT on the standard library's sources with the real Megatron-core,
two processes with expert parallelism, started by the real ``deepspeed`` runner, on the CPU. Three
runs from one beginning:

1. **recovered** a faulty attention kernel is switched on in the middle; the run raises the alarm,
   goes back to a verified checkpoint, takes the safe attention path and goes on to the end;
2. **healthy** the same run without the fault, from the last checkpoint before it;
3. **left alone** the same fault with recovery off, to see what the other rules would have seen.

Prints a table, writes ``runs/demo-SEED/summary.json`` and one HTML report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml
from tqdm import tqdm

from mcore_monitors.sinks.history import HistoryWriter, effective_history

sys.path.insert(0, str(Path(__file__).resolve().parent))

import text  # noqa: E402
from demo_model import MEGATRON_ARGUMENTS  # noqa: E402
from demo_summary import print_table, summarise  # noqa: E402

#: the fault is switched on here, with this strength (`docs/demo.md` says how they were chosen)
INJECTED_AT = 600
STRENGTH = 0.003
#: last iteration of the recovered and of the healthy run, and of the run that is left alone
END = 850
LEFT_ALONE_END = 850
#: checkpoints; the last one before the fault is where the other two runs branch off
SAVE_INTERVAL = 50
BRANCH = INJECTED_AT - SAVE_INTERVAL

#: lines of a run's output that the demo passes on
_WORTH_SAYING = ("DRILL:", "| DIAGNOSIS", "| RESUME", "| REMEDY", "| RECOVERED", "launch:")

ROOT = Path(__file__).resolve().parent.parent


class Demo:
    """The three runs of one seed, below ``runs/demo-SEED``."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.data = text.build(ROOT / "data" / "stdlib")
        self.bar = tqdm(
            # what the recovered run trains twice is known when it happens: about 110 steps
            total=INJECTED_AT + 110 + 2 * (END - BRANCH) + LEFT_ALONE_END - BRANCH - SAVE_INTERVAL,
            unit="step",
            desc="demo",
            dynamic_ncols=True,
        )

    def config(self, name: str, *, mode: str, drill: bool) -> Path:
        """Write the settings of one run: `configs/moe.yaml` with the demo's own values."""
        settings = yaml.safe_load((ROOT / "configs" / "moe.yaml").read_text())
        settings["run_dir"] = str(self.folder / name)
        settings["recovery"] |= {"mode": mode, "quiet": 80}
        if drill:
            settings["drill"] = {
                "fault": "attention_row_term",
                "strength": STRENGTH,
                "from_iteration": INJECTED_AT,
            }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    def branch(self, source: str, name: str) -> None:
        """Let run ``name`` begin as run ``source`` was at the branch iteration."""
        to = self.folder / name
        (to / "checkpoints").mkdir(parents=True)
        checkpoint = f"iter_{BRANCH:07d}"
        shutil.copytree(
            self.folder / source / "checkpoints" / checkpoint, to / "checkpoints" / checkpoint
        )
        (to / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(BRANCH))
        history = HistoryWriter(to)
        for sample in effective_history(self.folder / source, upto=BRANCH):
            # the beginning that all three share, without the rollback that one of them had
            history.sample(replace(sample, attempt=0))
        history.close()

    def run(self, name: str, config: Path, end: int) -> None:
        """Train to iteration ``end``; `mcore-monitors launch` starts it again after a rollback."""
        checkpoints = self.folder / name / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        bin_dir = Path(sys.executable).parent
        command = [
            str(bin_dir / "mcore-monitors"), "launch", "--",
            str(bin_dir / "deepspeed"), "--num_accelerators", "2", "--no_local_rank",
            "--master_port", str(29500 + self.seed % 400),
            str(ROOT / "launch" / "pretrain_gpt.py"),
            *MEGATRON_ARGUMENTS,
            "--seed", str(1234 + self.seed),
            "--train-iters", str(end),
            "--data-path", str(self.data),
            "--data-cache-path", str(self.folder.parent / "cache"),
            "--save", str(checkpoints), "--load", str(checkpoints),
            "--save-interval", str(SAVE_INTERVAL),
            "--mcore-monitors", str(config), "--mcore-monitors-cpu",
        ]  # fmt: skip
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        }
        log = self.folder / f"{name}.log"
        self.bar.set_postfix_str(name)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
            )
            try:
                self._follow(process, self.folder / name / "history.jsonl", log)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode != 0:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-25:])
            sys.exit(f"{tail}\nThe {name} run ended with code {process.returncode}; see {log}")

    def _follow(self, process: subprocess.Popen, history: Path, log: Path) -> None:
        """Move the bar along with the history, and pass on what the monitors say."""
        seen, said = None, 0
        while True:
            running = process.poll() is None
            if history.exists():
                lines = history.read_text().splitlines()
                iterations = [json.loads(x)["iteration"] for x in lines if x.endswith("}")]
                start = len(iterations) if seen is None else seen
                for i in range(start, len(iterations)):
                    step = iterations[i] - (iterations[i - 1] if i else 0)
                    self.bar.update(max(0, step))
                seen = len(iterations)
            for line in log.read_text(errors="replace")[said:].splitlines(keepends=True):
                if not line.endswith("\n"):
                    break
                said += len(line)
                if any(mark in line for mark in _WORTH_SAYING):
                    self.bar.write(line.rstrip())
            if not running:
                return
            time.sleep(0.5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python launch/demo.py --seed 1 --json result.json",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder for the results")
    parser.add_argument("--json", type=Path, help="write the summary to this file as well")
    arguments = parser.parse_args()

    began = time.time()
    folder = arguments.runs / f"demo-{arguments.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    demo = Demo(arguments.seed, folder)
    demo.run("recovered", demo.config("recovered", mode="rollback", drill=True), END)
    for name, drill, end in (("healthy", False, END), ("left-alone", True, LEFT_ALONE_END)):
        demo.branch("recovered", name)
        demo.run(name, demo.config(name, mode="log", drill=drill), end)
    demo.bar.close()

    summary = summarise(folder, injected_at=INJECTED_AT, seconds=time.time() - began)
    print_table(summary)
    for path in filter(None, (folder / "summary.json", arguments.json)):
        path.write_text(json.dumps(summary, indent=1) + "\n")
    report = folder / "report.html"
    subprocess.run(
        [
            Path(sys.executable).parent / "mcore-monitors", "report", folder / "recovered",
            "--compare", folder / "healthy", folder / "left-alone", "--output", report,
        ],
        check=True,
    )  # fmt: skip
    print(f"\nreport: {report}\nsummary: {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
