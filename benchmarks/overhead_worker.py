"""One process of ``benchmarks/overhead.py``: a training whose monitors change every ten steps."""

from __future__ import annotations

import json
import os
import runpy
import time
from pathlib import Path
from typing import Any

#: which monitors are on in each block of a cycle
MODES: dict[str, set[str]] = {
    "off": set(),
    "all": {"attention_update", "router", "conservation"},
    "attention": {"attention_update"},
    "router": {"router"},
    "conservation": {"conservation"},
}


class Switch:
    """Turns monitors on and off between blocks and times every step."""

    def __init__(self, callsites: Any) -> None:
        self.callsites = callsites
        self.on_step = callsites.on_step
        self.on_setup = callsites.on_setup
        self.seconds: list[float] = []
        callsites.on_step, callsites.on_setup = self.step, self.setup

    def setup(self, model: list[Any], optimizer: Any, scheduler: Any) -> None:
        """Remember the taps that the set-up made."""
        self.on_setup(model, optimizer, scheduler)
        self.runtime = self.callsites._run.runtime
        self.monitors = list(self.runtime.monitors)
        self.taps = [
            (module, module.mcore_monitors_tap)
            for chunk in model
            for module in chunk.modules()
            if getattr(module, "mcore_monitors_tap", None) is not None
        ]
        self.switch(0)
        self.last = time.perf_counter()

    def switch(self, done: int) -> None:
        """Turn on what the block after ``done`` steps is to have."""
        names = list(MODES)
        self.mode = names[done // self.runtime.config.interval % len(names)]
        on = MODES[self.mode]
        self.runtime.monitors = [m for m in self.monitors if m.name in on]
        for module, tap in self.taps:
            family = "router" if hasattr(tap, "on_logits") else "conservation"
            module.mcore_monitors_tap = tap if family in on else None

    def step(self, iteration: int, *values: Any) -> None:
        """Stand where the host calls the monitors."""
        if self.mode != "off":
            self.on_step(iteration, *values)
        else:
            self.runtime._arm(iteration + 1)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        if iteration % self.runtime.config.interval == 0:
            self.switch(iteration)
        self.last = time.perf_counter()


def main() -> None:
    """Train, then write the seconds of every step (rank 0)."""
    from mcore_monitors.hosts.megatron import callsites

    switch = Switch(callsites)
    script = Path(__file__).resolve().parent.parent / "launch" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["MCORE_MONITORS_BENCHMARK"]).write_text(json.dumps(switch.seconds))


if __name__ == "__main__":
    main()
