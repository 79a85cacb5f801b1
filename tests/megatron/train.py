"""Run the real Megatron-core in one to four gloo processes and read back what was recorded.

Every run goes through ``launch/pretrain_gpt.py`` and Megatron's own loop, with the patched wheel.
The processes are started without a runner, which saves seconds a run; ``tests/test_demo.py`` starts
through the ``deepspeed`` runner.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from mcore_monitors.cpu.arguments import default_arguments
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader

ROOT = Path(__file__).resolve().parents[2]

#: tiny, with grouped queries and experts; fp32; no auxiliary loss, whose value depends on how a
#: batch is cut into micro-batches
MODEL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --ffn-hidden-size 64 --seq-length 32 --max-position-embeddings 32
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
--lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --lr-decay-iters 1000 --weight-decay 0.1
--clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --seed 1234 --mock-data
--tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0 --eval-iters 0
--eval-interval 1000000 --log-interval 1
""".split()
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-aux-loss-coeff 0"
BATCH = "--micro-batch-size 2 --global-batch-size 4"

#: source for ``before`` of :func:`train`: every loss and gradient norm is printed exactly
EXACT = """
import megatron.training.training as _training
_step = _training.train_step
def _told(*args, **kwargs):
    result = _step(*args, **kwargs)
    values = [*result[0].values(), result[5]]
    print('EXACT', *(float(v).hex() for v in values), flush=True)
    return result
_training.train_step = _told
"""

_LOSS = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)")


@dataclass
class Result:
    """What one training left behind."""

    exit_code: int
    output: str
    samples: list[Sample] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, tuple[str, str]]:
        """Iteration to (loss, gradient norm), digit by digit as Megatron printed them."""
        return {int(i): (loss, norm) for i, loss, norm in _LOSS.findall(self.output)}

    @property
    def exact(self) -> list[str]:
        """What :data:`EXACT` printed, of all processes."""
        return [line for line in self.output.splitlines() if line.startswith("EXACT")]

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [e for e in self.events if e["kind"] == kind]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _command(
    folder: Path,
    arguments: str,
    iterations: int,
    monitors: dict[str, Any] | str | None,
    experts: bool,
    batch: str,
) -> tuple[list[str], Path]:
    """Megatron's arguments, and the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*MODEL, *(EXPERTS.split() if experts else []), *batch.split()]
    command += [*default_arguments(experts=experts), "--train-iters", str(iterations)]
    command += [*arguments.split(), "--data-cache-path", str(folder / "cache")]
    run_dir = folder / "run"
    if isinstance(monitors, dict):
        config = folder / "monitors.yaml"
        config.write_text(yaml.safe_dump({"run_dir": str(run_dir), **monitors}))
        monitors = str(config)
    if monitors is not None:
        command += ["--mcore-monitors", monitors]
    return command, run_dir


def launch(
    folder: Path,
    arguments: str,
    *,
    processes: int,
    iterations: int,
    monitors: dict[str, Any],
    timeout: float = 400,
) -> Result:
    """Train as a user would: `mcore-monitors launch` around the real `deepspeed` runner."""
    command, run_dir = _command(folder, arguments, iterations, monitors, True, BATCH)
    binaries = Path(sys.executable).parent
    output = (folder / "launch.log").open("w+")
    child = subprocess.Popen(
        [
            str(binaries / "mcore-monitors"), "launch", "--",
            str(binaries / "deepspeed"), "--num_accelerators", str(processes), "--no_local_rank",
            "--master_port", str(free_port()), str(ROOT / "launch" / "pretrain_gpt.py"),
            *command, "--mcore-monitors-cpu",
        ],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ
        | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        },
        cwd=folder,
    )  # fmt: skip
    return _gather([(child, output)], run_dir, timeout)


def train(
    folder: Path,
    arguments: str = "",
    *,
    processes: int = 1,
    iterations: int,
    monitors: dict[str, Any] | str | None = None,
    experts: bool = True,
    batch: str = BATCH,
    environment: dict[str, str] | None = None,
    before: str = "",
    cpu_flag: bool = True,
    timeout: float = 240,
) -> Result:
    """Train and return the outcome.

    Args:
        folder: for the configuration and the run folder ``folder/run``.
        arguments: further Megatron arguments; they win over the model's.
        monitors: settings without ``run_dir``; a string is the path of a configuration; None
            trains without the flag.
        before: Python source that each process runs first.
        cpu_flag: give the switch of the CPU stand-in, which an unpatched wheel doesn't know.
    """
    command, run_dir = _command(folder, arguments, iterations, monitors, experts, batch)
    command += ["--mcore-monitors-cpu"] if cpu_flag else []
    script = str(ROOT / "launch" / "pretrain_gpt.py")
    start = f"import sys, runpy\n{before}\nsys.argv[0] = {script!r}\n"
    start += f"runpy.run_path({script!r}, run_name='__main__')"
    port = str(free_port())
    children = []
    for rank in range(processes):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        output = (folder / f"rank{rank}.log").open("w+")
        child = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
        )
        children.append((child, output))
    return _gather(children, run_dir, timeout)


def _gather(
    children: list[tuple[subprocess.Popen, IO[str]]], run_dir: Path, timeout: float
) -> Result:
    processes = [child for child, _ in children]
    end = time.monotonic() + timeout
    failed_at = None
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.1)
        if failed_at is None and any(p.returncode for p in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + 10:
            break  # the others wait for a dead process in a collective
    text = []
    for process, output in children:
        process.kill()
        process.wait()
        output.seek(0)
        text.append(output.read())
        output.close()
    codes = [p.returncode for p in processes]
    # the first cause, rather than the kill that followed from it
    code = next((c for c in codes if c > 0), next((c for c in codes if c), 0))
    result = Result(code, "\n".join(text))
    if (run_dir / "history.jsonl").exists():
        result.samples = HistoryReader(run_dir).read()
    if (run_dir / "events.jsonl").exists():
        result.events = EventReader(run_dir).read()
    return result
