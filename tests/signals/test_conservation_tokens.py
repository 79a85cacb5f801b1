"""Router, vocabulary and norm residuals: sums over the entries of each token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcore_monitors.faults.loss import sharded_cross_entropy
from mcore_monitors.faults.norm import norm
from mcore_monitors.faults.router import lose_column
from mcore_monitors.signals import conservation as c

T, E, V, D = 40, 8, 64, 24


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pooled(terms):
    """The residual of one call; router and vocabulary pool their tokens alike."""
    total, count = c.router_shift_from_terms(*terms)
    return (total / count).item()


def router_gradient(scores, seed=1):
    z = random(T, E).requires_grad_()
    p = scores(z)
    return torch.autograd.grad(p, z, random(*p.shape, seed=seed))[0]


def balanced(z):
    """Gate of the chosen two, with the auxiliary loss on the same softmax."""
    p = z.softmax(-1)
    weight, chosen = p.topk(2, dim=-1)
    share = torch.zeros_like(p).scatter(-1, chosen, 1.0).mean(0)
    auxiliary = (share * p.mean(0)).sum()
    return torch.cat([weight.flatten(), auxiliary.view(1)])


@pytest.mark.parametrize(
    "scores",
    [
        lambda z: z.softmax(-1),
        lambda z: z.softmax(-1).topk(2, dim=-1)[0],
        lambda z: F.normalize(z.softmax(-1).topk(2, dim=-1)[0], p=1, dim=-1),
        lambda z: z.topk(2, dim=-1)[0].softmax(-1),
        balanced,
    ],
    ids=["all", "top-k after", "top-k after, normalised", "top-k before", "auxiliary loss"],
)
def test_router_shift_holds(scores):
    assert pooled(c.router_shift_terms(router_gradient(scores))) < 1e-12


@pytest.mark.parametrize(
    "scores",
    [
        torch.sigmoid,
        lambda z: torch.cat([z.softmax(-1).flatten(), z.logsumexp(-1).square()]),
        lambda z: lose_column(z, E - 1).softmax(-1),
    ],
    ids=["sigmoid", "z-loss", "lost column"],
)
def test_router_shift_breaks(scores):
    assert pooled(c.router_shift_terms(router_gradient(scores))) > 0.02


def logit_gradient(loss, weight=None):
    z = random(T, V).requires_grad_()
    target = torch.arange(T) % V
    total = loss(z, target)
    return torch.autograd.grad(total, z, torch.ones_like(total) if weight is None else weight)[0]


def test_vocabulary_shift_holds():
    for smoothing in (0.0, 0.1):
        grad = logit_gradient(
            lambda z, t: F.cross_entropy(z, t, label_smoothing=smoothing, reduction="none")  # noqa: B023
        )
        assert pooled(c.vocabulary_shift_terms(grad)) < 1e-12
    masked = (torch.arange(T) > 10).double()
    grad = logit_gradient(lambda z, t: sharded_cross_entropy(z, t, shards=4), masked)
    assert pooled(c.vocabulary_shift_terms(grad)) < 1e-12
    cap = logit_gradient(lambda z, t: F.cross_entropy(5 * torch.tanh(z / 5), t, reduction="none"))
    assert pooled(c.vocabulary_shift_terms(cap)) > 1e-3


def test_vocabulary_shards_add_up_and_a_lost_one_is_seen():
    right, wrong = (
        logit_gradient(lambda z, t: sharded_cross_entropy(z, t, shards=4, lost=lost))  # noqa: B023
        for lost in (None, 3)
    )
    for grad, seen in ((right, False), (wrong, True)):
        parts = [c.vocabulary_shift_terms(x) for x in grad.split(V // 4, dim=-1)]
        signed, scale = (sum(x) for x in zip(*parts, strict=True))
        total, count = c.vocabulary_shift_from_terms(signed, scale)
        assert count.item() == 1
        assert (total.item() > 0.02) == seen
        torch.testing.assert_close(
            total,
            c.vocabulary_shift_from_terms(*c.vocabulary_shift_terms(grad))[0],
            rtol=1e-9,
            atol=1e-12,
        )
    one = c.vocabulary_shift_from_terms(*c.vocabulary_shift_terms(right[:, : V // 4]))
    assert one[0].item() > 0.1  # a shard by itself is no residual


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_norm_scale_is_exact_for_every_epsilon(centred, eps, size):
    x = (size * (random(T, D) + 2)).requires_grad_()
    weight, bias = 1 + 0.3 * random(D, seed=2), random(D, seed=3) if centred else None
    y = norm(x, weight, bias, eps=eps, centred=centred)
    want = F.layer_norm(x, (D,), weight, bias, eps) if centred else F.rms_norm(x, (D,), weight, eps)
    torch.testing.assert_close(y, want)
    dy = random(T, D, seed=4)
    dx = torch.autograd.grad(want, x, dy)[0]
    terms = c.norm_scale_terms(x.detach(), dx, y.detach(), dy, eps=eps, centred=centred, bias=bias)
    total, count = c.norm_scale_from_terms(*terms)
    assert (total / count).item() < 1e-12
    # without the output the part of ε stays in, at most ε/(m + ε)
    left = c.norm_scale_terms(x.detach(), dx, None, None, eps=eps, centred=centred)
    assert (left[0].abs() > 1e-9 * left[1]).any() or eps == 1e-5
    if centred:
        total, count = c.norm_shift_from_terms(*c.norm_shift_terms(dx))
        assert (total / count).item() < 1e-12


@pytest.mark.parametrize("centred", [False, True])
def test_norm_scale_breaks_without_the_projection(centred):
    x = random(T, D, dtype=torch.float32).requires_grad_()
    weight, dy = torch.ones(D), random(T, D, seed=4, dtype=torch.float32)
    for projected in (True, False):
        y = norm(x, weight, eps=1e-5, centred=centred, projected=projected)
        dx = torch.autograd.grad(y, x, dy)[0]
        terms = c.norm_scale_terms(x.detach(), dx, y.detach(), dy, eps=1e-5, centred=centred)
        total, _ = c.norm_scale_from_terms(*terms)
        assert (total.item() < c.limit("norm_scale", torch.float32, T, D)) == projected
        assert projected or total.item() > 0.05


def test_the_residual_connection_must_be_left_out():
    """A pre-norm block's x also feeds the residual connection: its gradient is no norm's."""
    x = random(T, D).requires_grad_()
    alias = x.view_as(x)
    y = F.rms_norm(alias, (D,), eps=1e-5)
    out, dy = x + y, random(T, D, seed=4)
    whole, alone = torch.autograd.grad(out, (x, alias), dy)
    values = [
        c.norm_scale_from_terms(
            *c.norm_scale_terms(x.detach(), g, y.detach(), dy, eps=1e-5, centred=False)
        )[0].item()
        for g in (whole, alone)
    ]
    assert values[0] > 0.01 and values[1] < 1e-12


def test_tokens_without_gradient_say_nothing_and_broken_ones_are_seen():
    grad = torch.zeros(T, E)
    assert [x.item() for x in c.router_shift_from_terms(*c.router_shift_terms(grad))] == [0, 0]
    grad[3, 2] = float("inf")
    total, count = c.router_shift_from_terms(*c.router_shift_terms(grad))
    assert total.isnan().item() and count.item() == 1
    some = random(T, E)
    masked = torch.cat([some, torch.zeros(T, E)])
    torch.testing.assert_close(
        c.router_shift_from_terms(*c.router_shift_terms(masked)),
        c.router_shift_from_terms(*c.router_shift_terms(some)),
    )


def test_low_precision_gradients_are_summed_in_float32():
    grad = torch.full((1, 1000), 1 + 2**-7).bfloat16()
    signed, scale = c.vocabulary_shift_terms(grad)
    assert signed.dtype == scale.dtype == torch.float32
    assert signed.item() == scale.item() == 1000 * (1 + 2**-7)
