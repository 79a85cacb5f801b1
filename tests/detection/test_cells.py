"""Signals and layers that are judged together are judged as each by itself would be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mcore_monitors.detection.band import BandRule
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.sample import Sample

RANK = "attention/delta2_effective_rank@50"
ENTROPY = "router/routing_entropy"
CONDITIONING = "router/centred_conditioning"
SIMILARITY = "router/weight_similarity"
UNITS = {1: 4, 2: 4, 3: 2, 4: 6}
CONFIG = DetectionConfig(warmup=0)


def history(missing: float, seed: int = 0) -> list[dict[str, dict[int, list[float]]]]:
    """Signals of 150 samples with faults in some layers; a share of the readings is missing."""
    generator = np.random.default_rng(seed)
    samples = []
    for t in range(150):
        ranks = {
            layer: list(10.0 * np.exp(0.05 * generator.standard_normal(units)))
            for layer, units in UNITS.items()
        }
        entropy = {layer: [float(np.exp(0.05 * generator.standard_normal()))] for layer in UNITS}
        if 60 <= t < 110:
            ranks[2] = [x / 3 for x in ranks[2]]
            ranks[4][1] /= 4
            entropy[3][0] /= 2
        if t >= 100:  # another model's units
            ranks[1] = ranks[1][:3]
        if generator.random() < missing:
            ranks.pop(int(generator.integers(1, 5)))
        if generator.random() < missing:
            entropy.pop(int(generator.integers(1, 5)))
        if generator.random() < missing:
            ranks[4][0] = float("nan") if 4 in ranks else ranks.setdefault(4, [1.0] * 6)[0]
        # watched on the same sides, on other scales and with other least deviations
        others = {
            CONDITIONING: {k: [3 * x for x in v] for k, v in entropy.items()},
            SIMILARITY: {k: [x - 1 for x in v] for k, v in entropy.items()},
        }
        if generator.random() < missing:
            others.pop(CONDITIONING)
        samples.append({RANK: ranks, ENTROPY: entropy, CONDITIONING: {}, SIMILARITY: {}} | others)
    return samples


def sample(t: int, signals: dict[str, Any]) -> Sample:
    return Sample(
        iteration=10 * (t + 1), attempt=0, time=0.0, consumed_samples=0, first_step=1,
        loss=[], grad_norm=[], learning_rate=1e-3 if t < 130 else 1e-4, signals=signals,
    )  # fmt: skip


def course(rule: BandRule, signals: list[dict[str, Any]]) -> list[tuple[list, list]]:
    """New and active alarms of every sample, as sorted events."""
    told = []
    for t, one in enumerate(signals):
        new = rule.update(sample(t, one))
        told.append(tuple(sorted(map(str, alarms)) for alarms in (new, rule.active())))
    return told


@pytest.mark.parametrize("missing", [0.0, 0.1, 0.6])
def test_layers_together_are_as_layers_alone(missing: float) -> None:
    signals = history(missing)
    together = course(BandRule(CONFIG), signals)
    alone = [
        course(
            BandRule(CONFIG),
            [{name: {k: v for k, v in s[name].items() if k == layer}} for s in signals],
        )
        for layer in UNITS
        for name in (RANK, ENTROPY, CONDITIONING, SIMILARITY)
    ]
    for t, (new, active) in enumerate(together):
        assert new == sorted(x for one in alone for x in one[t][0]), t
        assert active == sorted(x for one in alone for x in one[t][1]), t
    raised = {alarm.split("layer=")[1][0] for new, _ in together for alarm in new}
    assert {"2", "3", "4"} <= raised
