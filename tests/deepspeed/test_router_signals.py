"""Router signals are those of one process, whatever the layout; the training is left as it is."""

from __future__ import annotations

import pytest

from mcore_monitors.sinks.events import EventReader
from tests.deepspeed.inside.layouts import ALONE, FOUR, TWO
from tests.deepspeed.inside.start import Walked

#: differences of entropies or of scores: held against what they are differences of, which is 1
DIFFERENCES = ("router/prediction_gap", "router/topk_margin", "router/topk_margin_q05")
EVERY = [(2, x) for x in TWO] + [(4, x) for x in FOUR]
NAMES = [f"{n} processes, {x['name']}" for n, x in EVERY]


@pytest.fixture
def walked(request: pytest.FixtureRequest, processes: int) -> Walked:
    return request.getfixturevalue({1: "alone", 2: "two", 4: "four"}[processes])


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(n, x) for n, x in EVERY if "dtype" not in x],
    ids=[name for name, (_, x) in zip(NAMES, EVERY, strict=True) if "dtype" not in x],
)
def test_router_signals_are_those_of_one_process(
    processes: int, layout: dict, walked: Walked, alone: Walked
) -> None:
    kind = "deepspeed" if layout["model"] == "deepspeed" else "huggingface"
    expected = alone.samples(f"{kind}-zero0-ep1-micro1")
    found = walked.samples(layout["name"])
    assert [s.iteration for s in found] == [1, 2, 3]
    for sample, reference in zip(found, expected, strict=True):
        names = {name for name in reference.signals if name.startswith("router/")}
        names -= {"router/shift"}  # round-off: another order of additions, another value
        assert len(names) >= 15
        assert names == {n for n in sample.signals if n.startswith("router/")} - {"router/shift"}
        for name in names:
            assert sample.signals[name].keys() == reference.signals[name].keys() == {1, 2}
            for layer, values in reference.signals[name].items():
                close = pytest.approx(
                    values, rel=1e-5, abs=1e-5 if name in DIFFERENCES else 1e-9, nan_ok=True
                )
                assert sample.signals[name][layer] == close, (name, layer, sample.iteration)
        assert sample.loss == pytest.approx(reference.loss, rel=1e-5)


@pytest.mark.parametrize(("processes", "layout"), EVERY, ids=NAMES)
def test_losses_are_bitwise_those_without(processes: int, layout: dict, walked: Walked) -> None:
    for rank in walked.ranks(layout["name"]):
        assert len(rank["with"]) == 3 * layout["accumulate"]
        assert rank["with"] == rank["without"]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, x) for x in ALONE] + EVERY,
    ids=[f"1 process, {x['name']}" for x in ALONE] + NAMES,
)
def test_no_residual_of_a_healthy_engine_is_over_its_limit(
    processes: int, layout: dict, walked: Walked
) -> None:
    (start,) = (
        e for e in EventReader(walked.folder / layout["name"]).read() if e["kind"] == "start"
    )
    limits, seen = start["limits"], set()
    for sample in walked.samples(layout["name"]):
        watched = limits.keys() & sample.signals.keys()
        assert {"attention/key_shift", "attention/value_output"} <= watched
        seen |= watched
        for name in watched:
            for layer, values in sample.signals[name].items():
                worst = max((v for v in values if v == v), default=0.0)
                assert worst <= limits[name], (name, layer, sample.iteration)
    assert "router/shift" in seen  # routers take turns, and two layers leave a sample without
