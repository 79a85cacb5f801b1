"""The safe attention path against PyTorch's own attention and a dense float64 one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mcore_monitors.hosts.safe_attention import safe_attention

S, B, H, d = 64, 2, 4, 16
SCALE = d**-0.5


def inputs(dtype=torch.float32, groups=H, keys=S, queries=S):
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(length, B, n, d, generator=g)
        for length, n in ((queries, H), (keys, groups), (keys, groups), (queries, H))
    )
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, grad.to(dtype)


def allowed_by_position(queries, keys, causal, window):
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    ok = torch.ones_like(ahead, dtype=torch.bool)
    left, right = window or (-1, -1)
    if causal:
        ok &= ahead <= 0
    if left >= 0:
        ok &= ahead >= -left
    if right >= 0:
        ok &= ahead <= right
    return ok


def dense(q, k, v, causal=False, mask=None, window=None):
    """PyTorch's attention in float64, True = allowed there."""
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    ok = allowed_by_position(q.shape[2], k.shape[2], causal, window)
    if mask is not None:
        ok = ok & ~mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=ok, enable_gqa=True, scale=SCALE)
    return out.permute(2, 0, 1, 3)


def compare(settings, atol, *, dtype=torch.float32, rtol=0.0, block=512, **sizes):
    q, k, v, grad = inputs(dtype, **sizes)
    out = safe_attention(q, k, v, scale=SCALE, block=block, **settings)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = dense(*exact, **settings)
    assert out.dtype == dtype and out.shape == want.shape
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(want, exact, grad.double()),
    ):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def scattered():
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) < 0.3
    return mask & ~torch.eye(S, dtype=torch.bool)


def per_head():
    mask = torch.rand(1, H, S, S, generator=torch.Generator().manual_seed(1)) < 0.3
    return mask & ~torch.eye(S, dtype=torch.bool)


def padded():
    mask = torch.zeros(B, 1, 1, S, dtype=torch.bool)
    mask[1, ..., -9:] = True
    return mask


SETTINGS = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "mask": scattered()},
    {"causal": False, "mask": scattered()},
    {"causal": False, "mask": scattered()[0, 0]},
    {"causal": True, "mask": per_head()},
    {"causal": False, "mask": padded()},
    {"causal": True, "window": (7, 0)},
    {"causal": False, "window": (7, 3)},
    {"causal": False, "window": (-1, 3)},
    {"causal": True, "window": (20, 0), "mask": padded()},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("block", [512, 24])
@pytest.mark.parametrize("groups", [H, 2, 1])
def test_matches_pytorch(settings, block, groups):
    compare(settings, 3e-6, block=block, groups=groups)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]])
@pytest.mark.parametrize("block", [512, 24])
def test_bfloat16_is_rounded_once(settings, block):
    # half a unit in the last place, and one rounding more per block for dK and dV
    rtol = 2**-8 if block == 512 else 2**-7
    compare(settings, 1e-2 if block == 24 else 1e-6, dtype=torch.bfloat16, rtol=rtol, block=block)


def test_fewer_queries_than_keys():
    compare({"causal": False}, 3e-6, queries=20, block=8)


def test_query_with_every_key_barred_gives_zeros():
    q, k, v, grad = inputs()
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    mask[0, :, 5] = True
    out = safe_attention(q, k, v, scale=SCALE, causal=True, mask=mask)
    assert not out[5, 0].any() and out[5, 1].any()
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][5, 0].any()


def test_large_logits_do_not_overflow():
    q, k, v, _ = inputs()
    out = safe_attention(1e4 * q, 1e4 * k, v, scale=SCALE, causal=True)
    torch.testing.assert_close(out.double(), dense(1e4 * q, 1e4 * k, v, causal=True))


def test_only_a_block_is_kept_for_the_backward_pass():
    q, k, v, _ = inputs()
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        safe_attention(q, k, v, scale=SCALE, causal=True, block=8)
    assert max(kept) <= q.numel()  # no [B, H, S, S], 8 times as large


def test_inside_a_checkpoint_of_the_host():
    q, k, v, grad = inputs()

    def run(q, k, v):
        return safe_attention(q, k, v, scale=SCALE, causal=True, block=24)

    want = torch.autograd.grad(run(q, k, v), (q, k, v), grad)
    checkpoint(run, q, k, v, use_reentrant=True).backward(grad)
    for x, g in zip((q, k, v), want):
        torch.testing.assert_close(x.grad, g)


@pytest.mark.parametrize("block", [512, 24])
def test_dropout_is_the_same_in_both_directions(block):
    """Linear in V for one draw, so ⟨V, dV⟩ = ⟨O, dO⟩ holds only if the draw is kept."""
    q, k, v, grad = inputs()
    torch.manual_seed(5)
    out = safe_attention(q, k, v, scale=SCALE, causal=True, dropout=0.5, block=block)
    state = torch.get_rng_state()
    dv = torch.autograd.grad(out, v, grad)[0]
    torch.testing.assert_close((v * dv).sum(), (out * grad).sum(), rtol=1e-4, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    plain = safe_attention(q, k, v, scale=SCALE, causal=True)
    assert not torch.allclose(out, plain, atol=0.1)


def test_autocast_does_not_lower_the_precision():
    q, k, v, grad = inputs()
    want = torch.autograd.grad(safe_attention(q, k, v, scale=SCALE, causal=True), q, grad)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = safe_attention(q, k, v, scale=SCALE, causal=True, block=24)
    got = torch.autograd.grad(out, q, grad)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shapes, causal, message",
    [
        ([(8, 2, 4, 16), (8, 2, 3, 16), (8, 2, 3, 16)], True, "multiple of G"),
        ([(8, 2, 4, 16), (8, 1, 4, 16), (8, 1, 4, 16)], True, "multiple of G"),
        ([(8, 2, 4, 16), (8, 2, 4, 8), (8, 2, 4, 16)], True, "multiple of G"),
        ([(8, 2, 4, 16), (9, 2, 4, 16), (9, 2, 4, 16)], True, "as many keys as queries"),
    ],
)
def test_shapes_that_do_not_fit(shapes, causal, message):
    with pytest.raises(ValueError, match=message):
        safe_attention(*(torch.zeros(s) for s in shapes), scale=SCALE, causal=causal)
