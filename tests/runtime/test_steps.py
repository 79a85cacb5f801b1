"""Losses and gradient norms of every step land in the sample, each in its own slot."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from .. import distributed
from .make import Mean, events, history, runtime, settings, step


def test_every_step_has_its_slot(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [])
    for iteration in range(1, 11):
        step(run, iteration, loss=torch.tensor(10.0 + iteration), grad_norm=0.5 * iteration)
    first, second = history(tmp_path)
    assert (first.iteration, first.first_step) == (5, 1)
    assert first.loss == [11, 12, 13, 14, 15]
    assert first.grad_norm == [0.5, 1, 1.5, 2, 2.5]
    assert (second.iteration, second.first_step) == (10, 6)
    assert second.loss == [16, 17, 18, 19, 20]
    assert (second.learning_rate, second.consumed_samples, second.attempt) == (0.001, 40, 0)
    assert second.cost_seconds > 0


def test_what_is_unknown_or_not_finite_is_null(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [Mean("a")])
    for iteration, loss in enumerate((1.0, None, math.nan, math.inf, 2.0), start=1):
        step(run, iteration, loss=loss, grad_norm=None if iteration == 2 else 3.0)
    for iteration in range(6, 11):
        step(run, iteration)
    first, second = history(tmp_path)
    assert first.loss == [1, None, None, None, 2]
    assert first.grad_norm == [3, None, 3, 3, 3]
    assert second.loss == [1] * 5  # nothing of it is left in the buffer


def test_resume_in_mid_interval(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [])
    step(run, 1)
    run.resume(7)
    for iteration in range(8, 16):
        step(run, iteration, loss=float(iteration))
    first, second = history(tmp_path)
    assert (first.iteration, first.first_step, first.loss) == (10, 8, [8, 9, 10])
    assert (second.iteration, second.first_step, second.loss) == (15, 11, [11, 12, 13, 14, 15])
    assert [e["from_iteration"] for e in events(tmp_path, "resume")] == [7]


@pytest.mark.parametrize(
    ("given", "first_step", "loss"),
    [
        pytest.param([6, 7, 9, 10], 6, [6, 7, None, 9, 10], id="one in the middle"),
        pytest.param([7, 8, 10], 7, [7, 8, None, 10], id="the first"),
        pytest.param([10], 10, [10], id="all but the last"),
        pytest.param([4, 6, 7, 8, 9, 10], 6, [6, 7, 8, 9, 10], id="the sampled one before"),
        pytest.param([3, 4, 7, 9, 10], 7, [7, None, 9, 10], id="the sampled one and more"),
        pytest.param([4, 16, 18, 20], 16, [16, None, 18, None, 20], id="whole intervals"),
    ],
)
def test_the_host_passes_over_iterations(
    given: list[int], first_step: int, loss: list[float | None], tmp_path: Path
) -> None:
    run = runtime(settings(tmp_path), [])
    for iteration in given:
        step(run, iteration, loss=float(iteration))
    last = history(tmp_path)[-1]
    assert (last.iteration, last.first_step, last.loss) == (given[-1], first_step, loss)
    assert [v is None for v in last.grad_norm] == [v is None for v in loss]


def test_hooks_count_on_sampled_steps_only(tmp_path: Path) -> None:
    monitor = Mean("a")
    run = runtime(settings(tmp_path), [monitor])
    hook = run.crew.guarded(monitor, monitor.take)
    for iteration in range(1, 11):
        assert run.state.iteration == iteration
        assert run.state.armed == (iteration in (5, 10))
        hook(float(iteration))
        hook(float(iteration + 2))
        step(run, iteration)
    assert monitor.calls == 4
    assert [s.signals["test/a"] for s in history(tmp_path)] == [{1: [6.0]}, {1: [11.0]}]


def test_the_first_step_can_be_sampled(tmp_path: Path) -> None:
    monitor = Mean("a")
    run = runtime(settings(tmp_path, interval=1), [monitor])
    run.crew.guarded(monitor, monitor.take)(3.0)
    step(run, 1)
    assert [s.signals for s in history(tmp_path)] == [{"test/a": {1: [3.0]}}]


def test_resume_arms_the_next_step(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [])
    run.resume(9)
    assert (run.state.iteration, run.state.armed) == (10, True)
    run.resume(10)
    assert (run.state.iteration, run.state.armed) == (11, False)


def _two_ranks(rank: int, folder: Path) -> list[float]:
    """Rank 1 knows the loss, as a last pipeline stage does; each has a monitor with a share."""
    monitor = Mean("a")
    run = runtime(settings(folder), [monitor], reports_loss=rank == 1)
    hook = run.crew.guarded(monitor, monitor.take)
    for iteration in range(1, 11):
        hook(float(iteration + 2 * rank))
        step(run, iteration, loss=float(100 * rank + iteration), grad_norm=1.0 + rank)
    run.close()
    return run.exit_code


def test_two_ranks_make_one_sample(tmp_path: Path) -> None:
    assert distributed.run(2, _two_ranks, tmp_path) == [None, None]
    first, second = history(tmp_path)
    assert first.loss == [101, 102, 103, 104, 105]
    assert first.grad_norm == [1.0] * 5  # the same on every rank in a real run: taken once
    assert [first.signals, second.signals] == [{"test/a": {1: [6.0]}}, {"test/a": {1: [11.0]}}]
    assert len(events(tmp_path, "stop")) == 1


def _both_report(rank: int, folder: Path) -> None:
    run = runtime(settings(folder), [])
    for iteration in range(1, 6):
        step(run, iteration, loss=float(iteration + 4 * rank) if iteration != 3 or rank else None)
    run.close()


def test_the_mean_over_the_ranks_that_report(tmp_path: Path) -> None:
    distributed.run(2, _both_report, tmp_path)
    assert history(tmp_path)[0].loss == [3, 4, 7, 6, 7]
