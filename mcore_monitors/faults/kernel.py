"""An attention kernel written out as flash attention computes it, with one fault at a time.

For benchmarks and drills of the conservation residuals; normal runs never import it. Without a
fault it is a right kernel in the format of its inputs. With bfloat16 or float16 inputs each product
takes operands of that format and is summed in float32, as on tensor cores, and what is stored is
rounded once:

    P̄ = exp(S − max),  O = round(round(P̄)·V / Σ P̄),            S = α Q Kᵀ
    P = exp(S − L),  δ = rowsum(dO∘O),  dS = P∘(dO Vᵀ − δ)       L = logsumexp(S), kept
    dV = round(round(P)ᵀ dO),  dQ = round(α round(dS) K),  dK = round(α round(dS)ᵀ Q).

It holds [B, H, S, T] tensors: for short sequences.

Shape names as in :mod:`mcore_monitors.hosts.safe_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..hosts.safe_attention import check_shapes
from .rounding import clear_low_bits, towards_zero

Kind = Literal[
    "row_term",
    "bit_mask",
    "tie",
    "backward_scale",
    "stale_row_term",
    "lost_key_block",
    "mixed_scores",
    "output_towards_zero",
]


@dataclass
class KernelFault:
    """What is wrong with a kernel; one object belongs to one attention layer.

    ==================== ===========================================================================
    ``row_term``         δ + strength·mean|δ| for δ (the mean over one head's rows of a sequence)
    ``bit_mask``         δ from an O whose low ``strength`` bits (of float32) are cleared
    ``tie``              O = round(round(P̄V)/ΣP̄), rounded twice (arXiv 2510.04212): biased where a
                         row has tied maxima and V is of one sign. Only below float32
    ``backward_scale``   the backward pass computes P again with (1 + strength)·α
    ``stale_row_term``   δ of the micro-batch before (the first one is right)
    ``lost_key_block``   the last ``strength`` keys get no dK
    ``mixed_scores``     dK from an S whose α is (1 + strength) times that of dQ's, softmax and row
                         term consistent in both: each is the gradient of *some* right kernel
    ``output_towards_zero``  O rounded towards zero where it is stored
    ==================== ===========================================================================
    """

    kind: Kind
    strength: float = 0.0
    #: query heads that have the fault; None for all
    heads: tuple[int, ...] | None = None
    #: off until a drill or benchmark switches it on
    active: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind: {self.kind!r} cannot be used; allowed: {', '.join(get_args(Kind))}"
            )
        self._last: Tensor | None = None

    def last_row_term(self, delta: Tensor) -> Tensor:
        """δ of the call before, and keep this one; this one where there is no other."""
        last, self._last = self._last, delta
        return delta if last is None or last.shape != delta.shape else last

    def choose(self, right: Tensor, wrong: Tensor) -> Tensor:
        """[B, H, ...]: wrong for the faulty heads, right for the others."""
        if self.heads is None:
            return wrong
        mixed = right.clone()
        mixed[:, list(self.heads)] = wrong[:, list(self.heads)]
        return mixed


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    fault: KernelFault | None = None,
) -> Tensor:
    """softmax(scale·QKᵀ)V and its gradient as a kernel computes them, with at most one fault.

    Args:
        query: [S, B, H, d]; key: [T, B, G, d]; value: [T, B, G, v]; one format.
        scale: factor α on the logits.
        causal: query i attends to keys up to i; needs S = T.
        mask: bool, **True = barred**, broadcastable to [B, H, S, T]; every query keeps a key.
        fault: None for a right kernel.

    Returns:
        [S, B, H, v] in the query's format.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(query, key, value, causal)
    if fault is not None and not fault.active:
        fault = None
    return _Flash.apply(query, key, value, scale, causal, mask, fault)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[S, B, G, d] to [B, H, S, d], keys repeated for their query heads."""
    return x.permute(1, 2, 0, 3).repeat_interleave(heads // x.shape[2], dim=1)


def _accumulate(a: Tensor, b: Tensor, fmt: torch.dtype) -> Tensor:
    """a·b with operands rounded to the kernel's format and sums in float32 (float64 stays)."""
    wide = torch.promote_types(fmt, torch.float32)
    return a.to(fmt).to(wide) @ b.to(fmt).to(wide)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    s = _accumulate(q, k.mT, q.dtype) * scale
    if causal:
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    return s if mask is None else s.masked_fill(mask, float("-inf"))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
        mask: Tensor | None,
        fault: KernelFault | None,
    ) -> Tensor:
        fmt, heads = query.dtype, query.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (_heads_first(x, heads) for x in (query, key, value))
            s = _scores(q, k, scale, causal, mask)
            top = s.amax(-1, keepdim=True)
            p = (s - top).exp()
            total = p.sum(-1, keepdim=True)
            unscaled = _accumulate(p, v, fmt)
            exact = unscaled / total
            out = exact.to(fmt)
            if fault is not None and fault.kind == "tie":
                out = fault.choose(out, (unscaled.to(fmt).to(total.dtype) / total).to(fmt))
            elif fault is not None and fault.kind == "output_towards_zero":
                out = fault.choose(out, towards_zero(exact, fmt).to(fmt))
        ctx.save_for_backward(query, key, value, mask, out, top + total.log())
        ctx.setting = (scale, causal, fault)
        return out.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, log_sum = ctx.saved_tensors
        scale, causal, fault = ctx.setting
        fmt, heads, groups = query.dtype, query.shape[2], key.shape[2]
        kind = None if fault is None else fault.kind
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (_heads_first(x, heads) for x in (query, key, value))
            do = grad_output.permute(1, 2, 0, 3)
            wide_do = do.to(log_sum.dtype)
            delta = (wide_do * out.to(log_sum.dtype)).sum(-1, keepdim=True)
            if kind == "row_term":
                wrong = delta + fault.strength * delta.abs().mean(2, keepdim=True)
                delta = fault.choose(delta, wrong)
            elif kind == "bit_mask":
                masked = clear_low_bits(out.float(), int(fault.strength))
                delta = fault.choose(delta, (wide_do * masked).sum(-1, keepdim=True))
            elif kind == "stale_row_term":
                delta = fault.choose(delta, fault.last_row_term(delta))
            s = _scores(q, k, scale, causal, mask)
            p = (s - log_sum).exp()
            if kind == "backward_scale":
                p = fault.choose(p, (s * (1 + fault.strength) - log_sum).exp())
            dp = _accumulate(do, v.mT, fmt)
            ds = p * (dp - delta)
            for_keys = ds
            if kind == "mixed_scores":
                other = (s * (1 + fault.strength)).softmax(-1)
                row = (other * dp).sum(-1, keepdim=True)
                for_keys = fault.choose(ds, other * (dp - row))
            dq = scale * _accumulate(ds, k, fmt)
            dk = scale * _accumulate(for_keys.mT, q, fmt)
            if kind == "lost_key_block":
                wrong = dk.clone()
                wrong[:, :, -int(fault.strength) :] = 0
                dk = fault.choose(dk, wrong)
            dv = _accumulate(p.mT, do, fmt)
            dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
            grads = (x.permute(2, 0, 1, 3).to(fmt) for x in (dq, dk, dv))
        return *grads, None, None, None, None
