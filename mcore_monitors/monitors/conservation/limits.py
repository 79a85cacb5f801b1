"""The limit of each conservation residual in a run, from the formats and sizes of its model."""

from __future__ import annotations

import torch

from ...signals.conservation import direction_energy_limit, limit
from ...views import ATTENTION_RESIDUALS, ModelView

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
_LEVEL = 1e-5


def residual_limits(model: ModelView) -> dict[str, float]:
    """Signal to limit, the same on every rank; empty where the sequence length is not known.

    The limit of a direction's energy ratio is set by theory for all cells of the run together: at
    most one healthy sample in 10⁵ has one over it (an alarm takes two samples in a row).
    """
    if not model.sequence_length:
        return {}
    tf32 = model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    limits = {
        signal: limit(
            _RESIDUAL[signal],
            residual.dtype,
            model.sequence_length,
            residual.channels or 64,
            tf32=tf32,
        )
        for signal, residual in model.conserved.items()
    }
    cells = model.layers * sum(model.conserved[name].units for name in ATTENTION_RESIDUALS)
    energy = direction_energy_limit(_LEVEL / cells)
    return limits | {f"{name}_bias": energy for name in ATTENTION_RESIDUALS}
