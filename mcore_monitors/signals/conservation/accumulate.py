"""Adding signed residuals up over sequences and samples, so that rounding cancels and bias stays.

Of each sequence take the signed residual over its scale, r_i, a vector (key shift) or a number (all
others). Rounding points anywhere: after n sequences ‖Σ r_i‖ is about √Σ‖r_i‖². A biased kernel
pushes the same way each time, and ‖Σ r_i‖ grows like n. Two numbers say so:

* **coherence** ‖Σ r_i‖ / Σ‖r_i‖, the norm of the mean over the mean of the norms: 1 for one
  direction, about 1/√n for rounding (whatever the dimension, when sizes are alike).
* **energy ratio** F = ‖Σ r_i‖² / Σ‖r_i‖², from 0 to n. If the signs of the r_i are independent and
  symmetric, its mean is 1 and, *for every dimension and every shape of the noise*,
  P(F ≥ f) ≤ 2 exp(−f/2) (Pinelis, Ann. Probab. 22 (1994) 1679, theorem 3.5 for sums of ±r_i in a
  Hilbert space; in one dimension Hoeffding's inequality). That is the false-alarm level of
  :func:`direction_log_p`: no calibration, no assumption on the spread over directions. F can't
  exceed n, so a level p needs n ≥ 2 ln(2/p) sequences: 25 for 1e-5.

  Heads round independently, so evidence adds up over the heads of a layer: E exp(λF) ≤
  (1 − 2λ)^(−1/2) for λ < ½ (write exp(λ‖x‖²) as a mean of exp(√(2λ)⟨g, x⟩) over normal g), the
  moments of χ² with one degree of freedom, and the sum over H heads obeys Chernoff's bound for χ²
  with H: P(ΣF ≥ x) ≤ exp(−x/2 + H/2·(1 + ln(x/H))) for x > H. Where the bias has one sign in all
  heads their sequences are one row of H·n, and the first bound holds for it: with evenly spread
  biases F is then the sum of the heads' F, at one degree of freedom
  (:func:`direction_layer_log_p`).

A tiny bias is no fault: a healthy kernel may have one far below its floor (attention sinks in
bfloat16, exponentials in float32). Judge the size of the mean as well (:func:`direction_bias`).

All four sums add up over micro-batches, ranks and samples. They have no graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .terms import ratios

#: sums of :func:`direction_terms`, wherever they are: behind the collective they are a few numbers
#: on the host, of which NumPy takes a third of the time
Sums = Tensor | np.ndarray


def direction_terms(signed: Tensor, scale: Tensor) -> Tensor:
    """Sums over the sequences of a call, per unit.

    Args:
        signed: [..., B, G, d], or [..., B, G] for a residual that is one number; complete over a
            sequence.
        scale: [..., B, G].

    Returns:
        [..., G, d + 3] (d = 1 for a number): Σ r_i, Σ‖r_i‖, Σ‖r_i‖², number of sequences.
    """
    if signed.dim() > scale.dim():
        r, counted = _counted(signed, scale.unsqueeze(-1))
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        return torch.cat([r, norm, norm.square(), counted], dim=-1).sum(-3)
    r, counted = _counted(signed, scale)
    return torch.stack([r, r.abs(), r.square(), counted], dim=-1).sum(-3)


def _counted(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Ratios, 0 where they don't count, and 1 or 0."""
    r, counted = ratios(signed, scale)
    counted = counted.to(r.dtype)
    return r * counted, counted


def direction_coherence(sums: Sums) -> Sums:
    """‖Σ r_i‖ / Σ‖r_i‖ from sums [..., d + 3]: [...], 0 to 1; NaN without a sequence."""
    return _squared_length(sums) ** 0.5 / sums[..., -3]


def direction_bias(sums: Sums) -> Sums:
    """Size of the mean ‖Σ r_i‖ / n: what is left of the residual when rounding has cancelled."""
    return _squared_length(sums) ** 0.5 / sums[..., -1]


def direction_log_p(sums: Sums) -> Sums:
    """ln of the bound on P(a healthy kernel gives as large an energy ratio), at most 0."""
    return (math.log(2) - direction_energy(sums) / 2).clip(None, 0.0)


def direction_energy(sums: Sums) -> Sums:
    """Energy ratio F from sums [..., d + 3]: [...], about 1 for rounding, NaN without a term."""
    return _squared_length(sums) / sums[..., -2]


def _squared_length(sums: Sums) -> Sums:
    """‖Σ r_i‖²."""
    if sums.shape[-1] == 4:  # a number
        return sums[..., 0] * sums[..., 0]
    return (sums[..., :-3] ** 2).sum(-1)


def direction_energy_limit(level: float) -> float:
    """The energy ratio that a healthy kernel passes with a probability of at most ``level``."""
    return 2 * math.log(2 / level)


def direction_layer_log_p(sums: Sums) -> Sums:
    """ln of the bound for all heads of a layer together, from sums [..., H, d + 3]: [...].

    The best of three, paid for looking three times: the bound for all sequences of all heads as one
    row (a bias that has one sign in all heads, as an offset of δ has), Chernoff's bound on the sum
    over heads (one that doesn't), and the best single head, paid for looking at H of them.
    """
    xp, heads = _library(sums), sums.shape[-2]
    energy = direction_energy(sums)
    total = energy.sum(-1).clip(heads)
    together = heads / 2 * (1 + xp.log(total / heads)) - total / 2
    # the largest energy has the smallest bound
    single = math.log(2 * heads) - xp.amax(energy, -1) / 2
    # the heads' sequences behind one another are one row
    in_line = math.log(2) - direction_energy(sums.sum(-2)) / 2
    best = xp.minimum(xp.minimum(together, single), in_line)
    return (best + math.log(3)).clip(None, 0.0)


def spread_log_p(squares: Sums, count: Sums, sigma: float) -> Sums:
    """ln of a bound on P(rounding alone makes residuals this large), at most 0; any shape.

    Of a residual that is over what rounding leaves (query–key) not even the sign has to be the same
    each time: its size says enough, over many sequences. A sum of independent rounding errors, each
    spread evenly between −½ and ½ of the last place, is sub-Gaussian with its own variance (a
    uniform number is), so E exp(λ Σ r²/σ²) ≤ (1 − 2λ)^(−n/2) for n residuals of root mean square σ
    at most, and Chernoff's bound for χ² holds: P(Σ r²/σ² ≥ x) ≤ exp(−x/2 + n/2·(1 + ln(x/n))) for
    x > n.

    Args:
        squares: Σ r² over sequences; count: their number.
        sigma: root mean square that a right kernel may leave.

    Returns:
        0 where nothing was counted or the mean square is within ``sigma``².
    """
    xp = _library(squares)
    ratio = squares / (count * sigma**2)
    ratio = xp.where(ratio > 1, ratio, 1.0)
    return count / 2 * (1 + xp.log(ratio) - ratio)


def _library(sums: Sums) -> ModuleType:
    """Whose functions take it."""
    return torch if isinstance(sums, Tensor) else np


class SampleWindow:
    """The last samples' sums of each unit, in a buffer of fixed size on the host.

    Short windows see a new fault soon, long ones a small one at all.

    Args:
        units: number of heads (or layers) watched.
        width: sums of one unit.
        lengths: of the windows, in samples.
    """

    def __init__(self, units: int, width: int, lengths: Sequence[int]) -> None:
        #: the newest first
        self._samples = np.zeros((max(lengths), units, width))
        self._mask = np.array(
            [[float(age < length) for age in range(max(lengths))] for length in lengths]
        )

    def add(self, sums: np.ndarray) -> None:
        """Take in one sample's finite sums [units, width], of all ranks and micro-batches."""
        self._samples[1:] = self._samples[:-1]
        self._samples[0] = sums

    def sums(self) -> np.ndarray:
        """Sums over the last samples, [windows, units, width] float64."""
        samples = self._samples
        return (self._mask @ samples.reshape(len(samples), -1)).reshape(-1, *samples.shape[1:])

    def clear(self) -> None:
        """Forget all samples, after a rollback for instance."""
        self._samples.fill(0.0)
