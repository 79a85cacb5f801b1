"""The choice of experts against loops: top-k, group limits, margin, mixing, agreement, load."""

import math

import numpy as np
import pytest
import torch

from mcore_monitors.signals.router import (
    best_values,
    bias_agreement,
    choice_map,
    choice_shares,
    choose,
    dead_experts,
    effective_experts,
    largest_share,
    limit_groups,
    max_violation,
    mixing_entropy,
    routing_entropy,
    underused_experts,
    weigh,
)

E, T = 8, 40


def scores(seed=0, experts=E):
    return torch.rand(T, experts, generator=torch.Generator().manual_seed(seed))


def best_by_loop(row, k):
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_best_and_the_next(k):
    s = scores()
    values, experts = choose(s, k)
    assert values.shape == (T, k + 1)
    for row, got, value in zip(s.tolist(), experts.tolist(), values.tolist(), strict=True):
        assert got == best_by_loop(row, k + 1)
        assert value == [row[e] for e in got]


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 31, 60])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 9, 16])
def test_the_best_values(experts, count):
    s = scores(experts=experts)
    got = best_values(s.t(), count)
    assert len(got) == min(count, experts)
    for row, *values in zip(s.tolist(), *got.tolist(), strict=True):
        assert values == sorted(row, reverse=True)[:count]


def test_best_values_that_tie_or_are_broken():
    s = torch.tensor([[2.0, 5, 5, 1, 5], [3, 3, 3, 3, 3], [0, -torch.inf, 1, 0, 0]])
    got = best_values(s.t(), 3).t()
    assert got.tolist() == [[5, 5, 5], [3, 3, 3], [1, 0, 0]]
    s[1, 2] = torch.nan
    assert best_values(s.t(), 3).isnan().any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_choice_by_values_is_that_of_topk(k):
    s = scores()
    wanted = choice_map(choose(s, k)[1][:, :k], E)
    assert torch.equal(choice_shares(s.t(), best_values(s.t(), k + 1), k), wanted.t())


def test_experts_that_tie_share_what_is_left():
    s = torch.tensor([[4.0, 4, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]]).t()
    got = choice_shares(s, best_values(s, 4), 3)
    thirds = pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert got[:, 0].tolist() == thirds
    assert got[:, 1].tolist() == [0.5] * 6


@pytest.mark.parametrize(("groups", "top_groups", "group_sum"), [(4, 2, 1), (2, 1, 2), (4, 3, 2)])
def test_limits_by_values_are_those_of_topk(groups, top_groups, group_sum):
    s = scores()
    limit = {"groups": groups, "top_groups": top_groups, "group_sum": group_sum}
    values, experts = choose(s, 3, **limit)
    limited = limit_groups(s.t(), **limit)
    best = best_values(limited, 3)
    assert torch.equal(best.t(), values[:, :3])
    assert torch.equal(choice_shares(limited, best, 3), choice_map(experts[:, :3], E).t())


def test_all_experts_leave_no_next_one():
    assert choose(scores(), E)[0].shape == (T, E)
    # two groups of two may be chosen: four experts, and all of them are
    assert choose(scores(), 4, groups=4, top_groups=2)[0].shape == (T, 4)


@pytest.mark.parametrize(("groups", "top_groups", "group_sum"), [(4, 2, 1), (2, 1, 2), (4, 3, 2)])
def test_group_limited_by_loop(groups, top_groups, group_sum):
    s, size = scores(), E // groups
    _, experts = choose(s, 3, groups=groups, top_groups=top_groups, group_sum=group_sum)
    limited = 0
    for row, got in zip(s.tolist(), experts.tolist(), strict=True):
        by_group = [sorted(row[g * size : (g + 1) * size])[-group_sum:] for g in range(groups)]
        allowed = best_by_loop([sum(best) for best in by_group], top_groups)
        masked = [x if e // size in allowed else -1.0 for e, x in enumerate(row)]
        assert got[:3] == best_by_loop(masked, 3)
        assert all(e // size in allowed for e in got)
        limited += got[:3] != best_by_loop(row, 3)
    assert limited > 0


def test_all_groups_are_no_limit():
    free, limited = choose(scores(), 3), choose(scores(), 3, groups=4, top_groups=4)
    assert torch.equal(free[1], limited[1])


def test_a_map_of_the_choice():
    _, experts = choose(scores(), 2)
    chosen = choice_map(experts[:, :2], E)
    for row, got in zip(chosen.tolist(), experts.tolist(), strict=True):
        assert [e for e in range(E) if row[e] == 1] == sorted(got[:2])
        assert sum(row) == 2


def test_mixing_by_loop():
    log_p = (5 * scores()).log_softmax(-1)
    best, experts = choose(log_p, 3)
    chosen = choice_map(experts[:, :3], E).t()
    got = mixing_entropy(log_p.t(), chosen)
    for value, row, k in zip(got.tolist(), log_p.tolist(), experts.tolist(), strict=True):
        weights = [math.exp(row[e]) for e in k[:3]]
        q = [w / sum(weights) for w in weights]
        assert value == pytest.approx(-sum(x * math.log(x) for x in q), rel=1e-5)
    torch.testing.assert_close(routing_entropy(weigh(best[:, :3].t())), got)


def test_mixing_at_its_ends():
    assert mixing_entropy(torch.zeros(4, 1), torch.ones(4, 1)).item() == pytest.approx(math.log(4))
    far = torch.tensor([[0.0], [-500.0]])
    assert mixing_entropy(far, torch.ones(2, 1)).item() < 1e-30
    assert mixing_entropy(torch.zeros(4, 1), torch.zeros(4, 1)).item() == 0  # goes nowhere
    # the bias may choose experts that are nothing beside the best one
    far = torch.tensor([[0.0], [-300.0], [-300.0]])
    chosen = torch.tensor([[0.0], [1.0], [1.0]])
    assert mixing_entropy(far, chosen).item() == pytest.approx(math.log(2), rel=1e-6)


def test_mixing_of_experts_that_share_the_last_place():
    """Three that are alike, in one place: as much as one of them has."""
    log = torch.tensor([[2.0], [1], [1], [1], [0]])
    chosen = torch.tensor([[1.0], [1 / 3], [1 / 3], [1 / 3], [0]])
    p = math.e / (1 + math.e)
    wanted = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert mixing_entropy(log, chosen).item() == pytest.approx(wanted, rel=1e-6)


def test_agreement_by_loop():
    s, bias = scores(), 0.4 * scores(1)[0]
    _, free = choose(s, 3)
    _, biased = choose(s + bias, 3)
    free, biased = free[:, :3], biased[:, :3]
    maps = choice_map(biased, E).t(), choice_map(free, E).t()
    got = bias_agreement(*maps, 3)
    want = [
        len(set(a) & set(b)) / 3 for a, b in zip(free.tolist(), biased.tolist(), strict=True)
    ]
    assert got.tolist() == pytest.approx(want)
    assert 0 < min(want) < 1
    assert bias_agreement(maps[1], maps[1], 3).tolist() == [1.0] * T


def test_load_by_hand():
    """Eight experts, 40 choices: mean 5."""
    load = torch.tensor([12, 8, 5, 5, 5, 4.6, 0.4, 0])
    assert max_violation(load).item() == pytest.approx(7 / 5)
    assert largest_share(load).item() == pytest.approx(0.3)
    assert dead_experts(load).item() == 1 / 8
    assert underused_experts(load).item() == 2 / 8  # below a tenth of 5
    shares = [x / 40 for x in load.tolist() if x > 0]
    want = math.exp(-sum(s * math.log(s) for s in shares))
    assert effective_experts(load).item() == pytest.approx(want, rel=1e-6)


def test_load_at_its_ends():
    even, one, none = torch.full((E,), 7.0), torch.zeros(E), torch.zeros(E)
    one[5] = 9
    ends = {
        max_violation: (0, E - 1),
        effective_experts: (E, 1),
        dead_experts: (0, (E - 1) / E),
        underused_experts: (0, (E - 1) / E),
        largest_share: (1 / E, 1),
    }
    for signal, (balanced, collapsed) in ends.items():
        assert signal(even).item() == pytest.approx(balanced, abs=1e-12)
        assert signal(one).item() == pytest.approx(collapsed)
        assert signal(none).isnan()
        assert signal(3 * one).item() == signal(one).item()  # counts matter by their ratios only
        both = signal(torch.stack([even, one]))
        assert both.shape == (2,) and both.dtype == torch.float64
        # and of an array on the host
        array = torch.stack([even, one, none]).double().numpy()
        with np.errstate(invalid="ignore"):
            found = signal(array)
        assert found.dtype == np.float64 and math.isnan(found[2])
        assert found[:2].tolist() == pytest.approx(both.tolist())
