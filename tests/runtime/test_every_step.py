"""Hooks that run at every step: all tokens since the last sample, or those of the sampled step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_monitors.config import from_dict
from mcore_monitors.errors import ConfigError
from mcore_monitors.hosts.attach import build_monitors
from mcore_monitors.hosts.taps import RouterTap
from mcore_monitors.hosts.wiring import wire
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.parallel import GroupSum
from mcore_monitors.runtime import Runtime

from ..monitors.models import TinyModel
from .make import Mean, history, runtime, settings, step


def logits(iteration: int) -> torch.Tensor:
    return torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(iteration))


def entropy(z: torch.Tensor) -> float:
    return torch.special.entr(z.double().softmax(-1)).sum(-1).mean().item()


def watched(folder: Path, tokens: str) -> tuple[Runtime, RouterTap]:
    """A run of one rank whose router monitor was made and wired as hosts do it."""
    config = settings(folder, monitors={"router": {"tokens": tokens}, **_others_off()})
    view = TinyModel().view()
    run = runtime(config, build_monitors(config, view, GroupSum(None)))
    tap = RouterTap()
    wire(run, view, {}, {1: tap})
    return run, tap


def _others_off() -> dict[str, dict[str, object]]:
    off = {"conservation": {"enabled": False}}
    return off | {"attention_update": {"enabled": False, "windows": [5]}}


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [("all", [range(1, 6), range(6, 11)]), ("sampled", [[5], [10]])],
)
def test_whose_tokens_count(tokens: str, steps: list[range], tmp_path: Path) -> None:
    run, tap = watched(tmp_path, tokens)
    for iteration in range(1, 11):
        tap.tell(logits(iteration), None)
        step(run, iteration)
    wanted = [entropy(torch.cat([logits(i) for i in part])) for part in steps]
    got = [s.signals["router/routing_entropy"][1][0] for s in history(tmp_path)]
    assert got == pytest.approx(wanted, rel=1e-6)


def test_all_is_the_default(tmp_path: Path) -> None:
    assert settings(tmp_path).monitors.router.tokens == "all"
    with pytest.raises(ConfigError, match="monitors.router.tokens.*'all' or 'sampled'"):
        from_dict({"run_dir": "x", "monitors": {"router": {"tokens": "some"}}})


def test_a_resume_forgets_the_steps_before_it(tmp_path: Path) -> None:
    """A rollback in place: what was added up belongs to weights that are gone."""
    run, tap = watched(tmp_path, "all")
    for iteration in (1, 2, 3):
        tap.tell(9 * logits(iteration), None)
        step(run, iteration)
    run.resume(2)
    for iteration in (3, 4, 5):
        tap.tell(logits(iteration), None)
        step(run, iteration)
    (sample,) = history(tmp_path)
    wanted = entropy(torch.cat([logits(i) for i in (3, 4, 5)]))
    assert sample.signals["router/routing_entropy"][1][0] == pytest.approx(wanted, rel=1e-6)


def test_an_error_between_samples_turns_the_monitor_off(tmp_path: Path) -> None:
    run, tap = watched(tmp_path, "all")
    tap.tell(torch.zeros(()), None)  # no experts at all
    for iteration in range(1, 6):
        step(run, iteration)
    assert run.crew.monitors == []
    tap.tell(logits(6), None)  # nothing is looked at any more


def test_keywords_reach_the_hook(tmp_path: Path) -> None:
    run = runtime(settings(tmp_path), [Mean("a"), RouterMonitor(TinyModel().view())])
    crew, seen = run.crew, []
    hook = crew.guarded(crew.monitors[0], lambda *a, **k: seen.append((a, k)), every_step=True)
    hook(1, routing_map=2)
    crew.guarded(crew.monitors[0], seen.append)(3)  # not a sampled step
    assert seen == [((1,), {"routing_map": 2})]
