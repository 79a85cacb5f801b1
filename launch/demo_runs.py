"""The story that both demos tell, whatever the host: three runs from one beginning.

1. **recovered** a faulty attention kernel is switched on in the middle; the run raises the alarm,
   goes back to a verified checkpoint, takes the safe attention path and goes on to the end;
2. **healthy** the same run without the fault, from the last checkpoint before it;
3. **left alone** the same fault with recovery off, to see what the other rules would have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo_summary import print_table, summarise
from tqdm import tqdm

from mcore_monitors.sinks.history import HistoryWriter, effective_history

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
BIN = Path(sys.executable).parent


class Story(ABC):
    """The three runs of one seed, in one folder; a host says how it is started and saves."""

    #: file in the folder of checkpoints that names the last one
    latest: str

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.bar = tqdm(
            # what the recovered run trains twice is known when it happens: about 110 steps
            total=INJECTED_AT + 110 + 2 * (END - BRANCH) + LEFT_ALONE_END - BRANCH - SAVE_INTERVAL,
            unit="step",
            desc="demo",
            dynamic_ncols=True,
        )

    @abstractmethod
    def base(self) -> dict[str, Any]:
        """The monitors' settings that the demo starts from."""

    @abstractmethod
    def write(self, name: str, settings: dict[str, Any]) -> Path:
        """Write a run's settings where the host reads them."""

    @abstractmethod
    def checkpoint(self, iteration: int) -> tuple[str, str]:
        """Name of a checkpoint's folder, and what the file ``latest`` holds for it."""

    @abstractmethod
    def command(self, settings: Path, checkpoints: Path, end: int) -> list[str]:
        """The training's command, without `mcore-monitors launch`."""

    def config(self, name: str, *, mode: str, drill: bool) -> Path:
        """Write the settings of one run: the host's own start with the demo's values."""
        settings = self.base()
        settings["run_dir"] = str(self.folder / name)
        settings["recovery"] |= {"mode": mode, "quiet": 80}
        if drill:
            settings["drill"] = {
                "fault": "attention_row_term",
                "strength": STRENGTH,
                "from_iteration": INJECTED_AT,
            }
        return self.write(name, settings)

    def branch(self, source: str, name: str) -> None:
        """Let run ``name`` begin as run ``source`` was at the branch iteration."""
        to = self.folder / name
        (to / "checkpoints").mkdir(parents=True)
        checkpoint, latest = self.checkpoint(BRANCH)
        shutil.copytree(
            self.folder / source / "checkpoints" / checkpoint, to / "checkpoints" / checkpoint
        )
        (to / "checkpoints" / self.latest).write_text(latest)
        history = HistoryWriter(to)
        for sample in effective_history(self.folder / source, upto=BRANCH):
            # the beginning that all three share, without the rollback that one of them had
            history.sample(replace(sample, attempt=0))
        history.close()

    def run(self, name: str, settings: Path, end: int) -> None:
        """Train to iteration ``end``; `mcore-monitors launch` starts it again if it asks for it."""
        checkpoints = self.folder / name / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        command = [str(BIN / "mcore-monitors"), "launch", "--"]
        command += self.command(settings, checkpoints, end)
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
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
        # a run that branched off begins with samples of another one, which are no progress
        samples, said, at = _Lines(history), _Lines(log), 0
        for line in samples.new():
            at = json.loads(line)["iteration"]
        while True:
            running = process.poll() is None
            for line in samples.new():
                before, at = at, json.loads(line)["iteration"]
                self.bar.update(max(0, at - before))
            for line in said.new():
                if any(mark in line for mark in _WORTH_SAYING):
                    self.bar.write(line.rstrip())
            if not running:
                return
            time.sleep(1.0)


class _Lines:
    """The lines of a file that grows, each once and when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[str]:
        """Return the lines that are complete since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return []
        self._read += len(whole) + 1
        return whole.decode(errors="replace").splitlines()


def main(story: type[Story], prefix: str, text: str, example: str) -> None:
    """Command line of a demo.

    Args:
        story: the host's.
        prefix: of the result's folder, before the seed.
        text: what the demo does, for ``--help``.
        example: a command, for ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: {example}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder for the results")
    parser.add_argument("--json", type=Path, help="write the summary to this file as well")
    arguments = parser.parse_args()

    began = time.time()
    folder = arguments.runs.absolute() / f"{prefix}-{arguments.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    demo = story(arguments.seed, folder)
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
            BIN / "mcore-monitors", "report", folder / "recovered",
            "--compare", folder / "healthy", folder / "left-alone", "--output", report,
        ],
        check=True,
    )  # fmt: skip
    print(f"\nreport: {report}\nsummary: {folder / 'summary.json'}")
