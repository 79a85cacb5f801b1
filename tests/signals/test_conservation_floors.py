"""Floors and limits: known for the formats that have one, above what healthy kernels leave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mcore_monitors.signals import conservation as c

ATTENTION = ("key_shift", "value_output", "query_key")


def test_limits_are_frozen():
    """Dashboards and runs compare with them: a change is a change of the product."""
    bf16 = {n: c.limit(n, torch.bfloat16, 128, 128) for n in c.RESIDUALS}
    assert bf16 == {
        "key_shift": pytest.approx(2.5e-3),
        "value_output": pytest.approx(2.0e-3 / 2**0.5),
        "query_key": pytest.approx(1.6e-2),
        "router_shift": pytest.approx(6e-3),
        "vocabulary_shift": pytest.approx(6e-3),
        "norm_scale": pytest.approx(3.5e-3),
        "norm_shift": pytest.approx(7.5e-4),
    }
    for name in c.RESIDUALS:
        assert c.limit(name, torch.float16, 128, 128) == pytest.approx(bf16[name] / 8)
        wide = 10 if name == "query_key" else 1
        assert c.limit(name, torch.float32, 128, 128) == pytest.approx(wide * 1e-5)
        assert c.limit(name, torch.float32, 8192, 128) == pytest.approx(wide * 1e-5)
        assert c.limit(name, torch.float64, 128, 128) == pytest.approx(wide * 1e-12)
    assert c.floor("key_shift", torch.bfloat16, 128, 64) == pytest.approx(2.3e-4)
    assert c.floor("key_shift", torch.bfloat16, 2048, 64) == pytest.approx(2.3e-4 * 16**-0.15)
    assert c.floor("key_shift", torch.bfloat16, 32, 64) == pytest.approx(2.3e-4 * 2**0.5)
    assert c.limit("key_shift", torch.bfloat16, 2048, 64) == pytest.approx(2.5e-3)
    assert c.limit("query_key", torch.bfloat16, 2048, 64) == pytest.approx(3.2e-2)
    assert c.limit("vocabulary_shift", torch.float32, 128, 131072) == pytest.approx(1.6e-4)


def test_limit_is_at_least_five_floors_and_tf32_is_float16_for_attention_alone():
    for name in c.RESIDUALS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert c.limit(name, dtype, 512, 64) >= 5 * c.floor(name, dtype, 512, 64)
        other = torch.float16 if name in ATTENTION else torch.float32
        tf32 = c.limit(name, torch.float32, 512, 64, tf32=True)
        assert tf32 == c.limit(name, other, 512, 64)
        assert c.limit(name, torch.bfloat16, 512, 64, tf32=True) == c.limit(
            name, torch.bfloat16, 512, 64
        )


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="residual: 'key' cannot be used; allowed: key_shift"):
        c.floor("key", torch.bfloat16, 128, 64)
    with pytest.raises(ValueError, match="float8_e4m3fn has no known value_output floor"):
        c.limit("value_output", torch.float8_e4m3fn, 128, 64)
    with pytest.raises(ValueError, match="sequence_length: 0 cannot be used"):
        c.limit("key_shift", torch.bfloat16, 0, 64)
    with pytest.raises(ValueError, match="head_dim: -1 cannot be used"):
        c.limit("norm_scale", torch.bfloat16, 1, -1)


def sdpa(q, k, v):
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [32, 128, 512])
@pytest.mark.parametrize("logits, common", [(1, 0), (10, 0), (1, 3)])
def test_a_fused_kernel_stays_below(dtype, length, logits, common):
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(length, 4, 2, 64, generator=g) for _ in range(4))
    q, v, do = (x + common * torch.randn(1, 4, 2, 64, generator=g) for x in (q, v, do))
    q, k, v = (x.to(dtype).requires_grad_() for x in (logits * q, k, v))
    do = do.to(dtype)
    o = sdpa(q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    q, k, v, o = (x.detach() for x in (q, k, v, o))
    terms = {
        "key_shift": c.key_shift_terms(dk, query=q, output=o, grad_output=do),
        "value_output": c.value_output_terms(v, dv, o, do),
        "query_key": c.query_key_terms(q, dq, k, dk),
    }
    for name, (signed, scale) in terms.items():
        total, count = getattr(c, f"{name}_from_terms")(signed, scale)
        # half the limit: the floor is a mean over tensors like these
        assert (total / count).max() < 0.5 * c.limit(name, dtype, length, 64), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 1024])
def test_norms_and_softmaxes_stay_below(dtype, size):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(64, size, generator=g) + 1).to(dtype).requires_grad_()
    dy = torch.randn(64, size, generator=g).to(dtype)
    for centred in (False, True):
        y = F.layer_norm(x, (size,)) if centred else F.rms_norm(x, (size,), eps=1e-5)
        dx = torch.autograd.grad(y, x, dy)[0]
        terms = c.norm_scale_terms(x.detach(), dx, y.detach(), dy, eps=1e-5, centred=centred)
        assert c.norm_scale_from_terms(*terms)[0] < c.limit("norm_scale", dtype, 64, size)
    total, _ = c.norm_shift_from_terms(*c.norm_shift_terms(dx))
    assert total < c.limit("norm_shift", dtype, 64, size)
    loss = F.cross_entropy(x.float(), torch.arange(64) % size, reduction="sum")
    terms = c.vocabulary_shift_terms(torch.autograd.grad(loss, x)[0])
    total, _ = c.vocabulary_shift_from_terms(*terms)
    assert total < c.limit("vocabulary_shift", dtype, 64, size)
    p = x.float().softmax(-1).topk(2, dim=-1)[0]
    terms = c.router_shift_terms(torch.autograd.grad(p, x, torch.randn(64, 2, generator=g))[0])
    assert c.router_shift_from_terms(*terms)[0] < c.limit("router_shift", dtype, 64, size)
