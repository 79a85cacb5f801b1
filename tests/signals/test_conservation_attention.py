"""Value–output and query–key beside the key shift: where each holds, breaks, and adds up."""

from __future__ import annotations

import pytest
import torch

from mcore_monitors.faults.kernel import KernelFault, flash_attention
from mcore_monitors.signals import conservation as c

from .conservation_cases import SCALE, B, G, H, S, d, dense, extras, inputs, residuals

ALL = {"key_shift", "value_output", "query_key"}


def kernel(fault=None):
    return lambda q, k, v: flash_attention(q, k, v, scale=SCALE, fault=fault)


def broken(found, level):
    return {name for name, value in found.items() if not value.max() < level}


@pytest.mark.parametrize("name", extras())
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_exact_for_right_attention(name, groups):
    found = residuals(lambda *x: dense(*x, **extras()[name]), *inputs(groups=groups))
    assert broken(found, 1e-12) == set()


def test_exact_where_values_have_other_channels():
    assert broken(residuals(dense, *inputs(value_dim=24)), 1e-12) == set()


def test_a_sink_or_a_soft_cap_breaks_the_key_shift_alone():
    for extra in ({"sink": 1.0}, {"cap": 2.0}):
        found = residuals(lambda *x: dense(*x, **extra), *inputs())  # noqa: B023
        assert broken(found, 1e-12) == {"key_shift"}
        assert found["key_shift"].max() > 1e-4


FAULTS = {
    "row_term": (0.001, {"key_shift"}),
    "bit_mask": (16, {"key_shift"}),
    "backward_scale": (0.01, {"key_shift", "value_output"}),
    "stale_row_term": (0.0, {"key_shift"}),
    "lost_key_block": (8, {"key_shift", "query_key"}),
    "mixed_scores": (0.01, {"query_key"}),
    "output_towards_zero": (0.0, {"key_shift"}),  # value–output where dO has a common part
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_breaks_its_residuals_and_only_its_heads(kind):
    strength, wanted = FAULTS[kind]
    limits = {n: c.limit(n, torch.float32, S, d) for n in ALL}
    fault = KernelFault(kind, strength, heads=(2,))
    found = residuals(kernel(fault), *inputs(torch.float32), calls=2)
    over = {name for name in ALL if found[name].max() > limits[name]}
    assert over == wanted
    for name in over:
        assert found[name][0] < limits[name] < found[name][1]  # head 2 is in group 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_kernel_is_below_every_limit(dtype):
    found = residuals(kernel(), *inputs(dtype))
    for name, value in found.items():
        assert value.max() < c.limit(name, dtype, S, d)


def test_terms_by_loop():
    q, k, v, do = (x.detach() for x in inputs())
    dq, dk, dv = (torch.randn_like(x) for x in (q, k, v))
    o = torch.randn_like(do)
    signed, scale = c.value_output_terms(v, dv, o, do)
    other, squares = c.query_key_terms(q, dq, k, dk)
    _, key_scale = c.key_shift_terms(dk, query=q, output=o, grad_output=do, softmax_scale=0.3)
    for b in range(B):
        for g in range(G):
            heads = [h for h in range(H) if h // (H // G) == g]
            vdv = v[:, b, g] * dv[:, b, g]
            odo = sum(o[:, b, h] * do[:, b, h] for h in heads)
            sizes = vdv.abs().sum() + sum((o[:, b, h] * do[:, b, h]).abs().sum() for h in heads)
            torch.testing.assert_close(signed[b, g], odo.sum() - vdv.sum())
            torch.testing.assert_close(scale[b, g], sizes / 2)
            kdk = k[:, b, g] * dk[:, b, g]
            qdq = [q[:, b, h] * dq[:, b, h] for h in heads]
            torch.testing.assert_close(other[b, g], sum(x.sum() for x in qdq) - kdk.sum())
            sizes = kdk.square().sum() + sum(x.square().sum() for x in qdq)
            torch.testing.assert_close(squares[b, g], sizes.double())
            row = sum(
                (q[i, b, h].norm() * (o[i, b, h] * do[i, b, h]).norm())
                for h in heads
                for i in range(S)
            )
            keys = dk[:, b, g].norm(dim=-1).sum()
            torch.testing.assert_close(key_scale[b, g], keys + 0.3 * row)


def test_shards_of_a_sequence_add_up():
    q, k, v, do = inputs()
    o = dense(q, k, v)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    q, k, v, o = (x.detach() for x in (q, k, v, o))

    def terms(part):
        x = {n: t[part] for n, t in dict(q=q, k=k, v=v, o=o, dq=dq, dk=dk, dv=dv, do=do).items()}
        return (
            *c.key_shift_terms(x["dk"], query=x["q"], output=x["o"], grad_output=x["do"]),
            *c.value_output_terms(x["v"], x["dv"], x["o"], x["do"]),
            *c.query_key_terms(x["q"], x["dq"], x["k"], x["dk"]),
            c.key_shift_directions(x["q"], x["o"], x["do"], G),
        )

    whole, parts = terms(slice(None)), [terms(slice(i, i + S // 4)) for i in range(0, S, S // 4)]
    for i, wanted in enumerate(whole):
        torch.testing.assert_close(sum(p[i] for p in parts), wanted, rtol=1e-12, atol=1e-12)
    # tensor parallelism shares out whole groups
    per_group = (x[:, :, 1:2] for x in (v, dv)), (x[:, :, 2:4] for x in (o, do))
    one = c.value_output_terms(*per_group[0], *per_group[1])
    torch.testing.assert_close(one[0][:, 0], whole[2][:, 1])


@pytest.mark.parametrize("name", ["value_output", "query_key"])
def test_loss_scale_cancels_and_empty_sequences_do_not_count(name):
    terms, from_terms = getattr(c, f"{name}_terms"), getattr(c, f"{name}_from_terms")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 3, n, 4, generator=g) for n in (2, 2))
    dx, dy = (torch.randn(8, 3, n, 4, generator=g) for n in (2, 2))
    want = from_terms(*terms(x, dx, y, dy))
    torch.testing.assert_close(from_terms(*terms(x, 2.0**16 * dx, y, 2.0**16 * dy)), want)
    dx[:, 0], dy[:, 0] = 0, 0
    ratio, count = from_terms(*terms(x, dx, y, dy))
    assert count.tolist() == [2, 2] and ratio.isfinite().all()
    dx[3, 1, 0, 2] = float("nan")
    ratio, count = from_terms(*terms(x, dx, y, dy))
    assert ratio.isnan().tolist() == [True, False] and count.tolist() == [2, 2]


def test_float16_gradients_below_its_normal_numbers_have_an_absolute_error():
    x, tiny = torch.ones(4, 1, 1, 2), torch.finfo(torch.float16).tiny
    small = torch.full((4, 1, 1, 2), tiny / 64).half()
    for terms, power in ((c.value_output_terms, 1), (c.query_key_terms, 2)):
        elements = 8 if power == 1 else 16  # value–output's scale is a mean of both sides
        # what is lost below them has one sign, so squares count it as a sum as well
        lost = 0 if power == 1 else 2 * (8 * 2**-25 / 2e-4) ** 2
        _, scale = terms(x.half(), small, x.half(), small)
        assert scale.item() == pytest.approx(elements * tiny**power + lost)
        _, scale = terms(x, small.float(), x, small.float())
        assert scale.item() == pytest.approx(elements * (tiny / 64) ** power)
        _, scale = terms(x.half(), 0 * small, x.half(), 0 * small)
        assert scale.item() == 0


def test_key_shift_stays_comparable_where_all_attention_sits_on_one_key():
    """The gradient of the keys vanishes there, its rounding doesn't; the row term's part stays."""
    q, k, v, _ = inputs(torch.float32, groups=H)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        towards = torch.randn(1, 1, H, d, generator=generator)
        towards = torch.nn.functional.normalize(towards, dim=-1)
        q += 20 * towards
        k[0] += 12 * towards[0]
    do = torch.ones_like(q)
    dk = torch.autograd.grad(dense(q, k, v), k, do)[0]
    alone = dk.sum(0).norm(dim=-1) / dk.norm(dim=-1).sum(0)
    found = residuals(dense, q, k, v, do)["key_shift"]
    # a head whose keys got no gradient at all is 0/0
    assert alone[alone.isfinite()].max() > 1e-3
    assert found.max() < c.limit("key_shift", torch.float32, S, d)


@pytest.mark.parametrize(
    "kind, strength, which, share", [("row_term", 1e-3, 0, 0.95), ("bit_mask", 20, 1, 0.3)]
)
def test_the_residual_points_where_the_row_term_errs(kind, strength, which, share):
    """An offset of δ: all along Σq, α·c·mean|δ|·‖Σq‖. A share of δ: along Σδq."""
    q, k, v, do = inputs(torch.float32, groups=H)
    o = flash_attention(q, k, v, scale=SCALE, fault=KernelFault(kind, strength))
    dk = torch.autograd.grad(o, k, do)[0]
    q, o = q.detach(), o.detach()
    signed = dk.sum(0)
    directions = c.key_shift_directions(q, o, do, H)
    along = c.key_shift_along(signed, directions)
    sign = 1 if kind == "row_term" else -1  # rounding towards zero makes δ too small
    assert (sign * along[which] > share * signed.norm(dim=-1)).all()
    if kind == "row_term":
        delta = (do * o).sum(-1)
        want = SCALE * strength * delta.abs().mean(0) * q.sum(0).norm(dim=-1)
        torch.testing.assert_close(along[0], want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1e-25, 1e5])
def test_query_key_does_not_depend_on_the_size_of_the_gradients(size):
    """Float32's squares would be zero below 1e-23; a head with nothing to learn has such."""
    g = torch.Generator().manual_seed(0)
    q, dq, k, dk = (torch.randn(8, 2, 2, 4, generator=g) for _ in range(4))
    wanted = c.query_key_from_terms(*c.query_key_terms(q, dq, k, dk))
    got = c.query_key_from_terms(*c.query_key_terms(q, size * dq, k, size * dk))
    torch.testing.assert_close(got, wanted)
    got = c.query_key_sums(*c.query_key_terms(q, size * dq, k, size * dk))[2]
    torch.testing.assert_close(got, c.query_key_sums(*c.query_key_terms(q, dq, k, dk))[2])
