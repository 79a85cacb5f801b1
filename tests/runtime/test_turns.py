"""Who is looked at in a sample goes by absolute iterations: stopping changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS
from mcore_monitors.hosts.attach import Progress, attach
from mcore_monitors.hosts.taps import AttentionTap
from mcore_monitors.hosts.wiring import wire
from mcore_monitors.parallel import GroupSum

from .. import distributed
from ..monitors.borders import attention, cross
from ..monitors.models import TinyModel
from .make import history, settings, step

INTERVAL, SAMPLES = 2, 13


class Listener:
    """What a call of a kernel is told to: the tap of its layer."""

    def __init__(self, taps: dict[int, AttentionTap]) -> None:
        self._taps = taps

    def on_attention(self, layer: int, call: object) -> None:
        self._taps[layer].tell(call)


def train(folder: Path, upto: int, broken: bool = False) -> list[list[int]]:
    """Go on from where the history ends, in a process of its own as far as monitors can tell.

    Returns:
        The layers that were due, step by step.
    """
    folder.mkdir(exist_ok=True)
    done = history(folder)[-1].iteration if (folder / "history.jsonl").exists() else 0
    config, view = settings(folder, INTERVAL), TinyModel().view()
    progress = Progress(iteration=done, attempt=0, reports_loss=True)
    run = attach(config, view, GroupSum(None), progress, host="test", versions={})
    taps = {layer: AttentionTap(run.state) for layer in (1, 2)}
    wire(run, view, taps, {})
    (conservation,) = (m for m in run.crew.monitors if m.name == "conservation")
    due = []
    for iteration in range(done + 1, upto + 1):
        due.append([layer for layer in taps if conservation.turns.is_due("attention", layer)])
        for layer in taps:
            parts = attention(strength=0.3 * broken, seed=10 * iteration + layer, batch=6)
            if broken:
                parts |= {"o": 0.99 * parts["o"], "dq": 1.01 * parts["dq"]}
            cross(Listener(taps), layer, parts)
        step(run, iteration)
    run.close()
    return due


def _one_of_two(rank: int, folder: Path) -> list[list[int]]:
    return train(folder, INTERVAL * SAMPLES, broken=rank == 1)


def test_ranks_look_at_the_same_whichever_of_them_is_broken(tmp_path: Path) -> None:
    one, other = distributed.run(2, _one_of_two, tmp_path)
    assert one == other
    # the first in its turn, then closely, and the second at its turn
    assert one == [[1]] * INTERVAL + [[1, 2]] * (INTERVAL * (SAMPLES - 1))


@pytest.mark.parametrize("stopped_after", [5, 7])
def test_a_resumed_run_sees_what_an_unbroken_one_sees(stopped_after: int, tmp_path: Path) -> None:
    train(tmp_path / "whole", INTERVAL * SAMPLES)
    train(tmp_path / "parts", INTERVAL * stopped_after)
    train(tmp_path / "parts", INTERVAL * SAMPLES)
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    assert [s.iteration for s in whole] == [s.iteration for s in parts]
    for one, other in zip(whole, parts, strict=True):
        for name in ATTENTION_RESIDUALS:
            assert one.signals.get(name) == other.signals.get(name), (name, one.iteration)
    # and it does see some of it only: the layers take turns
    looked_at = [set(s.signals[name]) for s in whole for name in ATTENTION_RESIDUALS]
    assert {1} in looked_at and {2} in looked_at and {1, 2} not in looked_at


def test_a_broken_kernel_is_looked_at_closely_after_a_resume_as_well(tmp_path: Path) -> None:
    train(tmp_path, INTERVAL * 6, broken=True)
    train(tmp_path, INTERVAL * SAMPLES, broken=True)
    looked_at = [set(s.signals[ATTENTION_RESIDUALS[0]]) for s in history(tmp_path)]
    # each start knows of nothing, and of one layer after its first sample
    assert looked_at == [{1}, {1, 2}, {1, 2}, {1, 2}, {1, 2}, {1, 2}] * 2 + [{1, 2}]
