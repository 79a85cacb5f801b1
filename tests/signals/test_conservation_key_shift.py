"""The key-shift identity: kept by right kernels, broken by a wrong one, lost where it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.signals.conservation import key_shift_from_terms, key_shift_terms, limit

from .conservation_cases import SCALE, B, G, H, S, d, dense, inputs


def gradient(attention, q, k, v, grad):
    """dK, and what its residual needs besides."""
    o = attention(q, k, v)
    dk = torch.autograd.grad(o, k, grad)[0]
    return dk, {"query": q.detach(), "output": o.detach(), "grad_output": grad}


def residual(dk, seen):
    total, count = key_shift_from_terms(*key_shift_terms(dk, **seen))
    return (total / count).max().item()


def sdpa(q, k, v):
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_terms(length=16, sequences=2, heads=3):
    """dK and the tensors beside it, of no attention at all."""
    shape = (length, sequences, heads, 4)
    return some(*shape), {
        name: some(*shape, seed=seed)
        for seed, name in enumerate(("query", "output", "grad_output"), start=1)
    }


@pytest.mark.parametrize("attention", [dense, sdpa])
def test_zero_for_right_attention(attention):
    assert residual(*gradient(attention, *inputs(torch.float32))) < 1.5e-7
    assert residual(*gradient(attention, *inputs())) < 1e-15


@pytest.mark.parametrize("strength", [0.0003, 0.001, 0.003, 0.01])
@pytest.mark.parametrize("logits", [1.0, 10.0])
def test_faulty_kernel_is_over_the_limit_at_once(strength, logits):
    def faulty(q, k, v):
        return attention_row_term(q, k, v, scale=SCALE, strength=strength)

    found = residual(*gradient(faulty, *inputs(torch.float32, logits=logits)))
    assert found > limit("key_shift", torch.float32, S, d)


@pytest.mark.parametrize("strength", [0.01, 0.03])
def test_faulty_bfloat16_kernel_is_over_the_limit(strength):
    def faulty(q, k, v):
        return attention_row_term(q, k, v, scale=SCALE, strength=strength)

    found = residual(*gradient(faulty, *inputs(torch.bfloat16, common=2.0)))
    assert found > limit("key_shift", torch.bfloat16, S, d)


def test_holds_behind_the_rotary_embedding_and_not_before():
    q, k, v, grad = inputs()
    half = d // 2
    angle = torch.arange(S)[:, None] / 10000 ** (torch.arange(half) / half)  # [S, d/2]
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    rotated = rotate(k)
    out = dense(rotate(q), rotated, v)
    before, after = torch.autograd.grad(out, (k, rotated), grad)
    seen = {"query": rotate(q).detach(), "output": out.detach(), "grad_output": grad}
    assert residual(after, seen) < 1e-7  # the angles are float32
    assert residual(before, seen) > 1e-2


def test_ratio_by_loop():
    dk, seen = random_terms(5)
    vector, scale = key_shift_terms(dk, **seen)
    ratio, count = key_shift_from_terms(vector, scale)
    for g in range(3):
        want = sum(
            (sum(dk[j, b, g].double() for j in range(5)).norm() / scale[b, g].double()).item()
            for b in range(2)
        )
        assert ratio[g].item() == pytest.approx(want, rel=1e-6)
        assert count[g].item() == 2


def test_shards_of_a_sequence_add_up():
    dk, seen = gradient(dense, *inputs())
    parts = [
        key_shift_terms(dk[i : i + S // 4], **{n: x[i : i + S // 4] for n, x in seen.items()})
        for i in range(0, S, S // 4)
    ]
    whole = key_shift_terms(dk, **seen)
    scale = sum(p[1] for p in parts)
    torch.testing.assert_close(scale, whole[1])
    ratio, _ = key_shift_from_terms(sum(p[0] for p in parts), scale)
    assert (ratio / B).max() < 1e-15
    assert ratio.shape == (G,)


def test_loss_scale_cancels():
    dk, seen = random_terms()
    want = key_shift_from_terms(*key_shift_terms(dk, **seen))
    seen["grad_output"] = 2.0**16 * seen["grad_output"]
    got = key_shift_from_terms(*key_shift_terms(2.0**16 * dk, **seen))
    torch.testing.assert_close(got, want)


def test_sequences_without_gradient_are_not_counted_and_broken_ones_are():
    dk, seen = random_terms(8, sequences=3, heads=2)
    dk[:, 0], seen["grad_output"][:, 0] = 0, 0
    ratio, count = key_shift_from_terms(*key_shift_terms(dk, **seen))
    assert count.tolist() == [2, 2]
    assert ratio.isfinite().all()
    for bad in ("nan", "inf"):
        dk[3, 1, 0, 2] = float(bad)
        ratio, count = key_shift_from_terms(*key_shift_terms(dk, **seen))
        assert ratio.isnan().tolist() == [True, False]
        assert count.tolist() == [2, 2]


def test_summing_in_float32_adds_next_to_nothing_to_the_floor():
    for length in (128, 2048):
        q, k, v, grad = inputs(torch.float32, length=length, groups=H)
        dk, seen = gradient(sdpa, q, k, v, grad)
        exact = residual(dk.double(), {n: x.double() for n, x in seen.items()})
        assert residual(dk, seen) == pytest.approx(exact, rel=0.1)


def test_low_precision_gradients_are_summed_in_float32():
    dk = torch.full((1000, 1, 1, 1), 1 + 2**-7).bfloat16()
    none = torch.zeros_like(dk)
    vector, scale = key_shift_terms(dk, query=none, output=none, grad_output=none)
    assert (vector.dtype, scale.dtype) == (torch.float32, torch.float32)
    assert vector.item() == scale.item() == 1000 * (1 + 2**-7)
