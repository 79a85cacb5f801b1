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

#: Elements worked on at once: on a CPU what stays in the cache is faster, on a card this bounds
#: the memory, 16 bytes an element.
_PIECE_ON_CPU, _PIECE_ON_CARD = 2**16, 2**22
#: Tensors up to this size are joined first: for them starting an operation is the work.
_SMALL = 2**13
#: sizes for which views are kept
_KEPT = 64


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


#: What :class:`StepSums` adds up, in its order. ``searched`` are elements searched for spikes.
SUMS = ("updates", "moved", "weights", "elements", "spikes", "searched")


class StepSums:
    """Sums over the elements of tensors, of which RMS values and shares are made.

    Every tensor costs one pass over its elements; all that follows is done once for all of them.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._piece = _PIECE_ON_CPU if device.type == "cpu" else _PIECE_ON_CARD
        # filled again for every piece: fresh memory would cost as much time as the work
        self._space = torch.empty(2, 0, device=device)
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}
        self._small: dict[tuple[int, AdamStep, bool], list[list[Tensor]]] = {}
        self._rows: list[int] = []
        #: of each piece: dot products u·u, u·w, w·w and number of spikes, u without its factor
        self._found: list[Tensor] = []
        #: and what has to be made of them: [6, 5], the last column for the number 1
        self._factors: list[list[list[float]]] = []

    def add(
        self,
        row: int,
        weight: Tensor,
        gradient: Tensor | None,
        m: Tensor,
        v: Tensor,
        made: AdamStep,
    ) -> None:
        """Take in one tensor, or a piece of one. It may be read until :meth:`result`.

        Args:
            row: which row of the result it is added to.
            weight, m, v: of one shape, float32: the weight after the step, and Adam's moments.
            gradient: as Adam took it (clipped), of that shape; None where it is gone.
            made: the step.
        """
        tensors = [weight, m, v]
        searched = gradient is not None and made.spike_limit is not None
        if searched:
            tensors.append(gradient)
        # pieces of a flat buffer are flat already
        tensors = [x if x.dim() == 1 else x.reshape(-1) for x in tensors]
        if weight.numel() > _SMALL:
            self._measure(row, made, tensors)
        elif weight.numel():
            self._small.setdefault((row, made, searched), []).append(tensors)

    @torch.no_grad()
    def result(self, rows: int) -> Tensor:
        """All sums, and begin anew.

        Returns:
            [rows, 6] float64, see :data:`SUMS`: Σu², ΣΔθ², Σθ² (after the step), elements, spikes,
            elements searched for spikes.
        """
        for (row, made, _), parts in self._small.items():
            self._measure(row, made, [torch.cat(group) for group in zip(*parts, strict=True)])
        sums = torch.zeros(rows, len(SUMS), dtype=torch.float64, device=self._device)
        if self._rows:
            found = torch.stack(self._found).double().view(-1, 4)
            found = torch.nn.functional.pad(found, (0, 1), value=1.0)
            factors = torch.tensor(self._factors, dtype=torch.float64)
            index = torch.tensor(self._rows)
            factors, index = (x.to(self._device, non_blocking=True) for x in (factors, index))
            sums.index_add_(0, index, (factors @ found.unsqueeze(-1)).squeeze(-1))
        self._small, self._rows, self._found, self._factors = {}, [], [], []
        return sums

    @torch.no_grad()
    def _measure(self, row: int, made: AdamStep, tensors: list[Tensor]) -> None:
        root = math.sqrt(1 - made.beta2**made.step)
        limit = made.spike_limit if len(tensors) > 3 else None
        size = tensors[0].numel()
        step = min(self._piece, size)
        if self._space.shape[1] < step or self._space.dtype != tensors[0].dtype:
            self._space = tensors[0].new_empty(2, step)
            self._rooms.clear()
        for start in range(0, size, step):
            # u = factor · m / (√v + ε · root)
            piece = tensors if step == size else [t[start : start + step] for t in tensors]
            weight, m, v, *gradient = piece
            divisor, quotient = self._room(weight.numel())
            torch.sqrt(v, out=divisor).add_(made.eps * root)
            u = torch.div(m, divisor, out=quotient)
            found = [torch.dot(u, u), torch.dot(u, weight), torch.dot(weight, weight)]
            if gradient:
                # ±1 where the limit is passed, else 0: the quickest way to count without waiting
                ratio = torch.div(gradient[0], divisor, out=quotient)
                spikes = torch.hardshrink(ratio, limit).sign_()
                found.append(torch.dot(spikes, spikes))
            else:
                found.append(torch.zeros_like(found[0]))
            self._rows.append(row)
            self._found += found
            self._factors.append(_factors(made, root, weight.numel(), bool(gradient)))

    def _room(self, size: int) -> tuple[Tensor, Tensor]:
        """Two vectors to work in; layers have tensors of few sizes."""
        if size not in self._rooms:
            if len(self._rooms) >= _KEPT:
                self._rooms.clear()
            self._rooms[size] = self._space[:, :size].unbind(0)
        return self._rooms[size]


def _factors(made: AdamStep, root: float, size: int, searched: bool) -> list[list[float]]:
    """What turns (u·u, u·w, w·w, spikes, 1) of a piece into its sums, u without its factor."""
    factor = root / (1 - made.beta1**made.step)
    uu, decay = factor**2, made.weight_decay
    # θ_t = (1 − lr λ) θ_{t−1} − lr u, hence Δθ = −lr (u + λ θ_t)/(1 − lr λ)
    moved = (made.lr / (1 - made.lr * decay)) ** 2
    counted = float(size) if searched else 0.0
    return [
        [uu, 0, 0, 0, 0],
        [moved * uu, moved * 2 * decay * factor, moved * decay**2, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, float(size)],
        [0, 0, 0, 1 if searched else 0, 0],
        [0, 0, 0, 0, counted],
    ]


def step_readings(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Readings from the sums over all tensors of a layer.

    Args:
        sums: [..., 6] of :class:`StepSums`.

    Returns:
        RMS(Δθ)/RMS(θ) of the step, RMS(u), and the share of elements that are spikes; NaN where
        there is nothing to divide by.
    """
    updates, moved, weights, elements, spikes, searched = sums.unbind(-1)
    return (moved / weights).sqrt(), (updates / elements).sqrt(), spikes / searched
