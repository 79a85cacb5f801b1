"""Who is looked at in a sample: all in turn, and closely what is over half its limit."""

from __future__ import annotations

import math

import pytest
import torch

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, NORMS
from mcore_monitors.monitors.base import Rhythm, StepState
from mcore_monitors.monitors.conservation import ONE_IN, TOKENS, ConservationMonitor
from mcore_monitors.monitors.conservation.evidence import WINDOWS
from mcore_monitors.monitors.conservation.limits import residual_limits
from mcore_monitors.monitors.conservation.turns import Turns, norm_place, stride_of
from mcore_monitors.parallel import GroupSum
from mcore_monitors.views import Replica

from .borders import attention, cross, cut
from .models import ALONE, TinyModel, sample
from .test_conservation import broken, defined
from .watched import SCALE, CarelessRMSNorm, built, normal

KEY, VALUE, QUERY = ATTENTION_RESIDUALS
STRIDE = stride_of("attention")


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_some_sequences_in_turn_of_a_layer_at_every_other_sample(batch: int) -> None:
    state, parts = StepState(), broken(batch=batch)
    monitor = ConservationMonitor(TinyModel().view(), GroupSum(None), interval=10, state=state)
    for turn in range(4 * STRIDE):
        state.iteration = 10 * turn
        cross(monitor, 1, parts)
        readings = sample([monitor], state.iteration)
        assert (KEY in readings) is (turn % STRIDE == 1)
        for name in ATTENTION_RESIDUALS if KEY in readings else ():
            n = min(ONE_IN[name], batch)
            some = defined(cut(parts, lambda x, t=turn, n=n: x[:, t // STRIDE % n :: n]))
            assert readings[name][1] == pytest.approx(some[name], rel=1e-3), name


def test_of_many_tokens_some_are_looked_at_and_all_in_turn() -> None:
    """A token whose gradient is broken is met at one of the next samples."""

    class OneTokenOffRMSNorm(CarelessRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right = torch.nn.functional.rms_norm(x, (16,), eps=self.eps)
            odd = (x[..., :1] > 50).to(x.dtype)
            return odd * super().forward(x) + (1 - odd) * right

    block, watched, state = built(OneTokenOffRMSNorm(), whole=False)
    x = normal(4 * TOKENS, 1, 16)
    x[6, 0, 0] = 100.0
    seen = []
    for turn in range(4 * stride_of("norm")):
        state.iteration = 10 * turn
        block(x.clone().requires_grad_()).square().sum().backward()
        values = sample([watched], state.iteration).get(SCALE)
        if values is not None and values[2][1] > 1e-5:
            seen.append(turn)
    # the third of four sets of tokens; at two of its three samples the norm rests
    assert seen == [6]


@pytest.mark.parametrize("first", range(STRIDE))
@pytest.mark.parametrize("what", [VALUE, QUERY, KEY])
def test_what_is_over_its_limit_has_two_readings_within_three_samples(
    what: str, first: int
) -> None:
    """And goes back to its turns when it is well again and what was seen is forgotten."""
    state, model = StepState(), TinyModel().view()
    monitor = ConservationMonitor(
        model, GroupSum(None), limits=residual_limits(model), interval=10, state=state
    )
    tensor = {VALUE: "dv", QUERY: "dq", KEY: "dk"}[what]
    faulty, seen = range(first + 10, first + 15), []
    for turn in range(10, 40):
        state.iteration = 10 * turn
        for layer in (1, 2):
            parts = attention(seed=turn + 100 * layer, batch=4)
            if layer == 1 and turn in faulty:
                parts[tensor] = 1.001 * parts[tensor] + 0.001
            cross(monitor, layer, parts)
        readings = sample([monitor], state.iteration)
        if 1 in readings.get(what, {}):
            seen.append(turn)
        assert (2 in readings.get(what, {})) is (turn % STRIDE == 0)
    in_time = [turn for turn in seen if turn in faulty]
    assert len([turn for turn in in_time if turn < first + 13]) >= 2
    assert in_time == list(range(in_time[0], faulty.stop))  # from then on at every sample
    after = [turn for turn in seen if turn >= faulty.stop]
    # evidence lives on in the last ten samples
    assert after[0] == faulty.stop
    late = range(faulty.stop + WINDOWS[-1], 40)
    assert [turn for turn in after if turn in late] == [t for t in late if t % STRIDE == 1]


def turns(limits: dict[str, float]) -> Turns:
    return Turns(Rhythm(1), StepState(iteration=2), limits, ALONE, whole=False)


def test_from_half_a_limit_on_a_place_is_dubious_and_no_other_is() -> None:
    watched = turns({"norm/scale": 2.0, "router/shift": 4.0})
    readings = {
        "norm/scale": {3: [0.9, math.nan, 1.1, 0.0, 0.0]},
        "router/shift": {1: [1.9], 3: [2.1]},
        "attention/key_shift": {1: [5.0]},  # has no limit
    }
    watched.heed(readings)
    units = range(len(NORMS))
    # at the sample in progress, the second, number 2 of each three is due anyhow
    others = [unit for unit in units if norm_place(3, unit) % stride_of("norm") != 2]
    assert [unit for unit in others if watched.is_due("norm", norm_place(3, unit))] == [2]
    assert [layer for layer in (1, 3, 4) if watched.is_due("router", layer)] == [3]
    assert not watched.is_due("attention", 1)
    watched.restart()
    assert not watched.is_due("router", 3)


def test_a_reading_that_is_not_finite_changes_nothing() -> None:
    watched = turns({"router/shift": 4.0})
    for values, due in (([9.0], True), ([math.nan], True), ([math.inf], True), ([1.0], False)):
        watched.heed({"router/shift": {1: values}})
        assert watched.is_due("router", 1) is due
    watched.heed({"router/shift": {1: [math.nan]}})
    assert not watched.is_due("router", 1)


@pytest.mark.parametrize("kind", ["attention", "norm"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_data_replicas_look_in_turn_and_have_equally_much_to_do(kind: str, size: int) -> None:
    state, stride, places = StepState(), stride_of(kind), range(1, 25)
    ranks = [
        Turns(Rhythm(1), state, {}, Replica(rank=rank, size=size), whole=False)
        for rank in range(size)
    ]
    seen: dict[int, list[tuple[int, list[int]]]] = {place: [] for place in places}
    for state.iteration in range(1, 1 + 12 * stride):
        due = [[place for place in places if rank.is_due(kind, place)] for rank in ranks]
        assert {len(some) for some in due} == {len(places) // (stride * min(size, 2))}
        for place in places:
            looking = [rank for rank in range(size) if place in due[rank]]
            if looking:
                seen[place].append((state.iteration, looking))
    shares = [list(range(share, size, 2)) for share in range(min(size, 2))]
    for place, looks in seen.items():
        turns, who = zip(*looks, strict=True)
        assert list(turns) == list(range(turns[0], 1 + 12 * stride, stride)), place
        first = shares.index(who[0])
        assert list(who) == [shares[(first + n) % len(shares)] for n in range(12)], place


def test_what_is_dubious_all_replicas_look_at() -> None:
    limits, state = {"attention/key_shift": 1.0}, StepState()
    ranks = [
        Turns(Rhythm(1), state, limits, Replica(rank=rank, size=2), whole=False) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.heed({"attention/key_shift": {3: [0.6]}})
    for state.iteration in range(1, 9):
        assert all(rank.is_due("attention", 3) for rank in ranks)
        assert sum(rank.is_due("attention", 4) for rank in ranks) == (state.iteration % 2 == 0)


@pytest.mark.parametrize("share", [0, 1])
def test_a_replica_comes_to_all_of_its_sequences(share: int) -> None:
    state = StepState()
    watched = Turns(Rhythm(1), state, {}, Replica(rank=share, size=2), whole=False)
    seen = []
    for state.iteration in range(1, 1 + 8 * STRIDE):
        if watched.is_due("attention", 1):
            seen.append(watched.some("attention", 4).start)
    assert seen == [0, 1, 2, 3]
