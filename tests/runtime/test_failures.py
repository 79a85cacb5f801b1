"""What breaks inside the monitors never breaks the run, and all ranks agree on what is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mcore_monitors.errors import MonitorsError
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.parallel import GroupSum
from mcore_monitors.sinks import Sinks
from mcore_monitors.sinks.events import EventWriter
from mcore_monitors.sinks.history import HistoryWriter

from .. import distributed
from ..monitors.borders import attention, cross, cut
from ..monitors.models import TinyModel
from .make import Mean, events, history, runtime, said, settings, step

STEPS = range(1, 16)


def _one_hook_fails(rank: int, folder: Path, strict: bool) -> dict[str, Any]:
    """Monitor ``a`` has a hook that raises on rank 1 in iteration 5; ``b`` is sound."""
    monitors = [Mean("a"), Mean("b")]
    run = runtime(settings(folder, strict=strict), monitors)
    hooks = [run.crew.guarded(m, m.take) for m in monitors]
    raised = None
    with said() as texts:
        try:
            for iteration in STEPS:
                hooks[0](-1.0 if (rank, iteration) == (1, 5) else 1.0)
                hooks[0](1.0)
                hooks[1](float(iteration))
                step(run, iteration)
        except MonitorsError as error:
            raised = (iteration, str(error))
        run.close()
    return {"raised": raised, "said": texts[0], "calls": [m.calls for m in monitors]}


def test_a_hook_that_fails_on_one_rank(tmp_path: Path) -> None:
    first, second = distributed.run(2, _one_hook_fails, tmp_path, False)
    assert [s.signals for s in history(tmp_path)] == [
        {"test/b": {1: [5.0]}},
        {"test/b": {1: [10.0]}},
        {"test/b": {1: [15.0]}},
    ]
    disabled = events(tmp_path, "monitor_disabled")
    assert [(e["monitor"], e["iteration"]) for e in disabled] == [("a", 5)]
    for text in (first["said"], second["said"]):
        assert text.count("monitor 'a' failed on 1 rank(s) at iteration 5") == 1
        assert "off on all ranks" in text and "training goes on" in text
    assert "ValueError: -1.0 is negative" in second["said"]
    assert second["calls"] == [1, 3]  # not called again after its error
    assert (first["raised"], second["raised"]) == (None, None)


def test_strict_raises_on_all_ranks_together(tmp_path: Path) -> None:
    for result in distributed.run(2, _one_hook_fails, tmp_path, True):
        iteration, text = result["raised"]
        assert iteration == 5
        assert "strict" in text and "a" in text
    assert [e["monitor"] for e in events(tmp_path, "monitor_disabled")] == ["a"]


def _part_fails(rank: int, folder: Path, part: str) -> str:
    monitors = [Mean("a", fails_in=part if rank == 0 or part == "read" else ""), Mean("b")]
    run = runtime(settings(folder), monitors)
    hooks = [run.crew.guarded(m, m.take) for m in monitors]
    with said() as texts:
        for iteration in STEPS:
            for hook in hooks:
                hook(float(iteration))
            step(run, iteration)
        run.close()
    return texts[0]


@pytest.mark.parametrize(("part", "noticed"), [("collect", 5), ("read", 10)])
def test_a_monitor_that_fails_at_a_sample(part: str, noticed: int, tmp_path: Path) -> None:
    outputs = distributed.run(2, _part_fails, tmp_path, part)
    assert [s.signals for s in history(tmp_path)] == [
        {"test/b": {1: [5.0]}},
        {"test/b": {1: [10.0]}},
        {"test/b": {1: [15.0]}},
    ]
    disabled = events(tmp_path, "monitor_disabled")
    assert [(e["monitor"], e["iteration"]) for e in disabled] == [("a", noticed)]
    assert f"cannot {part}" in disabled[0]["error"]
    assert outputs[0].count("monitor 'a' failed") == 1


def _half_a_sequence_each(rank: int, folder: Path) -> str:
    """Context parallelism: the sample of one rank waits for the other's part of the sum."""
    model = TinyModel()
    monitors = [ConservationMonitor(model.view(), GroupSum(dist.group.WORLD)), Mean("b")]
    run = runtime(settings(folder), monitors)
    broken = run.crew.guarded(monitors[0], monitors[0].on_attention)
    half = slice(4 * rank, 4 * rank + 4)
    with said() as texts:
        for iteration in STEPS:
            if (rank, iteration) == (1, 10):
                broken(1, None)  # AttributeError in the hook of this rank alone
            elif run.state.armed:
                cross(monitors[0], 1, cut(attention(seed=iteration), lambda x: x[half]))
            step(run, iteration)
        run.close()
    return texts[0]


def test_nobody_waits_for_a_rank_that_failed(tmp_path: Path) -> None:
    outputs = distributed.run(2, _half_a_sequence_each, tmp_path, timeout=60)
    shift = ["attention/key_shift" in s.signals for s in history(tmp_path)]
    assert shift == [True, False, False]
    disabled = events(tmp_path, "monitor_disabled")
    assert [(e["monitor"], e["iteration"]) for e in disabled] == [("conservation", 10)]
    assert all("failed on 1 rank(s)" in text for text in outputs)


def test_several_monitors_fail_at_once(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [Mean("a", fails_in="collect"), Mean("b"), Mean("c")])
    broken = run.crew.guarded(run.crew.monitors[2], run.crew.monitors[2].take)
    with said() as texts:
        for iteration in STEPS:
            broken(-1.0)
            step(run, iteration)
    assert [m.name for m in run.crew.monitors] == ["b"]
    assert texts[0].count("mcore-monitors:") == 2
    assert [e["monitor"] for e in events(tmp_path, "monitor_disabled")] == ["a", "c"]
    assert len(history(tmp_path)) == 3


class FullDisk:
    """A sink whose samples can't be written."""

    def sample(self, sample: Any) -> None:
        raise OSError(28, "No space left on device")

    def event(self, event: Any) -> None:
        """Events are fine."""

    def close(self, exit_code: int = 0) -> None:
        """Nothing is open."""


def test_a_sink_that_fails_is_off_and_the_others_go_on(tmp_path: Path) -> None:
    sinks = Sinks([FullDisk(), HistoryWriter(tmp_path), EventWriter(tmp_path)])
    run = runtime(settings(tmp_path), [Mean("a")], sinks=sinks)
    with said() as texts:
        for iteration in STEPS:
            step(run, iteration)
        run.close()
    assert [s.iteration for s in history(tmp_path)] == [5, 10, 15]
    disabled = events(tmp_path, "monitor_disabled")
    assert [(e["monitor"], e["iteration"]) for e in disabled] == [("sinks/FullDisk", 5)]
    assert texts[0].count("FullDisk failed and is off") == 1


def test_strict_lets_a_failing_sink_end_the_run(tmp_path: Path) -> None:
    sinks = Sinks([FullDisk()], strict=True)
    run = runtime(settings(tmp_path, strict=True), [], sinks=sinks)
    for iteration in range(1, 5):
        step(run, iteration)
    with pytest.raises(OSError, match="No space"):
        step(run, 5)


def test_close_twice(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [])
    for iteration in range(1, 8):
        step(run, iteration)
    run.close()
    run.close()
    stops = events(tmp_path, "stop")
    assert [(e["iteration"], e["exit_code"]) for e in stops] == [(7, 0)]
