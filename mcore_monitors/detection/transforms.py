"""How the values of a signal are laid out before a band is drawn around them.

A band needs values whose spread does not depend on their level. Signals that are positive go to
logarithms, so that a band is a ratio; a cosine goes through Fisher's z transform, arctanh, which
does the same for correlations and accepts both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Stands in for zero and below in a logarithm: far under any value that a signal takes in fp32.
_TINY = 1e-30
#: arctanh of anything nearer to ±1 would be infinite.
_NEARLY_ONE = 1.0 - 1e-7


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Transform of one signal and the smallest deviations that mean anything on it."""

    forward: Callable[[np.ndarray], np.ndarray]
    """Value → level."""
    inverse: Callable[[float], float]
    """Level → value."""
    floor: float
    """Least spread, in levels: keeps a nearly constant series from being infinitely sensitive."""
    least: float
    """Least deviation, in levels, whatever the spread: a small change in a quiet signal may be
    significant without being harmful."""


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, _TINY))


def _fisher(values: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(values, -_NEARLY_ONE, _NEARLY_ONE))


def _exp(level: float) -> float:
    return float(np.exp(level))


def _tanh(level: float) -> float:
    return float(np.tanh(level))


_BY_SIGNAL = {
    "attention/delta2_effective_rank": Scale(
        forward=_log, inverse=_exp, floor=0.03, least=float(np.log(1.3))
    ),
    # Grows by half in 300 healthy steps (docs/demo.md), tenfold in 40 under a router fault.
    "router/centred_conditioning": Scale(
        forward=_log, inverse=_exp, floor=0.03, least=float(np.log(2.0))
    ),
    "router/weight_similarity": Scale(forward=_fisher, inverse=_tanh, floor=0.01, least=0.1),
}
_DEFAULT = Scale(forward=_log, inverse=_exp, floor=0.03, least=float(np.log(1.2)))


def scale_of(base_name: str) -> Scale:
    """Return the scale of a signal, named without its window."""
    return _BY_SIGNAL.get(base_name, _DEFAULT)
