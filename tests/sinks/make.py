"""Small samples and events for the tests of sinks and report."""

from __future__ import annotations

import math
from typing import Any

from mcore_monitors.sample import Sample


def sample(iteration: int, attempt: int = 0, **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "iteration": iteration,
        "attempt": attempt,
        "time": 1000.0 + iteration / 10 + 1000 * attempt,
        "consumed_samples": 8 * iteration,
        "first_step": iteration - 9,
        "loss": [2.0 - iteration / 1000] * 10,
        "grad_norm": [1.0] * 9 + [1.5],
        "learning_rate": 1e-3,
        "signals": {
            "attention/key_shift": {1: [1e-7, 2e-7], 2: [1.5e-7, math.nan]},
            "attention/delta2_effective_rank@50": {1: [5.0, 4.0, 6.0, 7.0], 2: [8.0] * 4},
            "router/routing_entropy": {1: [1.9], 2: [1.7]},
        },
        "cost_seconds": 0.01,
    }
    return Sample(**{**values, **fields})


def alarm(iteration: int, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": "alarm",
        "iteration": iteration,
        "attempt": attempt,
        "signal": "attention/key_shift",
        "layer": 2,
        "unit": 1,
        "onset_iteration": iteration - 10,
        "severity": "critical",
        "rule": "limit",
        "value": 5.2e-3,
        "limit": 1e-5,
        "evidence": "three samples above the limit",
    }
    return {**values, **fields}


def resume(from_iteration: int, attempt: int) -> dict[str, Any]:
    return {
        "kind": "resume",
        "iteration": from_iteration,
        "attempt": attempt,
        "from_iteration": from_iteration,
    }


def diagnosis(iteration: int, attempt: int = 0, **fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": "diagnosis",
        "iteration": iteration,
        "attempt": attempt,
        "cause": "attention_numerics",
        "confidence": 0.9,
        "severity": "critical",
        "onset_iteration": iteration - 10,
        "signals": ["attention/key_shift"],
        "sentence": "Layer 2 has broken the key-shift identity: its attention kernel is wrong.",
    }
    return {**values, **fields}
