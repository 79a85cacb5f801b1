"""``attach``: which monitors a run gets, the same ones on every rank, and what it says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcore_monitors.config import Config
from mcore_monitors.errors import ConfigError
from mcore_monitors.hosts.attach import Progress, attach, build_monitors, check_run_dir
from mcore_monitors.parallel import GroupSum
from mcore_monitors.views import ModelView

from .. import distributed
from ..monitors.models import TinyModel
from ..runtime.make import events, said, settings, step

ALL = ["attention_update", "router", "conservation"]


def wanted(folder: Path, **enabled: Any) -> Config:
    # what the tiny model has nothing for is off, unless it is asked for
    enabled = {"attention_activity": False, "optimizer": False} | enabled
    monitors: dict[str, Any] = {name: {"enabled": value} for name, value in enabled.items()}
    monitors["attention_update"] = {"windows": [5]} | monitors.get("attention_update", {})
    return settings(folder, monitors=monitors)


def names(config: Config, model: ModelView) -> list[str]:
    return [m.name for m in build_monitors(config, model, GroupSum(None))]


def dense() -> ModelView:
    view = TinyModel().view()
    view.routers.clear()
    return view


def test_auto_watches_what_the_model_has(tmp_path: Path) -> None:
    assert names(wanted(tmp_path), TinyModel().view()) == ALL
    with said() as texts:
        assert names(wanted(tmp_path), dense()) == ["attention_update", "conservation"]
    assert "monitor 'router' is off: the model has no mixture-of-experts router" in texts[0]


def test_false_is_off_without_a_word(tmp_path: Path) -> None:
    with said() as texts:
        config = wanted(tmp_path, router=False, conservation=False)
        assert names(config, TinyModel().view()) == ["attention_update"]
    assert texts[0] == ""


@pytest.mark.parametrize("name", ALL)
def test_true_insists_and_says_why_not(name: str, tmp_path: Path) -> None:
    view = TinyModel().view(layers=range(0))
    view.left_out.append("layer 1: its kernel is unknown")
    with pytest.raises(ConfigError) as caught:
        names(wanted(tmp_path, **{name: True}), view)
    assert caught.value.setting == f"monitors.{name}.enabled"
    assert "layer 1: its kernel is unknown" in str(caught.value)


def _two_stages(rank: int, folder: Path) -> tuple[list[str], str]:
    """Rank 0 holds a dense layer, rank 1 a MoE layer; the last step is sampled."""
    view = TinyModel().view(layers=range(1 + rank, 2 + rank))
    if rank == 0:
        view.routers.clear()
        view.left_out.append("key shift of layer 9: something")
    with said() as texts:
        run = attach(
            wanted(folder, router=True),
            view,
            GroupSum(None),
            Progress(iteration=0, attempt=0, reports_loss=rank == 1),
            host="test",
            versions={"host": "1"},
        )
        for iteration in range(1, 6):
            step(run, iteration)
        run.close()
    return [m.name for m in run.crew.monitors], texts[0]


def test_a_stage_without_a_router_still_takes_part(tmp_path: Path) -> None:
    (first, said_0), (second, said_1) = distributed.run(2, _two_stages, tmp_path)
    assert first == second == ALL
    assert "left out: key shift of layer 9: something." in said_0
    assert said_1 == ""
    start = events(tmp_path, "start")
    assert [(e["world_size"], e["layers"], e["host"], e["mode"]) for e in start] == [
        (2, 2, "test", "log")
    ]
    assert start[0]["windows"] == [5]
    assert start[0]["monitors"] == ALL and start[0]["versions"] == {"host": "1"}
    assert events(tmp_path, "resume") == []


def test_a_run_that_goes_on_says_from_where(tmp_path: Path) -> None:
    run = attach(
        wanted(tmp_path),
        TinyModel().view(),
        GroupSum(None),
        Progress(iteration=14, attempt=2, reports_loss=True),
        host="test",
        versions={},
    )
    assert (run.state.iteration, run.state.armed) == (15, True)
    step(run, 15)
    resume = events(tmp_path, "resume")
    assert [(e["from_iteration"], e["attempt"]) for e in resume] == [(14, 2)]


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for run_dir in (in_the_way, in_the_way / "below"):
        with pytest.raises(ConfigError) as caught:
            check_run_dir(str(run_dir))
        assert caught.value.setting == "run_dir"
        assert str(run_dir) in str(caught.value)
    check_run_dir(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
