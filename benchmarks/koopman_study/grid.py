"""Which runs the study consists of, and in which order."""

from __future__ import annotations

import random

from .model import ARCHITECTURES, HAVE_FINAL_NORM
from .one_run import Run

#: Learning rates over the edge of stability of every architecture.
LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04)
INIT_SCALES = (0.5, 1.0, 2.0)
LAYERS = (4, 8)


def study() -> list[Run]:
    """252 runs, each with a seed of its own.

    216 without a final norm: six architectures × two depths × three initial scales × six learning
    rates. A norm before the head bounds the logits, so that with it only No-Norm diverges by the
    paper's label and nothing could be said within an architecture. The paper's setting, GPT-2's,
    has it: 36 runs at initial scale 1 of the three architectures that it changes; with the runs
    of the others at that scale they make its 72.

    The order is shuffled once and for all, so that a study that was broken off is a fair sample of
    the whole.
    """
    cells = [
        (architecture, layers, scale, rate, False)
        for architecture in ARCHITECTURES
        for layers in LAYERS
        for scale in INIT_SCALES
        for rate in LEARNING_RATES
    ] + [
        (architecture, layers, 1.0, rate, True)
        for architecture in HAVE_FINAL_NORM
        for layers in LAYERS
        for rate in LEARNING_RATES
    ]
    runs = [
        Run(
            architecture=architecture,
            layers=layers,
            init_scale=scale,
            learning_rate=rate,
            final_norm=final_norm,
            seed=seed,
        )
        for seed, (architecture, layers, scale, rate, final_norm) in enumerate(cells)
    ]
    random.Random(0).shuffle(runs)
    return runs
