"""What Adam makes of the gradients: update sizes and spikes, from its own state.

After step t the state holds m_t and v_t, and the step moved a weight by

    −lr · (u + λ θ_{t−1}),    u = m̂ / (√v̂ + ε),    m̂ = m_t / (1 − β1ᵗ), v̂ = v_t / (1 − β2ᵗ)

with decoupled weight decay λ (AdamW), so that the sizes of the update and of the weights are known
without a copy: RMS(Δθ) / RMS(θ) of one step (healthy about 1e-3), and RMS(u), which for a
signal-to-noise ratio SNR of the gradients and slowly moving v is
√((SNR + (1 − β1)/(1 + β1)) / (SNR + 1)): 0.229 for pure noise and β1 = 0.9, 1 for pure signal
(kexue.fm 11267).

A gradient is a spike where g² > 5000 v̂_{t−1} (SPAM, arXiv 2501.06842, which takes v without bias
correction). v_{t−1} = (v_t − (1 − β2) g²) / β2, so the test needs no copy of v either: it is
g² > κ v_t with κ = 5000 / (β2 (1 − β2ᵗ⁻¹) + 5000 (1 − β2)). There is none in the first step. ε is
added to √v as Adam does, so that weights which hardly ever get a gradient do not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: g² over the second moment beyond which SPAM calls an element a spike.
SPIKE = 5000.0

#: Elements worked on at once on a CPU: what stays in the cache is faster.
_PIECE_ON_CPU = 2**16


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """What made the last step of the tensors of one parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    #: decoupled weight decay λ; 0 where decay is part of the gradient (Adam with L2)
    weight_decay: float
    #: t of the step just made, from 1
    step: int

    @property
    def spike_limit(self) -> float | None:
        """√κ of the module's docstring; None in the first step, before which there is no v."""
        if self.step < 2:
            return None
        before = 1 - self.beta2 ** (self.step - 1)
        return math.sqrt(SPIKE / (self.beta2 * before + SPIKE * (1 - self.beta2)))


#: What :func:`step_sums` adds up, in its order. ``searched`` are elements searched for spikes.
SUMS = ("updates", "moved", "weights", "elements", "spikes", "searched")


@torch.no_grad()
def step_sums(
    weight: Tensor, gradient: Tensor | None, m: Tensor, v: Tensor, made: AdamStep
) -> Tensor:
    """Sums over the elements of one tensor, of which RMS values and shares are made.

    Args:
        weight, m, v: of one shape, float32: the weight after the step, and Adam's moments.
        gradient: as Adam took it (clipped), of that shape; None where it is gone.
        made: the step.

    Returns:
        [6] float64, see :data:`SUMS`: Σu², ΣΔθ², Σθ² (after the step), elements, spikes, elements
        searched for spikes. Sums of parts add up to the sum of the whole.
    """
    root = math.sqrt(1 - made.beta2**made.step)
    factor = root / (1 - made.beta1**made.step)  # u = factor · m / (√v + ε · root)
    limit = made.spike_limit if gradient is not None else None
    tensors = [weight.reshape(-1), m.reshape(-1), v.reshape(-1)]
    if limit is not None:
        tensors.append(gradient.reshape(-1))
    step = _PIECE_ON_CPU if weight.device.type == "cpu" else max(1, weight.numel())
    # filled again for every piece: fresh memory would cost as much time as the work
    divisors, quotients = torch.empty_like(tensors[0][:step].expand(2, -1)).unbind(0)
    rows = []
    for w_piece, m_piece, v_piece, *g_piece in zip(*(t.split(step) for t in tensors), strict=True):
        divisor, quotient = divisors[: w_piece.numel()], quotients[: w_piece.numel()]
        torch.sqrt(v_piece, out=divisor).add_(made.eps * root)
        u = torch.div(m_piece, divisor, out=quotient)
        row = [torch.dot(u, u), torch.dot(u, w_piece), torch.dot(w_piece, w_piece)]
        if g_piece:
            # ±1 where the limit is passed, else 0: the quickest way to count without waiting
            ratio = torch.div(g_piece[0], divisor, out=quotient)
            spikes = torch.hardshrink(ratio, limit).sign_()
            row.append(torch.dot(spikes, spikes))
        rows.append(torch.stack(row))
    found = torch.stack(rows).double().sum(0)
    uu, uw, ww = factor**2 * found[0], factor * found[1], found[2]
    # θ before the step: θ_t = (1 − lr λ) θ_{t−1} − lr u
    lr, decay = made.lr, made.weight_decay
    kept = 1 - lr * decay
    before_u, before = (uw + lr * uu) / kept, (ww + 2 * lr * uw + lr**2 * uu) / kept**2
    moved = lr**2 * (uu + 2 * decay * before_u + decay**2 * before)
    sums = torch.zeros(6, dtype=torch.float64, device=weight.device)
    sums[0], sums[1], sums[2], sums[3] = uu, moved, ww, weight.numel()
    if limit is not None:
        sums[4], sums[5] = found[3], weight.numel()
    return sums


def step_readings(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Readings from the sums over all tensors of a layer.

    Args:
        sums: [..., 6] of :func:`step_sums`.

    Returns:
        RMS(Δθ)/RMS(θ) of the step, RMS(u), and the share of elements that are spikes; NaN where
        there is nothing to divide by.
    """
    updates, moved, weights, elements, spikes, searched = sums.unbind(-1)
    return (moved / weights).sqrt(), (updates / elements).sqrt(), spikes / searched
