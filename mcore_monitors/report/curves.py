"""Draws a run: the story (course, loss, gradient norm, the signal that spoke) and every signal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from mcore_monitors.report.data import Run, readings, steps
from mcore_monitors.report.lanes import draw_lanes
from mcore_monitors.report.svg import INK, OTHERS, drawing, inline
from mcore_monitors.sample import SIGNALS, base_name

#: Steps over which loss and gradient norm are averaged for the thick line.
SMOOTH = 15
#: Points of one line; a longer run is thinned out, its extremes kept.
POINTS = 1600
#: Layers of one signal that are drawn, those with alarms first.
LAYERS = 8
#: A signal is drawn on a log axis when its values span more than this.
SPAN = 30.0


def smooth(values: np.ndarray, width: int = SMOOTH) -> np.ndarray:
    """Return the centred moving mean of values [N] -> [N]; unknown values are passed over."""
    known = np.isfinite(values)
    kernel = np.ones(min(width, max(1, len(values))))
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known & (count > 0), total / np.maximum(count, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about ``points`` of the points; of every bin the lowest and the highest."""
    if len(x) <= points:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), points // 2):
        known = part[np.isfinite(y[part])]
        if len(known):
            keep |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
    index = sorted(keep)
    return x[index], y[index]


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **style) -> None:
    axes.plot(*thin(x, y), color=INK[colour], **style)


def _per_step(axes: Axes, run: Run, others: Sequence[Run], column: str) -> None:
    for index, other in enumerate(others):
        x, y = steps(other.samples, column)
        _line(axes, x, smooth(y), OTHERS[index % len(OTHERS)], linewidth=1.1, zorder=2)
    x, y = steps(run.samples, column)
    _line(axes, x, y, "main", linewidth=0.6, alpha=0.3, zorder=3)
    _line(axes, x, smooth(y), "main", linewidth=1.8, zorder=5)
    for left in run.abandoned:
        x, y = steps(left, column)
        _line(axes, x, y, "left", linewidth=0.6, alpha=0.5, zorder=3)
        _line(axes, x, smooth(y), "left", linewidth=1.5, linestyle=(0, (4, 2)), zorder=4)


def _rows(values: np.ndarray, function: str) -> np.ndarray:
    with warnings.catch_warnings():
        # A sample may have no finite value at all; then the line has a gap there.
        warnings.simplefilter("ignore", RuntimeWarning)
        return getattr(np, function)(values, axis=1)


def _band(axes: Axes, run: Run, others: Sequence[Run], signal: str, layer: int | None) -> None:
    for index, other in enumerate(others):
        x, values = readings(other.samples, signal, layer)
        colour = OTHERS[index % len(OTHERS)]
        _line(axes, x, _rows(values, "nanmedian"), colour, linewidth=1.0, zorder=2)
    x, values = readings(run.samples, signal, layer)
    if values.shape[1] > 1:
        low, high = _rows(values, "nanmin"), _rows(values, "nanmax")
        each = slice(None, None, max(1, len(x) // POINTS))
        band = {"color": INK["main"], "alpha": 0.22, "linewidth": 0, "zorder": 3}
        axes.fill_between(x[each], low[each], high[each], **band)
        _line(axes, x, low, "main", linewidth=0.7, alpha=0.8, zorder=4)
    _line(axes, x, _rows(values, "nanmedian"), "main", linewidth=1.7, zorder=5)
    for left in run.abandoned:
        x, values = readings(left, signal, layer)
        middle = _rows(values, "nanmedian")
        _line(axes, x, middle, "left", linewidth=1.5, linestyle=(0, (4, 2)), zorder=4)


def _scale(axes: Axes, *arrays: np.ndarray) -> None:
    """Log axis where all values are positive and far apart; loss and entropy stay linear."""
    values = np.concatenate([a.ravel() for a in arrays]) if arrays else np.array([])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > SPAN:
        log_axis(axes, values.min(), values.max())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


def log_axis(axes: Axes, low: float, high: float) -> None:
    """Give an axis whole powers of ten, or 1-2-5 where less than two of them would be there.

    Labels are plain text ("1e-5"): superscripts are lost in an SVG that keeps its text.
    """
    axes.set_yscale("log")
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    stride = max(1, (last - first) // 4)
    ticks = [10.0**k for k in range(first, last + 1, stride)]
    if sum(low <= t <= high for t in ticks) < 2:
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{t:.3g}".replace("e-0", "e-") for t in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())


def limit_of(signal: str, runs: Sequence[Run]) -> float | None:
    """Return the fixed limit of a signal, as an alarm of any of these runs recorded it."""
    for run in runs:
        for group in run.alarms:
            limit = group.worst.get("limit")
            if group.signal == signal and isinstance(limit, (int, float)) and limit > 0:
                return float(limit)
    return None


def _marks(axes: Axes, run: Run, signal: str | None = None, layer: int | None = None) -> None:
    """Vertical marks: injection, critical alarms with their onset, warnings softer."""
    for at in {d["from_iteration"] for d in run.drills}:
        if at <= run.last_iteration:
            axes.axvline(at, color=INK["drill"], linewidth=1.3, linestyle=(0, (5, 2)), zorder=6)
    for group in run.alarms:
        if signal is not None and (group.signal != signal or layer not in (None, *group.layers)):
            continue
        if group.critical:
            axes.axvspan(group.onset, group.iteration, color=INK["alarm"], alpha=0.14, linewidth=0)
            axes.axvline(group.iteration, color=INK["alarm"], linewidth=1.3, zorder=6)
        elif signal is not None:
            style = {"linewidth": 1.1, "linestyle": (0, (1, 2))}
            axes.axvline(group.iteration, color=INK["warn"], zorder=6, **style)


def _x_axis(axes: Axes, run: Run, others: Sequence[Run], ticks: int) -> None:
    runs = (run, *others)
    first, last = min(r.first_iteration for r in runs), max(r.last_iteration for r in runs)
    axes.set_xlim(first - 1, last + max(1, 0.01 * (last - first)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def _limit_line(axes: Axes, limit: float | None) -> None:
    if limit is not None:
        axes.axhline(limit, color=INK["alarm"], linewidth=1.0, linestyle=(0, (2, 2)), zorder=4)
        axes.annotate(
            f"limit {limit:.0e}".replace("e-0", "e-"),
            (0.005, limit),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=INK["alarm"],
            fontsize=9.5,
        )


def speaking_signal(run: Run) -> str | None:
    """Return the signal of the first alarm that could act, else of the first, else a residual."""
    groups = sorted(run.alarms, key=lambda g: (not g.critical, g.iteration))
    there = {name for sample in run.samples for name in sample.signals}
    for group in groups:
        if group.signal in there:
            return group.signal
    return next((n for n in sorted(there) if _info(n, "watch") == "limit"), None)


def _info(signal: str, field: str) -> str | None:
    info = SIGNALS.get(base_name(signal))
    return getattr(info, field) if info else None


def draw_story(run: Run, others: Sequence[Run], *, wide: bool) -> str:
    """Return the main figure as SVG: lanes of the course, loss, gradient norm, one signal.

    Args:
        wide: for a desk; otherwise for a phone.
    """
    signal = speaking_signal(run)
    lanes = 0.9 + 0.34 * len(run.parts)
    heights = [lanes, 2.5, 1.7, *([1.8] if signal else [])]
    width = 10.4 if wide else 4.4
    with drawing():
        figure = Figure(figsize=(width, sum(heights) + 0.4 * len(heights)), layout="constrained")
        rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        draw_lanes(rows[0], run, wide=wide)
        _per_step(rows[1], run, others, "loss")
        rows[1].set_title("training loss (nats)")
        _per_step(rows[2], run, others, "grad_norm")
        rows[2].set_title("gradient norm, log axis")
        norms = steps(run.samples, "grad_norm")[1]
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if len(norms):
            log_axis(rows[2], *rows[2].get_ylim() if rows[2].get_ylim()[0] > 0 else
                     (norms.min(), norms.max()))
        if signal:
            _band(rows[3], run, others, signal, None)
            rows[3].set_title(f"{signal}, all layers")
            limit = limit_of(signal, (run, *others))
            spread = [readings(r.samples, signal)[1] for r in (run, *others)]
            spread += [readings(left, signal)[1] for left in run.abandoned]
            _scale(rows[3], *spread, np.array([limit or np.nan]))
            _limit_line(rows[3], limit)
        for axes in rows[1:]:
            _marks(axes, run)
        _x_axis(rows[-1], run, others, 10 if wide else 5)
        rows[-1].set_xlabel("iteration")
        for axes in rows:
            axes.tick_params(length=0)
        label = "Course of the run, loss, gradient norm and the signal that raised the alarm"
        return inline(figure, f"story-{wide}", label)


def layers_of(run: Run, signal: str) -> tuple[list[int], int]:
    """Return the layers to draw, at most :data:`LAYERS`, and how many there are."""
    there = sorted({n for s in run.samples for n in s.signals.get(signal, {})})
    loud = {n for g in run.alarms if g.signal == signal for n in g.layers}
    ranked = sorted(there, key=lambda n: (n not in loud, n))
    return sorted(ranked[:LAYERS]), len(there)


def draw_signal(run: Run, others: Sequence[Run], signal: str, layer: int, name: str) -> str:
    """Return one layer's course of a signal as SVG: median line and the band over its units."""
    with drawing():
        figure = Figure(figsize=(5.0, 2.15), layout="constrained")
        axes = figure.subplots()
        _band(axes, run, others, signal, layer)
        limit = limit_of(signal, (run, *others))
        # One scale for all layers of a signal, so that they can be compared by eye.
        spread = [readings(r.samples, signal)[1] for r in (run, *others)]
        spread += [readings(left, signal)[1] for left in run.abandoned]
        _scale(axes, *spread, np.array([limit or np.nan]))
        values = np.concatenate([a.ravel() for a in spread] + [np.array([limit or np.nan])])
        values = values[np.isfinite(values)]
        if len(values) and values.max() > values.min():
            log = axes.get_yscale() == "log"
            low, high = (np.log10((values.min(), values.max())) if log
                         else (values.min(), values.max()))
            pad = 0.05 * (high - low)
            bounds = np.array((low - pad, high + pad))
            axes.set_ylim(*(10**bounds if log else bounds))
        _limit_line(axes, limit)
        _marks(axes, run, signal, layer)
        _x_axis(axes, run, others, 6)
        axes.set_title(f"layer {layer}")
        axes.tick_params(length=0)
        return inline(figure, name, f"{signal} in layer {layer}")
