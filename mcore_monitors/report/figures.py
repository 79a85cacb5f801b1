"""The figures of the page: the story of a run, a look at its rollback, every signal by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.report.curves import (
    band,
    fit_window,
    limit_line,
    limit_of,
    log_axis,
    marks,
    per_step,
    scale,
    window_line,
    x_axis,
)
from mcore_monitors.report.data import Run, readings, steps
from mcore_monitors.report.lanes import draw_lanes
from mcore_monitors.report.svg import drawing, inline

#: Layers of one signal that are drawn, those with alarms first.
LAYERS = 8
#: A closer look is drawn only where it shows less than this share of the run.
CLOSER = 0.6


def speaking_signal(run: Run) -> str | None:
    """Return the signal of the first alarm that could act, else of the first, else a residual."""
    groups = sorted(run.alarms, key=lambda g: (not g.critical, g.iteration))
    there = {name for sample in run.samples for name in sample.signals}
    for group in groups:
        if group.signal in there:
            return group.signal
    for name in sorted(there):
        info = SIGNALS.get(base_name(name))
        if info is not None and info.watch == "limit":
            return name
    return None


def closer_window(run: Run) -> tuple[float, float] | None:
    """Return the iterations of a closer look at the first rollback; None where it adds nothing."""
    for before, part in pairwise(run.parts):
        if part.attempt > before.attempt:
            alarm, back = before.samples[-1].iteration, part.samples[0].first_step - 1
            width = max(alarm - back, 20)
            window = (max(run.first_iteration, back - 0.4 * width), alarm + 0.9 * width)
            whole = run.last_iteration - run.first_iteration
            return window if window[1] - window[0] < CLOSER * whole else None
    return None


def draw_story(
    run: Run,
    others: Sequence[Run],
    *,
    wide: bool,
    window: tuple[float, float] | None = None,
) -> str:
    """Return the main figure as SVG: lanes of the course, loss, gradient norm, one signal.

    Args:
        run: the run.
        others: drawn thin behind.
        wide: for a desk; otherwise for a phone.
        window: first and last iteration of a closer look; None for the whole run.
    """
    signal = speaking_signal(run)
    heights = [0.75 + 0.36 * len(run.parts), 2.4, 1.7, *([1.8] if signal else [])]
    size = (10.4 if wide else 4.4, sum(heights) + 0.3 * len(heights))
    with drawing():
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        draw_lanes(rows[0], run, wide=wide, window=window)
        per_step(rows[1], run, others, "loss")
        rows[1].set_title("training loss (nats)")
        per_step(rows[2], run, others, "grad_norm")
        rows[2].set_title("gradient norm, log axis")
        norms = np.concatenate([steps(r.samples, "grad_norm")[1] for r in (run, *others)])
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if len(norms):
            log_axis(rows[2], norms.min(), norms.max())
        if signal:
            _speaking(rows[3], run, others, signal)
        for axes in rows[1:]:
            marks(axes, run)
        x_axis(rows[-1], run, others, 10 if wide else 5)
        if window:
            rows[-1].set_xlim(window)
            for axes in rows[1:3]:
                fit_window(axes, *window)
        rows[-1].set_xlabel("iteration")
        for axes in rows:
            axes.tick_params(length=0)
        label = "Course of the run, loss, gradient norm and the signal that spoke first"
        return inline(figure, f"story-{wide}-{window is None}", label)


def _speaking(axes: Axes, run: Run, others: Sequence[Run], signal: str) -> None:
    band(axes, run, others, signal, None)
    axes.set_title(f"{signal}, all layers")
    limit = limit_of(signal, (run, *others))
    scale(axes, _all_values(run, others, signal, limit), fit=False)
    limit_line(axes, limit)


def _all_values(run: Run, others: Sequence[Run], signal: str, limit: float | None) -> np.ndarray:
    courses = [r.samples for r in (run, *others)] + run.abandoned
    found = [readings(samples, signal)[1].ravel() for samples in courses]
    return np.concatenate([*found, np.array([np.nan if limit is None else limit])])


def layers_of(run: Run, signal: str) -> tuple[list[int], int]:
    """Return the layers to draw, at most :data:`LAYERS`, and how many there are."""
    there = sorted({n for s in run.samples for n in s.signals.get(signal, {})})
    loud = {n for g in run.alarms if g.signal == signal for n in g.layers}
    ranked = sorted(there, key=lambda n: (n not in loud, n))
    return sorted(ranked[:LAYERS]), len(there)


def draw_signal(
    run: Run, others: Sequence[Run], signal: str, layers: Sequence[int], name: str
) -> list[str]:
    """Return a signal as one SVG a layer: median line, and the band over heads or groups.

    All layers have one scale, so that they can be compared by eye.

    Args:
        name: begins the inner names of these figures, unlike any other's.
    """
    limit = limit_of(signal, (run, *others))
    values = _all_values(run, others, signal, limit)
    drawn = []
    for layer in layers:
        with drawing():
            figure = Figure(figsize=(5.0, 2.15), layout="constrained")
            axes = figure.subplots()
            band(axes, run, others, signal, layer)
            scale(axes, values, fit=True)
            limit_line(axes, limit)
            marks(axes, run, signal, layer)
            x_axis(axes, run, others, 6)
            axes.set_title(f"layer {layer}")
            axes.tick_params(length=0)
            drawn.append(inline(figure, f"{name}-{layer}", f"{signal} in layer {layer}"))
    return drawn


def draw_recorded(run: Run, signals: Sequence[str], name: str) -> str:
    """Return a signal that no rule judges as one SVG: its windows in one figure, all layers in one.

    Args:
        signals: the same signal over its windows, or the one signal without a window.
        name: begins the inner names of this figure, unlike any other's.
    """
    with drawing():
        # Fixed margins: there are many of these, and a layout to measure takes half their time.
        figure = Figure(figsize=(5.0, 1.9))
        figure.subplots_adjust(left=0.13, right=0.98, top=0.86, bottom=0.15)
        axes = figure.subplots()
        if len(signals) == 1:
            band(axes, run, (), signals[0], None)
        else:
            for order, signal in enumerate(signals):
                window_line(axes, run, signal, order)
        scale(axes, np.concatenate([_all_values(run, (), s, None) for s in signals]), fit=True)
        marks(axes, run)
        x_axis(axes, run, (), 6)
        axes.set_title(name_of(signals[0]))
        axes.tick_params(length=0)
        return inline(figure, name, f"{name_of(signals[0])}, all layers")


def name_of(signal: str) -> str:
    """A signal's name without its window, its part kept."""
    return signal.partition("@")[0]
