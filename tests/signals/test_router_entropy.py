"""Routing entropy, its prediction and router z against loops over tokens and experts."""

import math

import pytest
import torch

from mcore_monitors.signals.router import (
    log_scores,
    predicted_entropy,
    routing_entropy,
    scores,
    squared_logsumexp,
    weigh,
)

E, D = 8, 24
SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]


def logits(*shape, spread=1.0, seed=0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighed(z, score="softmax"):
    """Of logits [..., E], as loops read them; the signals want the experts first."""
    return weigh(log_scores(z, score).movedim(-1, 0))


def entropy(z, score="softmax"):
    return routing_entropy(weighed(z, score))


def weight(x, score):
    if score == "softmax":
        return math.exp(x)
    return 1 / (1 + math.exp(-x)) if score == "sigmoid" else math.log1p(math.exp(x)) ** 0.5


def entropy_by_loop(row, score):
    weights = [weight(x, score) for x in row]
    p = [w / sum(weights) for w in weights]
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_entropy_against_a_loop(score, spread):
    z = logits(6, 5, E, spread=spread)
    got = entropy(z, score)
    assert got.shape == (6, 5)
    for value, row in zip(got.flatten().tolist(), z.reshape(-1, E).double().tolist(), strict=True):
        assert value == pytest.approx(entropy_by_loop(row, score), rel=1e-5, abs=2e-6)


def test_entropy_at_its_ends():
    assert entropy(torch.zeros(7, E)).tolist() == pytest.approx([math.log(E)] * 7, rel=1e-6)
    assert entropy(1000 * torch.eye(E)).tolist() == [0.0] * E


@pytest.mark.parametrize("score", SCORES)
def test_scores_against_a_loop(score):
    z = logits(4, E)
    bare = scores(z.t(), weighed(z, score), score)
    for got, row in zip(bare.t(), z.tolist(), strict=True):
        weights = [weight(x, score) for x in row]
        total = sum(weights) if score == "softmax" else 1.0
        assert got.tolist() == pytest.approx([w / total for w in weights], rel=1e-5)


def test_bfloat16_logits_are_worked_on_in_float32():
    z = logits(500, E).bfloat16()
    assert entropy(z).dtype == torch.float32
    torch.testing.assert_close(entropy(z), entropy(z.float()), rtol=0, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_barred_expert_has_no_part(score):
    z = logits(5, E)
    barred = z.clone()
    barred[:, 2:4] = -torch.inf
    rest = z[:, [0, 1, 4, 5, 6, 7]]
    torch.testing.assert_close(entropy(barred, score), entropy(rest, score))
    z[1, 3] = torch.nan
    assert entropy(z, score).isnan().tolist() == [False, True, False, False, False]


def test_far_negative_scores_keep_their_ratios():
    far = torch.full((1, E), -200.0)  # σ(−200) is zero in float32, the ratios are not
    for score in SCORES:
        assert entropy(far, score).item() == pytest.approx(math.log(E), rel=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_logarithms_over_the_whole_range(score):
    """Where the score is nothing in float32, where it is one, and in between."""
    z = torch.linspace(-300, 60, 3601)
    exact = torch.nn.functional.logsigmoid(z.double())
    if score == "sqrtsoftplus":
        softplus = -torch.nn.functional.logsigmoid(-z.double())
        exact = softplus.log() / 2
    wanted = exact.where(exact.isfinite(), z.double() / 2)
    torch.testing.assert_close(log_scores(z, score).double(), wanted, rtol=1e-6, atol=1e-7)


def test_unknown_score():
    with pytest.raises(ValueError, match="'tanh' cannot be used; allowed: 'softmax', 'sigmoid'"):
        log_scores(torch.zeros(1, E), "tanh")


def test_the_prediction_is_that_of_weights_and_second_moment():
    """ln E − tr(W_c M W_cᵀ)/(2E) with the D × D moment that nothing here ever holds."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(E, D, generator=generator, dtype=torch.float64)
    x = torch.randn(300, D, generator=generator, dtype=torch.float64)
    centred = w - w.mean(0)
    moment = x.T @ x / len(x)
    want = math.log(E) - torch.trace(centred @ moment @ centred.T) / (2 * E)
    got = predicted_entropy(weighed((x @ w.T).float())).double().mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_the_prediction_is_right_to_second_order(score):
    """Its gap to the measured entropy falls as the third power of the spread."""
    z = logits(2000, 64).double()
    gaps = []
    for spread in (0.4, 0.2):
        log = log_scores(spread * z, score).double().t()
        p = log.softmax(0)
        measured = torch.special.entr(p).sum(0)
        gaps.append((measured - predicted_entropy(weigh(log))).abs().mean().item())
    assert gaps[0] < 0.1 * 0.4**2 / 2  # of the second-order term
    assert gaps[1] < gaps[0] / 6


def test_prediction_at_its_ends():
    uniform, decided = weighed(torch.full((1, E), 3.0)), weighed(100 * torch.eye(E))
    assert predicted_entropy(uniform).item() == pytest.approx(math.log(E))
    assert predicted_entropy(decided).max() < -100  # far from uniform: no bound below


@pytest.mark.parametrize("experts", [8, 256])
def test_the_prediction_is_exact_where_one_expert_stands_out(experts):
    """Where the mean's square is the largest beside the variance that is wanted."""
    z = torch.zeros(1, experts).index_fill_(1, torch.tensor([1]), 30.0)
    want = math.log(experts) - 30.0**2 * (1 / experts - 1 / experts**2) / 2
    assert predicted_entropy(weighed(z)).item() == pytest.approx(want, rel=1e-5, abs=1e-4)


def test_the_prediction_of_a_barred_expert_has_no_number():
    z = logits(3, E)
    z[1, 2] = -torch.inf
    assert predicted_entropy(weighed(z)).isfinite().tolist() == [True, False, True]


def test_router_z_against_a_loop():
    z = logits(5, E, spread=3.0)
    want = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in z.double().tolist()]
    assert squared_logsumexp(weighed(z)).tolist() == pytest.approx(want, rel=1e-5)
    assert squared_logsumexp(weighed(torch.zeros(1, E))).item() == pytest.approx(math.log(E) ** 2)
