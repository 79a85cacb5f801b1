"""The faulty kernel: exact forward, exact backward at strength 0, the dialled error otherwise."""

import pytest
import torch

from mcore_monitors.faults import attention as faults
from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.hosts.safe_attention import safe_attention

S, B, H, G, d = 48, 2, 4, 2, 8
SCALE = d**-0.5


def inputs(dtype=torch.float32, length=S):
    g = torch.Generator().manual_seed(0)
    sizes = ((H, d), (G, d), (G, d + 4), (H, d + 4))
    q, k, v, grad = (torch.randn(length, B, *n, generator=g, dtype=torch.float64) for n in sizes)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, grad.to(dtype)


def padding(length=S):
    mask = torch.zeros(B, 1, 1, length, dtype=torch.bool)
    mask[1, ..., length - 7 :] = True
    mask[0, ..., :3] = True  # with causal: the first three queries have no key at all
    return mask


def dense(q, k, v, mask):
    """Attention written out in float64: output [S, B, H, v] and probabilities [B, H, S, T]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    s = torch.einsum("ibhd,jbhd->bhij", q, k) * SCALE
    barred = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1) | mask
    p = s.masked_fill(barred, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,jbhd->ibhd", p, v), p


@pytest.mark.parametrize("mask", [None, padding()])
def test_strength_zero_is_right_attention(mask):
    q, k, v, grad = inputs()
    want = safe_attention(q, k, v, scale=SCALE, causal=True, mask=mask)
    got = attention_row_term(q, k, v, scale=SCALE, strength=0.0, mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad)
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [None, padding(6)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(mask, causal):
    q, k, v, _ = inputs(torch.float64, length=6)
    torch.autograd.gradcheck(
        lambda q, k, v: attention_row_term(
            q, k, v, scale=SCALE, strength=0.0, causal=causal, mask=mask
        ),
        (q, k, v),
    )


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1, S, dtype=torch.bool), padding()])
def test_error_is_the_dialled_one(mask):
    """δ is off by c·mean|δ| of its head and sequence: dQ by −α P K times that, dK by −α Pᵀ Q."""
    q, k, v, grad = inputs(torch.float64)
    c = 0.01
    out, p = dense(q, k, v, mask)
    off = c * (grad * out).sum(-1).abs().mean(0)[:, :, None, None]  # [B, H, 1, 1]
    keys = k.detach().repeat_interleave(H // G, dim=2)
    want_q = -SCALE * torch.einsum("bhij,jbhd->ibhd", off * p, keys)
    want_k = -SCALE * torch.einsum("bhij,ibhd->jbhd", off * p, q)
    want_k = want_k.unflatten(2, (G, H // G)).sum(3)
    grads = [
        torch.autograd.grad(
            attention_row_term(q, k, v, scale=SCALE, strength=s, mask=mask), (q, k, v), grad
        )
        for s in (c, 0.0)
    ]
    errors = [a - b for a, b in zip(*grads)]
    torch.testing.assert_close(errors[0], want_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(errors[1], want_k, rtol=0, atol=1e-12)
    assert not errors[2].any()


def test_forward_does_not_depend_on_strength():
    q, k, v, _ = inputs()
    a, b = (attention_row_term(q, k, v, scale=SCALE, strength=s) for s in (0.0, 0.1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, padding()])
@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_blocks_give_what_one_block_gives(monkeypatch, mask, strength):
    q, k, v, grad = inputs()

    def run():
        out = attention_row_term(q, k, v, scale=SCALE, strength=strength, mask=mask)
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    whole = run()
    monkeypatch.setattr(faults, "_BLOCK", 10)
    for got, want in zip(run(), whole):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_bfloat16_in_and_out():
    q, k, v, grad = inputs(torch.bfloat16)
    out = attention_row_term(q, k, v, scale=SCALE, strength=0.0)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert {x.dtype for x in (out, *grads)} == {torch.bfloat16}
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = attention_row_term(*wide, scale=SCALE, strength=0.0)
    for got, exact in zip((out, *grads), (want, *torch.autograd.grad(want, wide, grad.float()))):
        torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=1e-6)
