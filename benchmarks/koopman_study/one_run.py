"""One run: profile at initialization, train, say whether and when it diverged."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mcore_monitors.config import KssConfig
from mcore_monitors.hosts.kss import Shaping
from mcore_monitors.monitors.base import StepState
from mcore_monitors.signals.koopman import profile

from . import task
from .model import Model, Sizes

#: The paper's label: diverged when, at any step, the loss or the gradient norm is above these.
LOSS_LIMIT, NORM_LIMIT = 50.0, 500.0
WARMUP = 100
PROFILE_SEQUENCES = 32
#: A loss spike: above the mean by six standard deviations of the last 32 steps.
SPIKE_WINDOW, SPIKE_SIGMA = 32, 6.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One unit of work."""

    architecture: str
    layers: int
    learning_rate: float
    init_scale: float
    seed: int
    hidden: int = 128
    steps: int = 300
    batch: int = 16
    clip: float | None = None
    final_norm: bool = False

    @property
    def key(self) -> str:
        """Name of the run; two runs with one name are the same run."""
        return "/".join(str(value) for value in dataclasses.astuple(self))


def profile_features(model: Model, tokens: torch.Tensor) -> dict[str, float]:
    """Every feature's mean, largest, smallest and standard deviation over the layers."""
    with torch.no_grad():
        states = torch.stack([s.flatten(0, 1) for s in model.stream(tokens)])
    found = profile(states[:-1], states[1:])
    row = {}
    for name, values in found._asdict().items():
        numbers = values.tolist()
        row |= {
            f"{name}_mean": statistics.fmean(numbers),
            f"{name}_max": max(numbers),
            f"{name}_min": min(numbers),
            f"{name}_std": statistics.pstdev(numbers),
        }
    return row


def carry_out(
    run: Run, kss: KssConfig | None = None, *, profiled: bool = True
) -> dict[str, Any]:
    """Train one model, shaped or not, and return everything that the study records about it."""
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(10_000 + run.seed)
    sizes = Sizes(
        architecture=run.architecture,
        layers=run.layers,
        hidden=run.hidden,
        init_scale=run.init_scale,
        final_norm=run.final_norm,
    )
    model = Model(sizes)
    tokens, _ = task.batch(PROFILE_SEQUENCES, torch.Generator().manual_seed(run.seed))
    row: dict[str, Any] = dataclasses.asdict(run)
    if profiled:
        row |= profile_features(model, tokens)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    step_state = StepState()
    if kss is not None:
        shaping = Shaping(
            kss, range(run.layers), step_state, torch.device("cpu"), scale=lambda _: 1.0
        )
        for layer, block in enumerate(model.blocks):
            shaping.attach(layer, block, run.hidden)
    losses: list[float] = []
    norms: list[float] = []
    diverged_at = None
    for step in range(1, run.steps + 1):
        step_state.iteration = step
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * min(1.0, step / WARMUP)
        tokens, answers = task.batch(run.batch, generator)
        loss = F.cross_entropy(model(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        limit = math.inf if run.clip is None else run.clip
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        losses.append(loss.item())
        norms.append(norm)
        # not "above": a NaN is above nothing
        if not (losses[-1] <= LOSS_LIMIT and norm <= NORM_LIMIT):
            diverged_at = step
            break
        optimizer.step()
    return row | {
        "key": run.key,
        "diverged_at": diverged_at,
        "first_loss": losses[0],
        "first_norm": norms[0],
        "last_loss": statistics.fmean(losses[-20:]),
        "largest_norm": max(norms),
        "loss_spikes": _spikes(losses),
        "loss_spikes_warmup": _spikes(losses[:WARMUP]),
        "steps_done": len(losses),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _spikes(losses: list[float]) -> int:
    count = 0
    for i in range(SPIKE_WINDOW, len(losses)):
        window = losses[i - SPIKE_WINDOW : i]
        count += losses[i] > statistics.fmean(window) + SPIKE_SIGMA * statistics.pstdev(window)
    return count
