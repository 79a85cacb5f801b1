"""What the CPU stand-in costs per training step, and what a TorchFunctionMode would cost.

    python benchmarks/cpu_standin.py --steps 60 --json runs/cpu_standin.json

Runs Megatron's own training loop in one process on made-up data. Megatron cannot run on a CPU
without the stand-in, so its cost is counted: calls a step (by the profiler, in a few steps of their
own) times the price of a call (measured alone, against the function it replaced). The alternative,
a mode that sees every operation, is measured: steps with and without an idle one take turns.
Times are CPU time of the process, medians over steps, so that a busy machine matters less.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import runpy
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mcore_monitors import cpu

PROFILED, WARM_UP = 10, 5


def megatron_arguments(layers: int, hidden: int, steps: int) -> list[str]:
    """Command line of a small mixture of experts on made-up data."""
    return [
        "pretrain_gpt.py", *cpu.default_arguments(experts=True), "--mock-data", "--num-workers", "0",
        "--num-layers", str(layers), "--hidden-size", str(hidden), "--num-attention-heads", "4",
        "--seq-length", "128", "--max-position-embeddings", "128", "--normalization", "RMSNorm",
        "--position-embedding-type", "rope", "--swiglu", "--num-experts", "8",
        "--moe-router-topk", "2", "--moe-ffn-hidden-size", "256", "--micro-batch-size", "4",
        "--global-batch-size", "4", "--lr", "1e-3", "--lr-decay-style", "constant",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", "256", "--eval-iters", "0", "--eval-interval", "1000000",
        "--log-interval", "1000000", "--train-iters", str(steps),
    ]  # fmt: skip


def price(call: Callable[[], Any], instead_of: Callable[[], Any] | None = None) -> float:
    """Microseconds of a call, less those of the call it stands for; best of 15 rounds."""
    number, best = 5_000, [float("inf"), float("inf") if instead_of else 0.0]
    for _ in range(15):  # in turns, so that both meet the same neighbours on the machine
        best[0] = min(best[0], timeit.timeit(call, number=number))
        if instead_of:
            best[1] = min(best[1], timeit.timeit(instead_of, number=number))
    return max(best[0] - best[1], 0.0) / number * 1e6


def prices() -> dict[str, float]:
    """Function of the stand-in, as the profiler names it -> microseconds that a call adds."""
    import torch

    from mcore_monitors.cpu import generator

    tensor, zeros, to, kind = torch.ones(1), torch.zeros, torch.Tensor.to, torch.Tensor.type
    state = torch.cuda.get_rng_state()

    def exchange() -> None:
        with generator.default_is_gpu():
            pass

    return {
        "devices.wrapped": price(
            lambda: zeros(1, device="cuda"), lambda: zeros.__wrapped__(1, device="cpu")
        ),
        "devices.to": price(lambda: tensor.to("cuda"), lambda: to.__wrapped__(tensor, "cpu")),
        "devices.type_": price(lambda: kind(tensor), lambda: kind.__wrapped__(tensor)),
        "devices.cuda": price(lambda: tensor.cuda()),
        "cuda_calls.respond": price(lambda: torch.cuda.is_available()),
        "generator.get_state": price(lambda: generator.get_state()),
        "generator.set_state": price(lambda: generator.set_state(state)),
        "generator.wrapped": price(exchange),
    }


class Meter:
    """Takes the place of ``train_step``: times it, profiles it, and runs it under an idle mode."""

    def __init__(self, train_step: Callable[..., Any]) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        class Idle(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        self._step, self._mode, self._count = train_step, Idle, 0
        self._profile = cProfile.Profile()
        self.seconds: dict[str, list[float]] = {"plain": [], "mode": []}
        self._torch = torch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._count += 1
        if self._count <= WARM_UP:
            return self._step(*args, **kwargs)
        if self._count <= WARM_UP + PROFILED:
            with self._profile:
                return self._step(*args, **kwargs)
        arm = "mode" if self._count % 2 else "plain"
        context = self._mode() if arm == "mode" else contextlib.nullcontext()
        start = time.process_time()
        with context:
            result = self._step(*args, **kwargs)
        self.seconds[arm].append(time.process_time() - start)
        return result

    def calls(self) -> dict[str, float]:
        """Function of the stand-in -> calls a step."""
        counted: dict[str, float] = {}
        for (file, _, name), row in pstats.Stats(self._profile).stats.items():
            if "/mcore_monitors/cpu/" in file:
                key = f"{Path(file).stem}.{name}"
                counted[key] = counted.get(key, 0.0) + row[1] / PROFILED
        return counted


def measure(layers: int, hidden: int, steps: int) -> dict[str, Any]:
    """Train and return calls, prices and shares."""
    cpu.install()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")
    os.environ.setdefault("MASTER_PORT", "29571")
    from megatron.training import training

    meter = training.train_step = Meter(training.train_step)
    sys.argv = megatron_arguments(layers, hidden, WARM_UP + PROFILED + 2 * steps)
    runpy.run_path(str(ROOT / "launch" / "pretrain_gpt.py"), run_name="__main__")

    calls, each = meter.calls(), prices()
    rows = [
        {"function": name, "calls_per_step": calls[name], "microseconds": each[name]}
        for name in each
        if name in calls
    ]
    plain, mode = (statistics.median(meter.seconds[arm]) for arm in ("plain", "mode"))
    ours = sum(row["calls_per_step"] * row["microseconds"] for row in rows) / 1e6
    return {
        "rows": rows, "step_seconds": plain, "standin_seconds": ours, "standin_share": ours / plain,
        "mode_seconds": mode - plain, "mode_share": mode / plain - 1,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/cpu_standin.py --steps 60 --json runs/cpu_standin.json",
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    figures = measure(options.layers, options.hidden, options.steps)
    print(f"\n{'function':<24}{'calls a step':>14}{'µs a call':>12}{'µs a step':>12}")
    for row in figures["rows"]:
        calls, each = row["calls_per_step"], row["microseconds"]
        print(f"{row['function']:<24}{calls:>14.1f}{each:>12.2f}{calls * each:>12.1f}")
    print(
        f"a step takes {figures['step_seconds'] * 1e3:.1f} ms; the stand-in "
        f"{figures['standin_seconds'] * 1e3:.2f} ms ({figures['standin_share']:.2%}); a "
        f"TorchFunctionMode would take {figures['mode_seconds'] * 1e3:.2f} ms "
        f"({figures['mode_share']:.2%})"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        partial = options.json.with_name(f".{options.json.name}.{os.getpid()}")
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(partial, options.json)


if __name__ == "__main__":
    main()
