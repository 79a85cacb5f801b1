"""Synthetic histories: healthy courses that drift as real ones do, and faults laid over them."""

from __future__ import annotations

import numpy as np

from mcore_monitors.sample import Sample

INTERVAL = 10
HEADS = 4
LAYERS = (1, 2)
RANK = "attention/delta2_effective_rank@50"
SHIFT = "attention/key_shift"
SIMILARITY = "router/weight_similarity"
CONDITIONING = "router/centred_conditioning"
ENTROPY = "router/routing_entropy"


def overlapping_noise(generator: np.random.Generator, n: int, sigma: float) -> np.ndarray:
    """Return [n] noise correlated over five samples, as readings over overlapping windows are."""
    white = generator.normal(size=n + 4)
    return sigma * np.convolve(white, np.ones(5), mode="valid") / np.sqrt(5.0)


def healthy(seed: int, samples: int = 150) -> list[Sample]:
    """Return a healthy run with the levels, drifts and noise seen in small real trainings.

    Effective ranks rise twofold; routing entropy falls by a third, similarity sinks towards its
    floor and conditioning doubles, all of them fastest at the start.
    """
    generator = np.random.default_rng(seed)
    progress = np.arange(1, samples + 1) / 150.0
    grown = 1.0 - np.exp(-3.0 * progress)
    columns: dict[str, dict[int, np.ndarray]] = {}
    for layer in LAYERS:
        heads = [
            3.5 * (1.0 + grown) * np.exp(overlapping_noise(generator, samples, 0.12))
            for _ in range(HEADS)
        ]
        shift = [5e-8 * np.exp(generator.normal(0.0, 0.25, samples)) for _ in range(HEADS)]
        columns.setdefault(RANK, {})[layer] = np.array(heads)
        columns.setdefault(SHIFT, {})[layer] = np.array(shift)
        speed = generator.uniform(0.2, 1.0)
        for name, course in (
            (SIMILARITY, 0.03 - 0.14 * speed * grown + generator.normal(0.0, 0.001, samples)),
            (
                CONDITIONING,
                (2.6 + 6.0 * speed * grown) * np.exp(generator.normal(0, 0.01, samples)),
            ),
            (ENTROPY, (2.07 - 0.9 * speed * grown) * np.exp(generator.normal(0, 0.015, samples))),
        ):
            columns.setdefault(name, {})[layer] = course[None]
    return [
        Sample(
            iteration=INTERVAL * (i + 1),
            attempt=0,
            time=float(i),
            consumed_samples=8 * INTERVAL * (i + 1),
            first_step=INTERVAL * i + 1,
            loss=[2.0] * INTERVAL,
            grad_norm=[1.0] * INTERVAL,
            learning_rate=1e-3,
            signals={
                name: {layer: values[:, i].tolist() for layer, values in layers.items()}
                for name, layers in columns.items()
            },
        )
        for i in range(samples)
    ]


def collapse(run: list[Sample], start: int, head: int = 2, layer: int = 2) -> list[Sample]:
    """Let one head's effective rank fall to a quarter within five samples after ``start``."""
    for sample in run:
        if sample.iteration > start:
            depth = min(1.0, (sample.iteration - start) / (5 * INTERVAL))
            sample.signals[RANK][layer][head] /= 1.0 + 3.0 * depth
    return run


def break_router(run: list[Sample], start: int) -> list[Sample]:
    """Give the router a learning rate thirty times too large after ``start``."""
    for sample in run:
        if sample.iteration > start:
            depth = min(1.0, (sample.iteration - start) / (4 * INTERVAL))
            for layer in LAYERS:
                sample.signals[ENTROPY][layer][0] *= 1.0 - 0.7 * depth
                sample.signals[CONDITIONING][layer][0] *= 1.0 + 1.5 * depth
    return run


def break_kernel(run: list[Sample], start: int, value: float = 3e-3) -> list[Sample]:
    """Let the key-shift residual of every head jump to ``value`` after ``start``."""
    for sample in run:
        if sample.iteration > start:
            for layer in LAYERS:
                sample.signals[SHIFT][layer] = [value] * HEADS
    return run


def declined(seed: int, samples: int = 150) -> list[Sample]:
    """A healthy run whose effective ranks sink by a fifth after the warm-up and wander from there.

    Sinking as ranks do while a model leaves its first plateau; the wandering, ±5% over thirty
    samples, is common to the heads of a layer.
    """
    generator = np.random.default_rng(seed)
    run = healthy(seed, samples)
    at = np.arange(samples)
    sunk = 0.25 * np.clip((at - 22) / 15, 0.0, 1.0)
    course = np.log(5.0) - sunk + 0.05 * np.sin(2 * np.pi * (at - 37) / 30)
    for layer in LAYERS:
        heads = [np.exp(course + overlapping_noise(generator, samples, 0.12)) for _ in range(HEADS)]
        for i, sample in enumerate(run):
            sample.signals[RANK][layer] = [float(head[i]) for head in heads]
    return run
