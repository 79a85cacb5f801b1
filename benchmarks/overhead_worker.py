"""One process of ``benchmarks/overhead.py``: a training whose monitors change every ten steps."""

from __future__ import annotations

import copy
import itertools
import json
import os
import runpy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_monitors.config import MonitorsConfig
from mcore_monitors.windows import SELDOM

#: every monitor that is on by default, by its name in the settings
MONITORS = [
    name for name, settings in vars(MonitorsConfig()).items() if settings.enabled is not False
]
#: which monitors are on in each block of a cycle
MODES: dict[str, set[str]] = {"off": set(), "all": set(MONITORS)} | {n: {n} for n in MONITORS}
#: samples that the attention monitors have seen before the first block, so that all their windows
#: are compared from the start on
SEEN = 6 * SELDOM
#: rounds to begin with that do not count
LEFT_OUT = 2


def numbers() -> Iterator[int]:
    """Numbers of the samples of a monitor that takes part in two of a round: in ``all``, alone.

    Consecutive, but one is left out after every five rounds: in ten rounds each of the two then has
    each turn out of ten once, the even and the odd ones. What is left out is no turn at which all
    is told, in a benchmark of up to forty rounds.
    """
    warm_up = 2 * LEFT_OUT
    yield from range(2 * SELDOM + 3 - warm_up, 2 * SELDOM + 3)
    for done in itertools.count():
        yield 2 * SELDOM + 3 + done + done // SELDOM


class Switch:
    """Turns monitors on and off between blocks and times every step."""

    def __init__(self) -> None:
        from mcore_monitors.crew import Crew
        from mcore_monitors.hosts.megatron import callsites, setup

        self.callsites, self.inside = callsites, Inside()
        self.on_step, self.on_setup = callsites.on_step, callsites.on_setup
        callsites.on_step, callsites.on_setup = self.step, self.set_up
        self.seconds: list[tuple[float, float]] = []
        wire, guarded = setup.wire, Crew.guarded

        def wiring(runtime: Any, view: Any, *taps: Any, **more: Any) -> None:
            wire(runtime, view, *taps, **more)
            self.view = view
            found = [tap for group in (*taps, *more.values()) for tap in (group or {}).values()]
            ears = [tap.listeners for tap in found]
            ears += [tap.sampled for tap in found if hasattr(tap, "sampled")]
            self.ears = [(listeners, list(listeners)) for listeners in ears]

        def with_name(crew: Any, monitor: Any, call: Any, **how: Any) -> Any:
            hook = self.inside.around(monitor.name, guarded(crew, monitor, call, **how))
            hook.monitor = monitor.name
            return hook

        setup.wire, Crew.guarded = wiring, with_name

    def set_up(self, *what: Any) -> None:
        """Let the host make its monitors, then take them in hand."""
        assert len(MODES) == 7, "turns of hooks come equally often"
        self.on_setup(*what)
        self.runtime = self.callsites._run.runtime
        self.interval = self.runtime.config.interval
        self.monitors = list(self.runtime.crew.monitors)
        update = next(m for m in self.monitors if m.name == "attention_update")
        #: alone it must find the snapshots of a course of its own
        self.alone = self.course(update)
        self.monitors = [self.course(m) if m is update else self.in_turn(m) for m in self.monitors]
        for monitor in (self.alone, *self.monitors):
            monitor.collect = self.inside.around(monitor.name, monitor.collect, in_step=True)
            monitor.read = self.inside.around(monitor.name, monitor.read, in_step=True)
        self.replicas = Replicas(self.view, update, self.runtime.config)
        self.switch(0)
        self.last = clocks()

    def course(self, update: Any) -> Any:
        """A copy of the attention monitor that has one sample a cycle, ten iterations apart.

        What a sample costs depends on which windows are due; on this grid they come in turn as in a
        run, and every tenth sample compares more of them.
        """
        monitor = copy.copy(update)
        monitor.restart()
        collect, seen = monitor.collect, iter(range(self.interval, 10**9, self.interval))
        monitor.collect = lambda iteration, fields: collect(next(seen), fields)
        fill(monitor, self.view.device, self.interval)
        return monitor

    def in_turn(self, monitor: Any) -> Any:
        """The monitor itself, told of consecutive samples whenever it takes part in one.

        What is looked at in one sample out of several then comes in its turn as in a run. Hooks go
        by the run's own iteration: as often, since a cycle of seven blocks shares no divisor with
        their turns.
        """
        collect, seen = monitor.collect, numbers()
        monitor.collect = lambda _, fields: collect(next(seen) * self.interval, fields)
        return monitor

    def switch(self, done: int) -> None:
        """Turn on what the block after ``done`` steps is to have."""
        names = list(MODES)
        block = done // self.interval
        self.mode = names[block % len(names)]
        on = MODES[self.mode]
        alone = self.mode == "attention_update"
        # each mode reduces its own fields, as a run with these settings does
        self.runtime.crew.keep(
            [self.alone] if alone else [m for m in self.monitors if m.name in on]
        )
        for now, listeners in self.ears:
            now[:] = [one for one in listeners if one.func.monitor in on]
        if self.mode == "off" and block:
            self.replicas.measure()

    def step(self, iteration: int, *values: Any) -> None:
        """Stand where the host calls the monitors."""
        if self.mode != "off":
            time.thread_time()
            before = time.thread_time()
            self.on_step(iteration, *values)
            self.inside.on_step += time.thread_time() - before
        else:
            self.runtime._arm(iteration + 1)
        now = clocks()
        self.seconds.append((now[0] - self.last[0], now[1] - self.last[1]))
        if iteration % self.interval == 0:
            self.inside.end_block()
            self.switch(iteration)
        self.last = clocks()


def clocks() -> tuple[float, float]:
    """Wall time, and CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


class Inside:
    """CPU time of this thread inside of each monitor and of the call at the end of a step."""

    def __init__(self) -> None:
        self.hooks: dict[str, float] = dict.fromkeys(MONITORS, 0.0)
        self.in_step: dict[str, float] = dict.fromkeys(MONITORS, 0.0)
        self.on_step = 0.0
        #: a row a block: seconds of each monitor, and of all of monitoring
        self.blocks: list[dict[str, float]] = []
        self._depth = 0

    def around(self, name: str, call: Any, *, in_step: bool = False) -> Any:
        """``call``, timed; ``in_step`` where the call at the end of a step makes it.

        What it calls of the same monitor is not counted twice.
        """
        times = self.in_step if in_step else self.hooks

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            # Read twice: behind a training step the first reading takes some microseconds, and
            # with a hundred calls a sample these would count as the monitors'.
            time.thread_time()
            before = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    times[name] += time.thread_time() - before

        return timed

    def end_block(self) -> None:
        """Keep what the block took and start anew."""
        row = {name: self.hooks[name] + self.in_step[name] for name in MONITORS}
        self.blocks.append(row | {"all": sum(self.hooks.values()) + self.on_step})
        for times in (self.hooks, self.in_step):
            times.update(dict.fromkeys(MONITORS, 0.0))
        self.on_step = 0.0


class Replicas:
    """What sharing over data-parallel replicas saves: the same live model, shared and not.

    Two monitors of the attention updates, one that shares the heads with the other rank and one
    that computes all of them, take a sample each in turn, outside of the timed steps. CPU time of
    this thread, not wall time: the other rank and the machine's other work share the cores.
    """

    def __init__(self, view: Any, update: Any, config: Any) -> None:
        from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
        from mcore_monitors.parallel import Packed
        from mcore_monitors.views import Replica

        whole = replace(view, attention=[replace(v, replica=Replica()) for v in view.attention])
        windows, judged = config.monitors.attention_update.windows, config.detection.windows
        self.monitors = {
            name: AttentionUpdateMonitor(model, windows, config.interval, judged=judged)
            for name, model in (("shared", view), ("alone", whole))
        }
        self.packed = Packed(update.schema(), view.device)
        self.seconds: dict[str, list[float]] = {"shared": [], "alone": []}
        self.iteration, self.interval = SEEN * config.interval, config.interval
        for monitor in self.monitors.values():
            fill(monitor, view.device, config.interval)

    def measure(self) -> None:
        """One sample of both, in changing order."""
        import torch

        self.iteration += self.interval
        order = list(self.monitors.items())
        if self.iteration // self.interval % 2:
            order.reverse()
        for name, monitor in order:
            torch.distributed.barrier()
            start = time.thread_time()
            with torch.no_grad():
                monitor.collect(self.iteration, self.packed.fields)
            self.seconds[name].append(time.thread_time() - start)
        self.packed.reduce()

    def result(self) -> dict[str, Any]:
        """Seconds of each sample and bytes of the snapshots, both ways."""
        return {
            "seconds": self.seconds,
            "bytes": {name: monitor.snapshot_bytes for name, monitor in self.monitors.items()},
        }


def fill(monitor: Any, device: Any, interval: int) -> None:
    """Let a monitor see :data:`SEEN` samples of the model as it is."""
    import torch

    from mcore_monitors.parallel import Packed

    fields = Packed(monitor.schema(), device).fields
    with torch.no_grad():
        for sample in range(1, SEEN + 1):
            monitor.collect(interval * sample, fields)


def main() -> None:
    """Train, then write the seconds of every step, and of shared and unshared samples (rank 0)."""
    switch = Switch()
    script = Path(__file__).resolve().parent.parent / "launch" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        result = {
            "steps": switch.seconds,
            "inside": switch.inside.blocks,
            "replicas": switch.replicas.result(),
        }
        Path(os.environ["MCORE_MONITORS_BENCHMARK"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
