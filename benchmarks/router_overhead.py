"""What the router monitor costs when it looks at every token and is read at every step.

    python benchmarks/router_overhead.py --json router_overhead.json

Trains one mixture-of-experts layer of a real Megatron-core model (hidden size 1,024, 64 experts,
4,096 tokens a step; forward, backward, AdamW) in one process on the CPU and turns the monitor on
and off from step to step. With the monitor on, its hooks take in every token and a sample is
collected, reduced, read and written with all its signals; a run takes a sample once in ten steps by
default, and one with all signals once in fifty. Two figures:

* inside: seconds spent in the monitor's hooks and in the sample, over the median step without it;
* on/off: median step with the monitor over median step without it, minus one, with the 95%
  interval of 1,000 bootstrap draws. It has all side effects in it, and the noise of the machine.

Rows are ways of choosing, from cheap to dear. Memory is what the monitor keeps on the device: bytes
a layer, its part of the collective, and the logits that wait, once for all layers of a rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from mcore_monitors import cpu  # noqa: E402

HIDDEN, EXPERTS, SEQUENCE, BATCH, WORDS = 1024, 64, 1024, 4, 512
#: steps before the measured ones, half of them with the monitor
WARMUP = 4
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
RULES: dict[str, dict[str, Any]] = {
    "softmax, top 2": {"moe_router_topk": 2},
    "softmax, top 8": {"moe_router_topk": 8},
    "sigmoid with bias, top 8": SIGMOID | {"moe_router_topk": 8},
    "sigmoid with bias, top 8 in 4 of 8 groups": SIGMOID
    | {"moe_router_topk": 8, "moe_router_num_groups": 8, "moe_router_group_topk": 4},
}


def build(rule: dict[str, Any]) -> torch.nn.Module:
    """One layer whose router is observed."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from mcore_monitors.hosts.megatron.registration import register

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=16,
        ffn_hidden_size=HIDDEN,
        moe_ffn_hidden_size=HIDDEN // 2,
        num_moe_experts=EXPERTS,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        **rule,
    )
    return GPTModel(
        config=settings,
        transformer_layer_spec=register(get_gpt_layer_local_spec(num_experts=EXPERTS)),
        vocab_size=WORDS,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )


class Stopwatch:
    """Adds up the seconds spent inside some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call and count."""
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def measure(rule: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """Seconds of steps without and with the monitor, one after the other, and of the inside."""
    from mcore_monitors.config import MonitorsConfig, from_dict
    from mcore_monitors.hosts.attach import Progress, attach
    from mcore_monitors.hosts.megatron.model import MegatronModel
    from mcore_monitors.hosts.megatron.setup import _tap

    model = build(rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    described = MegatronModel([model])
    off = {name: {"enabled": False} for name in MonitorsConfig.__dataclass_fields__}
    settings = {
        "run_dir": str(folder),
        "interval": 1,
        "monitors": off
        | {"router": {"enabled": True, "every": 1}, "attention_update": off_windows()},
        "console": False,
        "wandb": {"enabled": False},
    }
    progress = Progress(iteration=0, attempt=0, reports_loss=False)
    runtime = attach(
        from_dict(settings), described.view, described.context, progress, host="", versions={}
    )
    _tap(runtime, described)
    (monitor,) = runtime.crew.monitors
    router = described.routers[1]
    watch, tap = Stopwatch(), router.mcore_monitors_tap
    tap.listeners = [partial(watch.around, listener) for listener in tap.listeners]
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    inside = []
    for step in range(WARMUP + 2 * steps):
        on = step % 2 == 1
        router.mcore_monitors_tap = tap if on else None
        tokens = torch.randint(WORDS, (BATCH, SEQUENCE + 1), generator=generator)
        watch.seconds = 0.0
        start = time.perf_counter()
        model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if on:
            watch.around(
                runtime.on_step,
                step + 1,
                loss=None,
                grad_norm=None,
                learning_rate=None,
                consumed_samples=0,
            )
        seconds[on].append(time.perf_counter() - start)
        if on:
            inside.append(watch.seconds)
    runtime.close()
    assert not runtime.crew._errors
    skipped = WARMUP // 2
    fields = monitor.schema().values()
    return {
        "off_seconds": seconds[False][skipped:],
        "on_seconds": seconds[True][skipped:],
        "inside_seconds": inside[skipped:],
        "bytes_per_layer": monitor.bytes_per_layer,
        "waiting_bytes": monitor.waiting_bytes,
        "collective_bytes_per_layer": 8 * sum(int(np.prod(shape)) for shape in fields),
    }


def off_windows() -> dict[str, Any]:
    """No attention updates; a window that an interval of one allows."""
    return {"enabled": False, "windows": [1]}


def shares(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    off, on = np.array(row["off_seconds"]), np.array(row["on_seconds"])
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(off), (2, 1000, len(off)))
    ratios = np.median(on[draws[0]], axis=1) / np.median(off[draws[1]], axis=1) - 1
    step = float(np.median(off))
    return {
        "step_seconds": step,
        "inside_share": float(np.median(row["inside_seconds"])) / step,
        "on_over_off": float(np.median(on)) / step - 1,
        "low": float(np.quantile(ratios, 0.025)),
        "high": float(np.quantile(ratios, 0.975)),
        "bytes_per_layer": row["bytes_per_layer"],
        "waiting_bytes": row["waiting_bytes"],
        "collective_bytes_per_layer": row["collective_bytes_per_layer"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/router_overhead.py --steps 10 --json router.json",
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps, on and off each")
    parser.add_argument("--threads", type=int, default=1, help="threads of the process")
    parser.add_argument("--rows", type=int, default=len(RULES), help="only the first of the rules")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    cpu.install()
    from overhead import made_by

    torch.set_num_threads(arguments.threads)
    rows, raw = {}, {}
    print(
        f"D {HIDDEN}, E {EXPERTS}, {SEQUENCE * BATCH} tokens a step, one layer, sampled every step"
    )
    print(f"{'rule':44}{'step':>8}{'inside':>9}{'on/off':>9}{'95% interval':>20}{'bytes':>8}")
    for name, rule in list(RULES.items())[: arguments.rows]:
        with tempfile.TemporaryDirectory() as folder:
            raw[name] = measure(rule, arguments.steps, Path(folder))
        rows[name] = row = shares(raw[name])
        interval = f"{100 * row['low']:.2f}% to {100 * row['high']:.2f}%"
        print(
            f"{name:44}{row['step_seconds']:7.2f}s{100 * row['inside_share']:8.2f}%"
            f"{100 * row['on_over_off']:8.2f}%{interval:>20}{row['bytes_per_layer']:8}",
            flush=True,
        )
    if arguments.json:
        result = {
            "share_router_every_step": max(row["inside_share"] for row in rows.values()),
            "bytes_per_layer": max(row["bytes_per_layer"] for row in rows.values()),
            "waiting_bytes": max(row["waiting_bytes"] for row in rows.values()),
            "rows": [{"rule": name, **row} for name, row in rows.items()],
            "seconds": raw,
            "made_by": made_by() | {"threads": arguments.threads, "seed": 0},
        }
        result["made_by"]["command"] = " ".join(
            ["python", "benchmarks/router_overhead.py", *sys.argv[1:]]
        )
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
