"""Faulty router, loss and norm: right when off, and wrong as they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcore_monitors.faults.loss import sharded_cross_entropy
from mcore_monitors.faults.norm import norm
from mcore_monitors.faults.router import lose_column


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_lost_column_is_zero_and_the_others_are_right():
    z = some(6, 4).requires_grad_()
    grad = some(6, 4, seed=1)
    out = lose_column(z, 2)
    assert torch.equal(out, z)
    got = torch.autograd.grad(out, z, grad)[0]
    grad[:, 2] = 0
    assert torch.equal(got, grad)


def test_cross_entropy_without_a_fault():
    z, target = some(9, 12).requires_grad_(), torch.arange(9)
    loss = sharded_cross_entropy(z, target, shards=3)
    torch.testing.assert_close(loss, F.cross_entropy(z, target, reduction="none"))
    assert torch.autograd.gradcheck(lambda z: sharded_cross_entropy(z, target, shards=3), (z,))
    half = z.detach().bfloat16().requires_grad_()
    loss = sharded_cross_entropy(half, target, shards=3)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), half)[0].dtype == torch.bfloat16


def test_cross_entropy_with_a_lost_shard():
    """Its logits never enter the sum: the loss of a smaller vocabulary, the gradient of neither."""
    z, target = some(9, 12).requires_grad_(), torch.arange(9) % 8
    loss = sharded_cross_entropy(z, target, shards=3, lost=2)
    torch.testing.assert_close(loss, F.cross_entropy(z[:, :8], target, reduction="none"))
    grad = torch.autograd.grad(loss.sum(), z)[0]
    p = z.exp() / z[:, :8].exp().sum(-1, keepdim=True)
    torch.testing.assert_close(grad, p - F.one_hot(target, 12))


@pytest.mark.parametrize("centred", [False, True])
def test_norm(centred):
    x, w, b = some(5, 8), some(8, seed=1), some(8, seed=2)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    want = F.layer_norm(x, (8,), w, b, 0.1) if centred else F.rms_norm(x, (8,), w, 0.1) + b
    torch.testing.assert_close(norm(x, w, b, eps=0.1, centred=centred), want)
    assert torch.autograd.gradcheck(lambda *t: norm(*t, eps=0.1, centred=centred), inputs)


@pytest.mark.parametrize("centred", [False, True])
def test_norm_without_projection_misses_the_part_along_x(centred):
    x, w, dy = some(5, 8).requires_grad_(), some(8, seed=1), some(5, 8, seed=2)
    right, wrong = (
        torch.autograd.grad(norm(x, w, eps=1e-5, centred=centred, projected=p), x, dy)[0]
        for p in (True, False)
    )
    missing = wrong - right
    along = (x - x.mean(-1, keepdim=True) if centred else x).detach()
    cosine = F.cosine_similarity(missing, along, dim=-1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
