"""Strokes that every figure of the page is made of: lines, bands, marks, axes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from mcore_monitors.report.data import Run, readings, steps
from mcore_monitors.report.svg import INK, OTHERS

#: Steps over which the thick line of loss and gradient norm is smoothed.
SMOOTH = 15
#: Points of one line; a longer run is thinned out, its extremes kept.
POINTS = 1600
#: A signal is drawn on a log axis when its values span more than this.
SPAN = 30.0


def smooth(values: np.ndarray, width: int = SMOOTH) -> np.ndarray:
    """Return the centred running median, its steps averaged out: values [N] -> [N].

    A single spike does not move it. Unknown values stay unknown, and their neighbours ignore them.
    """
    if len(values) == 0:
        return values
    smoothed = values
    for function, half in (("nanmedian", width // 2), ("nanmean", width // 4)):
        padded = np.pad(smoothed, half, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
        smoothed = np.where(np.isfinite(values), _rows(windows, function), np.nan)
    return smoothed


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


def line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **style) -> None:
    """Draw values [N] over iterations [N]."""
    axes.plot(*thin(x, y), color=INK[colour], **style)


def per_step(axes: Axes, run: Run, others: Sequence[Run], column: str) -> None:
    """Draw ``loss`` or ``grad_norm``: every step faint, the smoothed course strong."""
    for index, other in enumerate(others):
        x, y = steps(other.samples, column)
        line(axes, x, smooth(y), OTHERS[index % len(OTHERS)], linewidth=1.1, zorder=2)
    x, y = steps(run.samples, column)
    line(axes, x, y, "main", linewidth=0.6, alpha=0.3, zorder=3)
    line(axes, x, smooth(y), "main", linewidth=1.8, zorder=5)
    for left in run.abandoned:
        x, y = steps(left, column)
        line(axes, x, y, "left", linewidth=0.6, alpha=0.5, zorder=3)
        line(axes, x, smooth(y), "left", linewidth=1.5, linestyle=(0, (3, 2)), zorder=6)


def _rows(values: np.ndarray, function: str) -> np.ndarray:
    with warnings.catch_warnings():
        # A sample may have no finite value at all; then the line has a gap there.
        warnings.simplefilter("ignore", RuntimeWarning)
        return getattr(np, function)(values, axis=1)


def band(axes: Axes, run: Run, others: Sequence[Run], signal: str, layer: int | None) -> None:
    """Draw a signal over the heads or groups of one layer, or of all: median and range."""
    for index, other in enumerate(others):
        x, values = readings(other.samples, signal, layer)
        colour = OTHERS[index % len(OTHERS)]
        line(axes, x, _rows(values, "nanmedian"), colour, linewidth=1.0, zorder=2)
    x, values = readings(run.samples, signal, layer)
    if values.shape[1] > 1:
        low, high = _rows(values, "nanmin"), _rows(values, "nanmax")
        each = slice(None, None, max(1, len(x) // POINTS))
        shade = {"color": INK["main"], "alpha": 0.22, "linewidth": 0, "zorder": 3}
        axes.fill_between(x[each], low[each], high[each], **shade)
        line(axes, x, low, "main", linewidth=0.6, alpha=0.7, zorder=4)
        line(axes, x, high, "main", linewidth=0.6, alpha=0.7, zorder=4)
    line(axes, x, _rows(values, "nanmedian"), "main", linewidth=1.7, zorder=5)
    for left in run.abandoned:
        x, values = readings(left, signal, layer)
        middle = _rows(values, "nanmedian")
        line(axes, x, middle, "left", linewidth=1.5, linestyle=(0, (3, 2)), zorder=6)


#: Colours of a signal's windows, from the shortest on.
WINDOWS = ("other0", "main", "other1", "other2")


def window_line(axes: Axes, run: Run, signal: str, order: int) -> None:
    """Draw the median over all layers and units of one window, with the window's length on it.

    Args:
        order: place of the window among those in the figure.
    """
    x, values = readings(run.samples, signal)
    middle, colour = _rows(values, "nanmedian"), WINDOWS[order % len(WINDOWS)]
    line(axes, x, middle, colour, linewidth=1.5, zorder=4 + order)
    known = np.flatnonzero(np.isfinite(middle))
    if len(known):
        # each at a place of its own, so that lines that run together keep their names apart
        place = known[min(len(known) - 1, int(len(known) * (0.35 + 0.25 * (order % 3))))]
        style = {"color": INK[colour], "fontsize": 9.5, "ha": "center", "va": "bottom"}
        axes.annotate(signal.partition("@")[2], (x[place], middle[place]), **style)


def scale(axes: Axes, values: np.ndarray, *, fit: bool) -> None:
    """Log axis where all values are positive and far apart, linear otherwise.

    Args:
        values: all that the axis has to show, of any shape; NaN is passed over.
        fit: whether the axis ends where these values end.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return
    low, high = values.min(), values.max()
    log = low > 0 and high / low > SPAN
    if log:
        log_axis(axes, low, high)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if fit and high > low:
        _fit(axes, low, high)


def _fit(axes: Axes, low: float, high: float) -> None:
    if axes.get_yscale() == "log":
        pad = (high / low) ** 0.06
        axes.set_ylim(low / pad, high * pad)
    else:
        pad = 0.06 * (high - low)
        axes.set_ylim(low - pad, high + pad)


def fit_window(axes: Axes, first: float, last: float) -> None:
    """Let the y axis end where the lines between two iterations end."""
    seen = []
    for drawn in axes.lines:
        x, y = np.asarray(drawn.get_xdata(), float), np.asarray(drawn.get_ydata(), float)
        if len(x) > 2:
            seen.append(y[(x >= first) & (x <= last) & np.isfinite(y)])
    values = np.concatenate(seen) if seen else np.array([])
    if len(values) and values.max() > values.min():
        log = axes.get_yscale() == "log"
        if log:
            log_axis(axes, values.min(), values.max())
        _fit(axes, values.min(), values.max())


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
    """Return the fixed limit of a signal, as any of these runs recorded it at its start."""
    for run in runs:
        for event in run.events:
            limits = event.get("limits") if event["kind"] == "start" else None
            limit = limits.get(signal) if isinstance(limits, dict) else None
            if isinstance(limit, (int, float)) and limit > 0:
                return float(limit)
    return None


def marks(axes: Axes, run: Run, signal: str | None = None, layer: int | None = None) -> None:
    """Vertical marks: injection, critical alarms with their onset, warnings softer."""
    for at in {d["from_iteration"] for d in run.drills}:
        if at <= run.last_iteration:
            axes.axvline(at, color=INK["drill"], linewidth=1.3, linestyle=(0, (5, 2)), zorder=6)
    for group in run.alarms if signal is not None else run.first_alarms:
        if signal is not None and (group.signal != signal or layer not in (None, *group.layers)):
            continue
        if group.critical:
            # A cell that comes later is behind the same fault: its line is enough.
            if group not in run.first_alarms:
                axes.axvline(group.iteration, color=INK["alarm"], linewidth=0.7, alpha=0.6)
                continue
            axes.axvspan(group.onset, group.iteration, color=INK["alarm"], alpha=0.14, linewidth=0)
            axes.axvline(group.iteration, color=INK["alarm"], linewidth=1.3, zorder=6)
        else:
            style = {"linewidth": 1.1, "linestyle": (0, (1, 2))}
            axes.axvline(group.iteration, color=INK["warn"], zorder=6, **style)


def x_axis(axes: Axes, run: Run, others: Sequence[Run], ticks: int) -> None:
    """Let the x axis hold all the runs; whole iterations only."""
    runs = (run, *others)
    first, last = min(r.first_iteration for r in runs), max(r.last_iteration for r in runs)
    axes.set_xlim(first - 1, last + max(1, 0.01 * (last - first)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def limit_line(axes: Axes, limit: float | None) -> None:
    """Draw a fixed limit, where there is one."""
    if limit is not None:
        axes.axhline(limit, color=INK["soft"], linewidth=1.0, linestyle=(0, (2, 2)), zorder=4)
        axes.annotate(
            f"limit {limit:.0e}".replace("e-0", "e-"),
            (0.005, limit),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=INK["soft"],
            fontsize=9.5,
        )
