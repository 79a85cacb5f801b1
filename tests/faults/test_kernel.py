"""The written-out kernel: right without a fault, wrong in one way with one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.faults.kernel import KernelFault, flash_attention
from mcore_monitors.faults.rounding import clear_low_bits, towards_zero
from mcore_monitors.hosts.safe_attention import safe_attention

S, B, H, G, d = 24, 2, 4, 2, 8
SCALE = 0.4
PADDING = torch.zeros(B, 1, 1, S, dtype=torch.bool)
PADDING[1, ..., S - 5 :] = True


def inputs(dtype=torch.float64, length=S):
    g = torch.Generator().manual_seed(0)
    shapes = ((H, d), (G, d), (G, d + 4), (H, d + 4))
    q, k, v, do = (torch.randn(length, B, *n, generator=g, dtype=torch.float64) for n in shapes)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, do.to(dtype)


def run(fault=None, dtype=torch.float64, **arguments):
    q, k, v, do = inputs(dtype)
    out = flash_attention(q, k, v, scale=SCALE, fault=fault, **arguments)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), do)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, PADDING])
def test_right_without_a_fault(causal, mask):
    q, k, v, do = inputs()
    want = safe_attention(q, k, v, scale=SCALE, causal=causal, mask=mask)
    grads = torch.autograd.grad(want, (q, k, v), do)
    got = run(causal=causal, mask=mask)
    for a, b in zip(got, (want, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_like_its_format(dtype):
    exact = run()
    for got, want in zip(run(dtype=dtype), exact, strict=True):
        assert got.dtype == dtype
        scale = want.abs().max()
        assert (got.double() - want).abs().max() < 8 * torch.finfo(dtype).eps * scale


def test_row_term_is_that_of_the_other_injector():
    q, k, v, do = inputs()
    want = attention_row_term(q, k, v, scale=SCALE, strength=0.01)
    grads = torch.autograd.grad(want, (q, k, v), do)
    for a, b in zip(run(KernelFault("row_term", 0.01))[1:], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


#: fault → which of output, dQ, dK, dV it changes
CHANGES = {
    "row_term": (0.01, "qk"),
    "bit_mask": (18, "qk"),
    "backward_scale": (0.01, "qkv"),
    "lost_key_block": (4, "k"),
    "mixed_scores": (0.01, "k"),
    "output_towards_zero": (0, "oqk"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_fault_changes_what_it_says_and_only_its_heads(kind):
    strength, changed = CHANGES[kind]
    right = run(dtype=torch.float32)
    wrong = run(KernelFault(kind, strength, heads=(1,)), dtype=torch.float32)
    for name, a, b in zip("oqkv", wrong, right, strict=True):
        assert torch.equal(a, b) == (name not in changed), name
        head = 1 if name in "oq" else 0  # the group of head 1
        others = [i for i in range(a.shape[2]) if i != head]
        assert torch.equal(a[:, :, others], b[:, :, others])


def test_a_fault_that_is_off_changes_nothing():
    fault = KernelFault("backward_scale", 0.1, active=False)
    for a, b in zip(run(fault), run(), strict=True):
        assert torch.equal(a, b)


def test_a_stale_row_term_is_the_last_calls():
    fault = KernelFault("stale_row_term")
    right = run()
    for a, b in zip(run(fault), right, strict=True):
        assert torch.equal(a, b)  # nothing to be stale yet
    for a, b in zip(run(fault), right, strict=True):
        assert torch.equal(a, b)  # the same data again: the same δ
    q, k, v, do = inputs()
    out = flash_attention(q, k, v, scale=SCALE, fault=fault)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), 2 * do)
    assert torch.equal(dv, 2 * right[3])
    assert not torch.allclose(dq, 2 * right[1]) and not torch.allclose(dk, 2 * right[2])


def test_two_tied_maxima_bias_the_output_of_bfloat16_away_from_zero():
    """arXiv 2510.04212: relative bias about −1.3e-3 with two ties and negative values."""
    g = torch.Generator().manual_seed(0)
    towards = torch.nn.functional.normalize(torch.randn(1, d, generator=g), dim=-1)
    q = (12**0.5 * towards).expand(64, 8, 1, d).clone()
    k = 0.1 * torch.randn(64, 8, 1, d, generator=g)
    k[:2] = 12**0.5 * towards
    # of one sign: the small rest then turns every tie of the rounding the same way
    v = -1 - torch.rand(64, 8, 1, d, generator=g)
    exact = flash_attention(*(x.bfloat16().double() for x in (q, k, v)), scale=1.0, causal=False)
    bias = {}
    for kind in (None, "tie"):
        fault = kind and KernelFault(kind)
        out = flash_attention(
            *(x.bfloat16() for x in (q, k, v)), scale=1.0, causal=False, fault=fault
        )
        bias[kind] = ((out.double() - exact) / exact.abs()).mean().item()
    assert -2.5e-3 < bias["tie"] < -5e-4
    assert abs(bias[None]) < 0.2 * abs(bias["tie"])


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="kind: 'nothing' cannot be used; allowed: row_term"):
        KernelFault("nothing")


def test_rounding_towards_zero():
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    for dtype, unit in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-10)):
        error = (towards_zero(x, dtype).double() - x.double()) / x.double()
        assert (error <= 0).all() and (error > -unit).all()
        assert error.mean().item() == pytest.approx(-unit / 2 * 0.69, rel=0.05)
    assert torch.equal(clear_low_bits(x, 0), x)
    assert torch.equal(clear_low_bits(x, 16), towards_zero(x, torch.bfloat16).float())
    error = ((clear_low_bits(x, 18) - x) / x).mean().item()
    assert error == pytest.approx(-(2.0**-6) * 0.693, rel=0.05)
    with pytest.raises(ValueError, match="bits: 24 cannot be used; allowed: 0 to 23"):
        clear_low_bits(x, 24)


def test_normal_runs_import_no_fault():
    code = (
        "import sys, mcore_monitors, mcore_monitors.config, mcore_monitors.runtime; "
        "print([n for n in sys.modules if n.startswith('mcore_monitors.faults.') "
        "and n != 'mcore_monitors.faults.config'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
