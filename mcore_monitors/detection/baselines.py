"""The published rules on loss and gradient norm that the monitors have to beat.

========================  =======================================================================
``olmo_loss``             OLMo-core's skip-step rule on the loss: more than 6 standard deviations
                          from the mean of the 128 steps before it, on either side
``olmo_grad_norm``        the same on the gradient norm
``zclip_grad_norm``       ZClip (arXiv 2504.02507): z > 2.5 against moving averages (0.97) of mean
                          and variance, started from the first 25 steps; a spike enters the
                          averages clipped to mean + 2.5²/z × standard deviation
``megatron_spiky_loss``   Megatron-core's rerun machine: at least 10 × the largest of the first
                          100 losses
========================  =======================================================================

The rules are read from their authors' code: OLMo-core ``optim/skip_step_optimizer.py`` (unbiased
standard deviation, at work from the 64th step on, a skipped step stays in the window), ZClip
``zclip/zclip.py`` (``zscore`` mode, ``adaptive_scaling``, no fixed maximum), Megatron-core
``core/rerun_state_machine.py`` (``is_unexpectedly_large``) with the factor of ``pretrain_gpt.py``.
Steps whose value is unknown or not finite are passed over by every rule: a history cannot tell one
from the other.

As published, these rules clip or skip single steps, and some fire in healthy runs too (ZClip on
several steps in a hundred). :func:`scan` says where they fire; :func:`first_alarm` reads that as an
alarm: the rule fires more densely than it ever did while the run was healthy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

_OLMO_WINDOW, _OLMO_SIGMA = 128, 6.0
#: OLMo-core waits until this many values, the latest included, are there.
_OLMO_LEAST = max(20, _OLMO_WINDOW // 2)
_ZCLIP_KEEP, _ZCLIP_Z, _ZCLIP_WARMUP, _ZCLIP_EPS = 0.97, 2.5, 25, 1e-6
_SPIKY_FACTOR, _SPIKY_SAMPLES = 10.0, 100
#: Rows of a windowed view that are worked on at a time: bounds the memory of a long history.
_CHUNK = 8192

#: Rule names, in the order of tables.
RULES = ("olmo_loss", "olmo_grad_norm", "zclip_grad_norm", "megatron_spiky_loss")


def _finite(values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite values and their positions."""
    column = np.array([math.nan if value is None else value for value in values], dtype=float)
    where = np.flatnonzero(np.isfinite(column))
    return column[where], where


def _sigmas(latest: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    # In a constant window (std 0) the same value again is no deviation and any other is infinite.
    away = np.abs(latest - mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away > 0, away / std, 0.0)


def _olmo(values: np.ndarray) -> np.ndarray:
    """Return [n]: standard deviations from the mean of the window before each step."""
    strength = np.zeros(len(values))
    for i in range(_OLMO_LEAST - 1, min(_OLMO_WINDOW, len(values))):
        before = values[:i]
        strength[i] = _sigmas(values[i], before.mean(), before.std(ddof=1))
    if len(values) > _OLMO_WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(values, _OLMO_WINDOW)[:-1]
        for start in range(0, len(windows), _CHUNK):
            rows = windows[start : start + _CHUNK]
            steps = slice(_OLMO_WINDOW + start, _OLMO_WINDOW + start + len(rows))
            strength[steps] = _sigmas(values[steps], rows.mean(axis=1), rows.std(axis=1, ddof=1))
    return strength


def _zclip(values: np.ndarray) -> np.ndarray:
    """Return [n]: ZClip's z of each step; zero while it warms up."""
    strength = np.zeros(len(values))
    if len(values) <= _ZCLIP_WARMUP:
        return strength
    mean = float(values[:_ZCLIP_WARMUP].mean())
    variance = float(values[:_ZCLIP_WARMUP].var())
    for i, norm in enumerate(values[_ZCLIP_WARMUP:].tolist(), start=_ZCLIP_WARMUP):
        std = math.sqrt(variance)
        strength[i] = z = (norm - mean) / (std + _ZCLIP_EPS)
        if z > _ZCLIP_Z:
            norm = mean + _ZCLIP_Z**2 / z * std
        mean = _ZCLIP_KEEP * mean + (1.0 - _ZCLIP_KEEP) * norm
        variance = _ZCLIP_KEEP * variance + (1.0 - _ZCLIP_KEEP) * (norm - mean) ** 2
    return strength


def _spiky(values: np.ndarray) -> np.ndarray:
    """Return [n]: each loss over the largest of the first hundred; zero for those."""
    strength = np.zeros(len(values))
    if len(values) > _SPIKY_SAMPLES:
        largest = max(float(np.abs(values[:_SPIKY_SAMPLES]).max()), np.finfo(float).tiny)
        strength[_SPIKY_SAMPLES:] = np.abs(values[_SPIKY_SAMPLES:]) / largest
    return strength


def scan(
    loss: Sequence[float | None], grad_norm: Sequence[float | None], first_iteration: int = 1
) -> dict[str, list[int]]:
    """Return, for each rule of :data:`RULES`, the iterations at which it fires.

    Args:
        loss: training loss, one a step without gaps; None where unknown.
        grad_norm: global gradient norm before clipping, likewise.
        first_iteration: iteration of the first entry of both.
    """
    losses, loss_at = _finite(loss)
    norms, norm_at = _finite(grad_norm)
    fires = {
        "olmo_loss": loss_at[_olmo(losses) > _OLMO_SIGMA],
        "olmo_grad_norm": norm_at[_olmo(norms) > _OLMO_SIGMA],
        "zclip_grad_norm": norm_at[_zclip(norms) > _ZCLIP_Z],
        "megatron_spiky_loss": loss_at[_spiky(losses) >= _SPIKY_FACTOR],
    }
    return {rule: [first_iteration + int(i) for i in fires[rule]] for rule in RULES}


def first_alarm(
    fires: Sequence[int], since: int, healthy: Iterable[int], *, span: int = 50
) -> int | None:
    """Return the first iteration at which a rule fires more densely than in health, or None.

    A rule that never fired in health alarms at its first firing; one that fired up to n times in
    ``span`` iterations alarms when it has fired n + 1 times in the last ``span``.

    Args:
        fires: iterations at which the rule fires, ascending.
        since: iterations up to this one cannot be alarms (the injection of a fault); firings there
            do not count either.
        healthy: iterations at which the rule fires in health, after the warm-up: those of the same
            run before ``since``, or those of a run without the fault.
        span: iterations over which firings are counted.
    """

    def count(column: list[int], at: int) -> int:
        return bisect_right(column, at) - bisect_right(column, at - span)

    calm = sorted(healthy)
    most = max((count(calm, at) for at in calm), default=0)
    late = [at for at in fires if at > since]
    return next((at for at in late if count(late, at) > most), None)
