"""Which runs the study consists of, and in which order."""

from __future__ import annotations

import random

from .model import ARCHITECTURES
from .one_run import Run

#: Learning rates over the edge of stability of every architecture.
LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04)
INIT_SCALES = (0.5, 1.0, 2.0)
LAYERS = (4, 8)


def study() -> list[Run]:
    """216 runs: six architectures × two depths × three initial scales × six learning rates.

    Each has a seed of its own. The order is shuffled once and for all, so that a study that was
    broken off is a fair sample of the whole.
    """
    cells = [
        (architecture, layers, scale, rate)
        for architecture in ARCHITECTURES
        for layers in LAYERS
        for scale in INIT_SCALES
        for rate in LEARNING_RATES
    ]
    runs = [
        Run(
            architecture=architecture,
            layers=layers,
            init_scale=scale,
            learning_rate=rate,
            seed=seed,
        )
        for seed, (architecture, layers, scale, rate) in enumerate(cells)
    ]
    random.Random(0).shuffle(runs)
    return runs
