"""The limit of each conservation residual in a run, from the formats and sizes of its model."""

from __future__ import annotations

import math

import torch

from ...catalogue.conservation import BIASES
from ...signals.conservation import floor, limit
from ...views import ModelView
from .evidence import WINDOWS

_RESIDUAL = {
    "attention/key_shift": "key_shift",
    "attention/value_output": "value_output",
    "attention/query_key": "query_key",
    "router/shift": "router_shift",
    "output/vocabulary_shift": "vocabulary_shift",
    "norm/scale": "norm_scale",
    "norm/shift": "norm_shift",
}
#: false alarms of all directions of a run together, a sample
LEVEL = 1e-5
#: a bias counts from this part of the floor on
LEAST_BIAS = 0.25
#: what rounding may leave of query–key (root mean square), as a part of the limit: 1.25 floors
SPREAD = 0.25
#: where a host does not say how many channels are summed over
_CHANNELS = 64


def residual_limits(model: ModelView) -> dict[str, float]:
    """Signal to limit, the same on every rank; empty where the sequence length is not known.

    The limits of evidence are set by theory for all that is looked at in a sample together: at most
    one healthy sample in 10⁵ has evidence over it (an alarm takes two samples in a row).
    """
    if not model.sequence_length:
        return {}
    tf32 = model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    limits = {
        signal: limit(_RESIDUAL[signal], *_sizes(model, signal), tf32=tf32)
        for signal in model.conserved
    }
    windows = model.layers * len(WINDOWS)
    return limits | {
        "attention/key_shift_bias": math.log(windows * len(BIASES) / LEVEL),
        "attention/query_key_spread": math.log(windows * model.groups / LEVEL),
    }


def smallest_bias(model: ModelView) -> float:
    """Size of a mean key shift from which a bias counts; nothing where no limit is known."""
    if not model.sequence_length:
        return math.inf
    return LEAST_BIAS * floor("key_shift", *_sizes(model, "attention/key_shift"))


def largest_spread(model: ModelView) -> float:
    """Root mean square of query–key that rounding may leave; anything where no floor is known."""
    if not model.sequence_length:
        return math.inf
    return SPREAD * residual_limits(model)["attention/query_key"]


def _sizes(model: ModelView, signal: str) -> tuple[torch.dtype, int, int]:
    residual = model.conserved[signal]
    return residual.dtype, model.sequence_length, residual.channels or _CHANNELS
