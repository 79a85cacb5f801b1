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

import torch
from torch import Tensor


def direction_terms(signed: Tensor, scale: Tensor) -> Tensor:
    """Sums over the sequences of a call, per unit.

    Args:
        signed: [B, G, d], or [B, G] for a residual that is one number; complete over a sequence.
        scale: [B, G].

    Returns:
        [G, d + 3] (d = 1 for a number): Σ r_i, Σ‖r_i‖, Σ‖r_i‖², number of sequences.
    """
    vectors = signed.unsqueeze(-1) if signed.dim() == scale.dim() else signed
    counted = (scale != 0).unsqueeze(-1)
    r = torch.where(counted, vectors / torch.where(counted, scale.unsqueeze(-1), 1.0), 0.0)
    norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
    return torch.cat([r, norm, norm.square(), counted.to(r.dtype)], dim=-1).sum(0)


def direction_coherence(sums: Tensor) -> Tensor:
    """‖Σ r_i‖ / Σ‖r_i‖ from sums [..., d + 3]: [...], 0 to 1; NaN without a sequence."""
    return torch.linalg.vector_norm(sums[..., :-3], dim=-1) / sums[..., -3]


def direction_bias(sums: Tensor) -> Tensor:
    """Size of the mean ‖Σ r_i‖ / n: what is left of the residual when rounding has cancelled."""
    return torch.linalg.vector_norm(sums[..., :-3], dim=-1) / sums[..., -1]


def direction_log_p(sums: Tensor) -> Tensor:
    """ln of the bound on P(a healthy kernel gives as large an energy ratio), at most 0."""
    return (math.log(2) - direction_energy(sums) / 2).clamp(max=0.0)


def direction_energy(sums: Tensor) -> Tensor:
    """Energy ratio F from sums [..., d + 3]: [...], about 1 for rounding, NaN without a term."""
    return sums[..., :-3].square().sum(-1) / sums[..., -2]


def direction_energy_limit(level: float) -> float:
    """The energy ratio that a healthy kernel passes with a probability of at most ``level``."""
    return 2 * math.log(2 / level)


def direction_layer_log_p(sums: Tensor) -> Tensor:
    """ln of the bound for all heads of a layer together, from sums [..., H, d + 3]: [...].

    The best of three, paid for looking three times: the bound for all sequences of all heads as one
    row (a bias that has one sign in all heads, as an offset of δ has), Chernoff's bound on the sum
    over heads (one that doesn't), and the best single head, paid for looking at H of them.
    """
    # the heads, and behind them all their sequences in one row
    rows = torch.cat([sums, sums.sum(-2, keepdim=True)], dim=-2)
    energy, log_p = direction_energy(rows), direction_log_p(rows)
    heads = sums.shape[-2]
    total = energy[..., :-1].sum(-1).clamp(min=heads)
    together = -total / 2 + heads / 2 * (1 + (total / heads).log())
    single, in_line = log_p[..., :-1].amin(-1) + math.log(heads), log_p[..., -1]
    best = torch.minimum(torch.minimum(together, single), in_line)
    return (best + math.log(3)).clamp(max=0.0)


def spread_log_p(squares: Tensor, count: Tensor, sigma: float) -> Tensor:
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
    ratio = (squares / (count * sigma**2)).nan_to_num(0.0).clamp(min=1.0)
    return count / 2 * (1 + ratio.log() - ratio)


class SampleWindow:
    """The last samples' sums of each unit, in a buffer of fixed size.

    Short windows see a new fault soon, long ones a small one at all.

    Args:
        units: number of heads (or layers) watched.
        width: sums of one unit.
        lengths: of the windows, in samples.
    """

    def __init__(
        self,
        units: int,
        width: int,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        #: the newest first
        self._samples = torch.zeros(
            max(lengths), units, width, dtype=torch.float64, device=device
        )
        mask = [[float(age < length) for age in range(max(lengths))] for length in lengths]
        self._mask = torch.tensor(mask, dtype=torch.float64).to(device)

    def add(self, sums: Tensor) -> None:
        """Take in one sample's finite sums [units, width], of all ranks and micro-batches."""
        self._samples = torch.cat([sums.unsqueeze(0), self._samples[:-1]])

    def sums(self) -> Tensor:
        """Sums over the last samples, [windows, units, width]."""
        return (self._mask @ self._samples.flatten(1)).unflatten(1, self._samples.shape[1:])

    def clear(self) -> None:
        """Forget all samples, after a rollback for instance."""
        self._samples.zero_()
