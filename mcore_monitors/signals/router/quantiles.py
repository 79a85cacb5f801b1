"""Quantiles over tokens that are never in one place: counts at fixed edges, which add up.

A value between two edges counts for both, the more the nearer it is, and a quantile comes out by
linear interpolation of the counts. So it moves smoothly with the values: the same tokens in another
order of addition give the same quantile, which whole counts in bins would not. The error is at most
twice the width of a bin:

* entropy over ln E, in 128 bins that narrow towards 1, where a healthy router lives: width at value
  v at most 2√(1 − v)/128 + 1/128² (.016 at 0, .0056 at .87, 6e-5 at 1);
* margin, in 128 bins: 1e-6 below 1e-6, from there on 11.5% of the value.

The edges are formulas, so that a value's bin is computed and not searched for: no value has to be
sorted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 128
#: edges of the bins of [0, 1], both ends included
ENTROPY_EDGES = tuple(1 - (1 - i / BINS) ** 2 for i in range(BINS + 1))
#: edges of the bins of [0, 1]: 0, 1e-6, then each 1.115 times the one before it
MARGIN_EDGES = (0.0, *(10 ** (6 * i / (BINS - 1) - 6) for i in range(BINS)))
_FIRST = MARGIN_EDGES[1]
_LOG_RATIO = math.log(1 / _FIRST) / (BINS - 1)

#: parts of a value are added up as integers, whose sum has the same bits in any order
_UNIT = 2**20


@torch.no_grad()
def entropy_bins(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where values lie among :data:`ENTROPY_EDGES`.

    Args:
        values: [...] float32; what lies outside of [0, 1] counts at its ends.

    Returns:
        [...] each: number of the bin from 0 to 127, and the distance to its upper edge over its
        width, from 0 to 1. NaN for NaN.
    """
    # 1 − v = (w/128)²: bins are as wide as integers of w, counted from above
    squared = (1 - values).clamp_(0, 1).mul_(BINS**2)
    from_above = squared.sqrt().floor_().clamp_max_(BINS - 1)
    part = (squared - from_above.square()) / (2 * from_above + 1)
    return BINS - 1 - from_above, part


@torch.no_grad()
def margin_bins(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where values lie among :data:`MARGIN_EDGES`; as :func:`entropy_bins`."""
    over = (values / _FIRST).clamp_(0, 1 / _FIRST)
    place = over.log().div_(_LOG_RATIO)  # below 0 in the first bin
    whole = place.floor().clamp_(-1, BINS - 2)
    # of the upper edge the value is exp(−(1 − (place − whole)) · log ratio) away
    ratio = math.exp(_LOG_RATIO)
    part = (ratio - (place - whole).mul_(_LOG_RATIO).exp_()) / (ratio - 1)
    later = (whole + 1).clamp_max_(1)  # 0 in the first bin, which is not cut by ratios
    part = later * part + (1 - over).clamp_min_(0)
    return whole + 1, part


class QuantileCounts:
    """Counts of the values of several kinds in several rows, which are added to where they lie.

    Args:
        rows, kinds: how many.
        device: where the values are.
    """

    def __init__(self, rows: int, kinds: int, device: torch.device) -> None:
        # one bin more, for what does not count
        shape = (rows, kinds, BINS + 1)
        self._whole = torch.zeros(shape, dtype=torch.int64, device=device)
        self._parts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._kinds = torch.arange(kinds, device=device)

    @property
    def nbytes(self) -> int:
        """Device memory."""
        return 2 * self._whole.numel() * self._whole.element_size()

    def zero(self) -> None:
        """Forget all values."""
        self._whole.zero_()
        self._parts.zero_()

    @torch.no_grad()
    def add(self, rows: Tensor, bins: Tensor, parts: Tensor) -> None:
        """Count values.

        Args:
            rows: [n] int64, rows of the values.
            bins, parts: [kinds, n, T], of :func:`entropy_bins` or :func:`margin_bins`, of the first
                ``kinds`` kinds; NaN for what lies beyond all edges or does not count.
        """
        cells = rows * self._whole.shape[1] + self._kinds[: len(bins)].unsqueeze(1)  # [kinds, n]
        bins = bins.nan_to_num(nan=BINS).long()
        at = bins.add_((cells * (BINS + 1)).unsqueeze(-1)).view(-1)
        parts = parts.nan_to_num(nan=0.0).clamp_(0, 1).mul_(_UNIT).long().view(-1)
        self._whole.view(-1).scatter_add_(0, at, at.new_ones(1).expand_as(at))
        self._parts.view(-1).scatter_add_(0, at, parts)

    @torch.no_grad()
    def upto(self) -> Tensor:
        """How many values lie up to each edge; what lies between two edges counts for both in part.

        A value v between edges a < b counts (b − v)/(b − a) up to a, and fully up to b.

        Returns:
            [rows, kinds, bins] float64: up to each edge but the last, where all have been counted.
        """
        whole = self._whole[..., :BINS]
        below = whole.cumsum(-1) - whole
        return below + self._parts[..., :BINS].double() / _UNIT


@torch.no_grad()
def quantile(upto: Tensor, count: Tensor, edges: Tensor, q: Tensor | float) -> Tensor:
    """Quantiles of values, from their counts at edges.

    Args:
        upto: [..., bins], sums of :meth:`QuantileCounts.upto` over ranks and micro-batches.
        count: [...] number of values.
        edges: [bins + 1] float64, rising; or [..., bins + 1].
        q: between 0 and 1; one, or [n].

    Returns:
        [...] or [..., n] float64, between the first and the last edge; NaN where nothing was
        counted.
    """
    several = torch.as_tensor(q, dtype=torch.float64, device=upto.device)
    count = count.double().unsqueeze(-1)
    upto = torch.cat([torch.zeros_like(count), upto.double(), count], -1)
    # half of what counts at an edge lies on either side of it
    middle = (upto[..., 1:] + upto[..., :-1]) / 2
    wanted = several.reshape(-1) * count
    right = torch.searchsorted(middle, wanted).clamp_(1, edges.shape[-1] - 1)
    left, edges = right - 1, edges.expand_as(middle)
    under, over = middle.gather(-1, left), middle.gather(-1, right)
    below, above = edges.gather(-1, left), edges.gather(-1, right)
    value = below + ((wanted - under) / (over - under)).clamp_(0, 1) * (above - below)
    value = torch.where(count > 0, value, torch.nan)
    return value if several.dim() else value.squeeze(-1)
