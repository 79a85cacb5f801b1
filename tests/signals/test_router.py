"""Router signals against loops over experts and tokens."""

import itertools
import math

import pytest
import torch

from mcore_monitors.signals.router import (
    centred_conditioning,
    routing_entropy_sums,
    weight_similarity,
)

E, D = 8, 24


def router(seed=0, common=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, D, generator=g) + common


@pytest.mark.parametrize("common", [0.0, 1.0, 30.0])
def test_similarity_is_the_mean_pairwise_cosine(common):
    w = router(common=common).double()
    cosines = [
        torch.dot(w[i], w[j]) / (w[i].norm() * w[j].norm())
        for i, j in itertools.permutations(range(E), 2)
    ]
    want = torch.stack(cosines).mean()
    torch.testing.assert_close(weight_similarity(w), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(weight_similarity(w.float()), want, rtol=0, atol=1e-7)


def test_similarity_at_its_ends():
    same = torch.ones(E, D) * torch.arange(1, E + 1)[:, None]  # one direction, any lengths
    assert weight_similarity(same).item() == pytest.approx(1, abs=1e-12)
    assert weight_similarity(torch.eye(E)).item() == pytest.approx(0, abs=1e-12)
    simplex = torch.eye(E) - 1 / E
    assert weight_similarity(simplex).item() == pytest.approx(-1 / (E - 1), abs=1e-7)


def test_similarity_ignores_row_lengths_and_rotations():
    w = router(common=0.3).double()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    lengths = torch.rand(E, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(weight_similarity(lengths * w @ rotation), weight_similarity(w))


def test_where_similarity_has_no_meaning():
    assert weight_similarity(torch.ones(1, D)).isnan()
    w = router()
    w[3] = 0
    assert weight_similarity(w).isnan()
    w[3] = float("inf")
    assert weight_similarity(w).isnan()


@pytest.mark.parametrize("common", [0.1, 1.0, 30.0])
def test_conditioning_by_hand(common):
    w = router(common=common).double()
    mean = sum(w) / E
    want = max((row - mean).norm() for row in w) / mean.norm()
    torch.testing.assert_close(centred_conditioning(w), want)
    torch.testing.assert_close(centred_conditioning(7 * w), want)


def test_stacked_layers_at_once():
    stack = torch.stack([router(0), router(1, common=2.0)])
    for function in (weight_similarity, centred_conditioning):
        torch.testing.assert_close(function(stack), torch.stack([function(w) for w in stack]))


def entropy_by_loop(logits, score):
    total = 0.0
    for z in logits.reshape(-1, logits.shape[-1]).double().tolist():
        weight = [math.exp(x) if score == "softmax" else 1 / (1 + math.exp(-x)) for x in z]
        p = [w / sum(weight) for w in weight]
        total -= sum(x * math.log(x) for x in p if x > 0)
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_entropy_against_a_loop(score, spread):
    logits = spread * torch.randn(6, 5, E, generator=torch.Generator().manual_seed(0))
    total, count = routing_entropy_sums(logits, score=score)
    assert count.item() == 30
    assert total.item() == pytest.approx(entropy_by_loop(logits, score), rel=1e-5, abs=1e-4)


def test_entropy_at_its_ends():
    total, count = routing_entropy_sums(torch.zeros(7, E))
    assert total.item() / count.item() == pytest.approx(math.log(E), rel=1e-6)
    total, _ = routing_entropy_sums(100 * torch.eye(E))
    assert total.item() == pytest.approx(0, abs=1e-6)


def test_shares_add_up_to_the_whole():
    logits = torch.randn(10, E, generator=torch.Generator().manual_seed(0))
    whole = routing_entropy_sums(logits)
    parts = [routing_entropy_sums(x) for x in logits.split(3)]
    for i in range(2):
        torch.testing.assert_close(sum(p[i] for p in parts), whole[i])


def test_masked_tokens_do_not_count_whatever_they_hold():
    logits = torch.randn(4, 3, E, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[:2] = True
    want = routing_entropy_sums(logits[:2])
    logits[2:] = float("nan")
    got = routing_entropy_sums(logits, mask=mask)
    torch.testing.assert_close(got, want)
    assert routing_entropy_sums(logits)[0].isnan()


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(5000, E, generator=torch.Generator().manual_seed(0)).bfloat16()
    total, count = routing_entropy_sums(logits)
    assert (total.dtype, count.dtype, count.item()) == (torch.float32, torch.float32, 5000)
    assert total.item() == pytest.approx(entropy_by_loop(logits, "softmax"), rel=1e-5)


def test_barred_experts_and_far_negative_scores():
    logits = torch.zeros(1, E)
    logits[0, 2:] = float("-inf")
    assert routing_entropy_sums(logits)[0].item() == pytest.approx(math.log(2), rel=1e-6)
    far = torch.full((1, E), -200.0)  # σ(−200) is zero in float32, the ratios are not
    assert routing_entropy_sums(far, score="sigmoid")[0].item() == pytest.approx(math.log(E))


def test_unknown_score():
    with pytest.raises(ValueError, match="'tanh' cannot be used; allowed: 'softmax' or 'sigmoid'"):
        routing_entropy_sums(torch.zeros(1, E), score="tanh")
