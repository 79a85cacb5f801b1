"""Evidence over the last samples: of a biased key shift, of a query–key that is no rounding."""

from __future__ import annotations

import math

import numpy as np
import torch

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, EVIDENCE
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.monitors.conservation.evidence import Directions, Spread
from mcore_monitors.monitors.conservation.limits import residual_limits, smallest_bias
from mcore_monitors.monitors.conservation.turns import stride_of
from mcore_monitors.parallel import GroupSum

from .borders import attention, cross
from .models import TinyModel, sample
from .watched import SCALE, normal, view

SPREAD = EVIDENCE[1]


def direction_sums(mean: float, seed: int, sequences: int = 8) -> torch.Tensor:
    """[layers 2, directions 2, groups 2, 4] of signed residuals around ``mean`` ± 1."""
    r = mean + normal(sequences, 2, 2, 2, seed=seed).double()
    count = torch.full_like(r[0], sequences)
    return torch.stack([r.sum(0), r.abs().sum(0), r.square().sum(0), count], dim=-1)


def test_rounding_gives_little_evidence_and_a_bias_much() -> None:
    limit = residual_limits(TinyModel().view())["attention/key_shift_bias"]
    for mean, biased in ((0.0, False), (1.0, True)):
        watched = Directions(2, 2, least=0.1)
        evidence = np.stack([watched.add(direction_sums(mean, seed).numpy()) for seed in range(30)])
        assert evidence.shape == (30, 2, 2)
        assert (evidence.max().item() > limit) is biased


def test_a_bias_that_is_small_beside_the_floor_is_no_evidence() -> None:
    watched = Directions(2, 2, least=2.0)
    assert not [watched.add(direction_sums(1.0, seed).numpy()) for seed in range(20)][-1].any()


def test_layers_and_directions_are_apart() -> None:
    sums = direction_sums(0.0, 0)
    sums[0, 1] = direction_sums(3.0, 1)[0, 1]
    evidence = Directions(2, 2, least=2.0).add(sums.numpy())
    assert evidence[0, 1] > 1
    evidence[0, 1] = 0
    assert not evidence.any()


def test_an_overflow_does_not_blind_the_window_and_a_restart_empties_it() -> None:
    watched = Directions(2, 2, least=0.1)
    for seed in range(5):
        watched.add(direction_sums(1.0, seed).numpy())
    assert watched.add(np.full((2, 2, 2, 4), math.nan)).min() > 5
    watched.clear()
    assert not watched.add(np.zeros((2, 2, 2, 4))).any()


def test_the_monitor_gives_evidence_of_a_wrong_row_term() -> None:
    """All sequences of a sample push the same way, and samples add up."""
    model = TinyModel().view()
    limit = residual_limits(model)["attention/key_shift_bias"]
    for strength, biased in ((0.0, False), (0.03, True)):
        state = StepState()
        watched = ConservationMonitor(model, GroupSum(None), state=state)
        for step in range(8):
            state.iteration = step
            cross(watched, 1, attention(strength=strength, seed=step, batch=8))
            readings = sample([watched], step)
        assert (max(readings["attention/key_shift_bias"][1]) > limit) is biased
        assert set(readings["attention/key_shift_bias"]) == {1}


def test_the_monitor_gives_evidence_of_two_scores_in_one_kernel() -> None:
    """One group's dK is too long by a little: not a sample's size says so, but its spread does."""
    model = view()
    for name in ATTENTION_RESIDUALS:
        model.conserved[name].dtype = torch.bfloat16
    limits = residual_limits(model)
    for off in (0.0, 0.02):
        state = StepState()
        watched = ConservationMonitor(model, GroupSum(None), state=state)
        for step in range(0, 3 * stride_of("attention"), stride_of("attention")):
            state.iteration = step + 1
            parts = attention(seed=step, batch=32, length=64, channels=16, dtype=torch.bfloat16)
            parts["dk"][:, :, 1] *= 1 + off
            cross(watched, 1, parts)
            readings = sample([watched], step)
        evidence = [x / limits[SPREAD] for x in readings[SPREAD][1]]
        assert evidence[0] == 0 and (evidence[1] > 1) is (off > 0), evidence
        assert all(x < limits[ATTENTION_RESIDUALS[2]] for x in readings[ATTENTION_RESIDUALS[2]][1])


def test_the_spread_forgets_and_passes_over_what_is_broken() -> None:
    watched = Spread(1, 2, sigma=1.0)
    loud = np.array([[[90.0, 10.0], [0.0, 0.0]]])
    evidence = watched.add(loud)[0]
    assert evidence[0] > 20 and math.isnan(evidence[1])
    assert np.isnan(watched.add(loud * math.nan)).all()
    quiet = np.array([[[5.0, 10.0], [0.0, 0.0]]])
    assert watched.add(quiet)[0, 0] > 10  # the loud one is among the last three
    watched.clear()
    assert watched.add(quiet)[0, 0] == 0


def test_limits_follow_the_format_and_need_a_sequence_length() -> None:
    model = view()
    fine = residual_limits(model)
    assert set(fine) == {*model.conserved, *EVIDENCE}
    model.conserved["attention/key_shift"].dtype = torch.bfloat16
    coarse = residual_limits(model)
    assert coarse["attention/key_shift"] > 10 * fine["attention/key_shift"]
    assert coarse[SCALE] == fine[SCALE]
    assert smallest_bias(model) < coarse["attention/key_shift"]
    model.sequence_length = 0
    assert residual_limits(model) == {}
    assert smallest_bias(model) == math.inf
