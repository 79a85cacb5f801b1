"""The key-shift identity: kept by right kernels, broken by a wrong one, lost where it must be."""

import pytest
import torch
import torch.nn.functional as F

from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.signals.conservation import (
    key_shift_from_terms,
    key_shift_limit,
    key_shift_terms,
)

S, B, H, G, d = 128, 4, 4, 2, 32
SCALE = d**-0.5


def inputs(dtype=torch.float32, length=S, groups=G, logits=1.0, common=0.0):
    """Random tensors; ``common`` is a part that all queries share, as in a trained model."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(length, B, n, d, generator=g) for n in (H, groups, groups, H))
    q = q + common * torch.randn(1, B, H, d, generator=g)
    q, k, v = ((x * s).to(dtype).requires_grad_() for x, s in ((q, logits), (k, 1), (v, 1)))
    return q, k, v, grad.to(dtype)


def residual(dk):
    total, count = key_shift_from_terms(*key_shift_terms(dk))
    return (total / count).max().item()


def dense(q, k, v, bias=0.0, keep=1.0, sink=None, cap=None):
    """Attention written out, [S, B, H, d], with what may or may not keep the identity."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("ibhd,jbhd->bhij", q, k) * SCALE
    if cap is not None:
        s = cap * torch.tanh(s / cap)
    s = s + bias + torch.full(s.shape[-2:], float("-inf")).triu(1)
    if sink is not None:
        s = torch.cat([s, torch.full_like(s[..., :1], sink)], dim=-1)
    p = s.softmax(-1)[..., : k.shape[0]] * keep
    return torch.einsum("bhij,jbhd->ibhd", p, v)


def sdpa(q, k, v):
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def key_gradient(attention, q, k, v, grad):
    return torch.autograd.grad(attention(q, k, v), k, grad)[0]


@pytest.mark.parametrize("attention", [dense, sdpa])
def test_zero_for_right_attention(attention):
    assert residual(key_gradient(attention, *inputs())) < 1.5e-7
    q, k, v, grad = (x.detach().double().requires_grad_() for x in inputs())
    assert residual(key_gradient(attention, q, k, v, grad.detach())) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length, logits", [(32, 1), (32, 10), (128, 1), (128, 30), (512, 30)])
def test_healthy_kernel_stays_below_the_limit(dtype, length, logits):
    q, k, v, grad = inputs(dtype, length, groups=H, logits=logits)
    assert residual(key_gradient(sdpa, q, k, v, grad)) < key_shift_limit(dtype, length)


@pytest.mark.parametrize("strength", [0.0003, 0.001, 0.003, 0.01])
@pytest.mark.parametrize("logits", [1.0, 10.0])
def test_faulty_kernel_is_over_the_limit_at_once(strength, logits):
    def faulty(q, k, v):
        return attention_row_term(q, k, v, scale=SCALE, strength=strength)

    dk = key_gradient(faulty, *inputs(logits=logits))
    assert residual(dk) > key_shift_limit(torch.float32, S)


@pytest.mark.parametrize("strength", [0.003, 0.01])
def test_faulty_bfloat16_kernel_is_over_the_limit(strength):
    def faulty(q, k, v):
        return attention_row_term(q, k, v, scale=SCALE, strength=strength)

    dk = key_gradient(faulty, *inputs(torch.bfloat16, common=2.0))
    assert residual(dk) > key_shift_limit(torch.bfloat16, S)


def test_kept_by_biases_windows_and_dropout():
    g = torch.Generator().manual_seed(0)
    distance = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    dropped = (torch.rand(B, H, S, S, generator=g) > 0.2) / 0.8
    window = torch.zeros(S, S).masked_fill(distance < -16, float("-inf"))
    documents = torch.zeros(S, S)
    documents[S // 2 :, : S // 2] = float("-inf")
    for extra in (
        {"bias": -0.1 * distance.abs()},
        {"bias": window},
        {"bias": documents},
        {"keep": dropped},
    ):
        dk = key_gradient(lambda q, k, v: dense(q, k, v, **extra), *inputs())  # noqa: B023
        assert residual(dk) < 1.5e-7, extra.keys()


def test_broken_by_a_sink_in_the_denominator_and_by_a_soft_cap():
    for extra in ({"sink": 0.0}, {"sink": 2.0}, {"cap": 5.0}):
        dk = key_gradient(lambda q, k, v: dense(q, k, v, **extra), *inputs())  # noqa: B023
        assert residual(dk) > 1e-3, extra


def test_holds_behind_the_rotary_embedding_and_not_before():
    q, k, v, grad = inputs()
    half = d // 2
    angle = torch.arange(S)[:, None] / 10000 ** (torch.arange(half) / half)  # [S, d/2]
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    rotated = rotate(k)
    before, after = torch.autograd.grad(dense(rotate(q), rotated, v), (k, rotated), grad)
    assert residual(after) < 1.5e-7
    assert residual(before) > 1e-2


def test_terms_by_loop():
    dk = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    vector, norm = key_shift_terms(dk)
    ratio, count = key_shift_from_terms(vector, norm)
    for g in range(3):
        want = 0.0
        for b in range(2):
            rows = [dk[j, b, g].double() for j in range(5)]
            want += (sum(rows).norm() / sum(r.norm() for r in rows)).item()
        assert ratio[g].item() == pytest.approx(want, rel=1e-6)
        assert count[g].item() == 2


def test_shards_of_a_sequence_add_up():
    dk = key_gradient(dense, *inputs())
    parts = [key_shift_terms(x) for x in dk.split(S // 4)]
    whole = key_shift_terms(dk)
    norm = sum(p[1] for p in parts)
    torch.testing.assert_close(norm, whole[1])
    ratio, _ = key_shift_from_terms(sum(p[0] for p in parts), norm)
    assert (ratio / B).max() < 1.5e-7


def test_loss_scale_cancels():
    dk = torch.randn(16, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    want = key_shift_from_terms(*key_shift_terms(dk))
    torch.testing.assert_close(key_shift_from_terms(*key_shift_terms(2.0**16 * dk)), want)


def test_sequences_without_gradient_are_not_counted_and_broken_ones_are():
    dk = torch.randn(8, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    dk[:, 0] = 0
    ratio, count = key_shift_from_terms(*key_shift_terms(dk))
    assert count.tolist() == [2, 2]
    assert ratio.isfinite().all()
    for bad in ("nan", "inf"):
        dk[3, 1, 0, 2] = float(bad)
        ratio, count = key_shift_from_terms(*key_shift_terms(dk))
        assert ratio.isnan().tolist() == [True, False]
        assert count.tolist() == [2, 2]


def test_summing_in_float32_adds_next_to_nothing_to_the_floor():
    for length in (128, 2048):
        dk = key_gradient(sdpa, *inputs(length=length, groups=H))
        exact = residual(dk.double())
        assert residual(dk) == pytest.approx(exact, rel=0.1)


def test_low_precision_gradients_are_summed_in_float32():
    dk = torch.full((1000, 1, 1, 1), 1 + 2**-7).bfloat16()
    vector, norm = key_shift_terms(dk)
    assert (vector.dtype, norm.dtype) == (torch.float32, torch.float32)
    assert vector.item() == norm.item() == 1000 * (1 + 2**-7)


def test_limits_are_frozen():
    for length in (128, 8192):
        assert key_shift_limit(torch.float32, length) == pytest.approx(1e-5)
    assert key_shift_limit(torch.float64, 128) == pytest.approx(1e-12)
    assert key_shift_limit(torch.bfloat16, 128) == pytest.approx(2.5e-3)
    assert key_shift_limit(torch.bfloat16, 32) == pytest.approx(5e-3)
    assert key_shift_limit(torch.bfloat16, 2048) == pytest.approx(1.25e-3)
    assert key_shift_limit(torch.float16, 128) == pytest.approx(3.2e-4)
    assert key_shift_limit(torch.float32, 128, tf32=True) == key_shift_limit(torch.float16, 128)


def test_limit_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="float8_e4m3fn has no known key-shift floor"):
        key_shift_limit(torch.float8_e4m3fn, 128)
    with pytest.raises(ValueError, match="sequence_length: 0 cannot be used"):
        key_shift_limit(torch.bfloat16, 0)
