"""The course of a run as lanes: one for each stretch, an arrow for each rollback."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from mcore_monitors.report.data import AlarmGroup, Mark, Run
from mcore_monitors.report.svg import INK

_STATUS = {"verified": "good", "pending": "pending", "suspect": "alarm"}


def draw_lanes(
    axes: Axes, run: Run, *, wide: bool, window: tuple[float, float] | None = None
) -> None:
    """Draw the strip: kept stretches thick, abandoned ones grey and dashed, checkpoints as ticks.

    Args:
        axes: shares its x axis with the curves below.
        run: the run.
        wide: whether there is room for all words.
        window: first and last iteration in view; None for the whole run.
    """
    first, last = window or (run.first_iteration, run.last_iteration)
    axes.grid(False)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(labelbottom=False)
    count = len(run.parts)
    axes.set_ylim(count - 0.3, -1.25)
    for row, part in enumerate(run.parts):
        ends = [s.iteration for s in part.samples]
        start = part.samples[0].first_step - 1
        kept = ends[part.kept - 1] if part.kept else start
        line = {"solid_capstyle": "butt", "zorder": 3}
        if kept > start:
            axes.plot([start, kept], [row, row], color=INK["main"], linewidth=5, **line)
        if kept < ends[-1]:
            dashes = (0, (1.2, 0.6))
            style = {"linestyle": dashes, "dash_capstyle": "butt", "zorder": 3}
            axes.plot([kept, ends[-1]], [row, row], color=INK["left"], linewidth=5, **style)
        if row:
            before = run.parts[row - 1].samples[-1].iteration
            rolled = part.attempt > run.parts[row - 1].attempt
            _arrow(axes, (before, row - 1), (start, row), "alarm" if rolled else "left")
            word = "rollback" if rolled else "restart"
            text = f"{word} to {start}"
            share = (start - first) / max(1, last - first)
            _say(axes, share, start, row, text, "alarm" if rolled else "soft")
    for mark in run.checkpoints:
        if not first <= mark.iteration <= last:
            continue
        axes.plot(
            [mark.iteration],
            [_lane(run, mark)],
            marker="|" if mark.status != "suspect" else "x",
            markersize=13 if mark.status != "suspect" else 7,
            markeredgewidth=2.2,
            color=INK[_STATUS.get(mark.status, "left")],
            zorder=5,
            linestyle="none",
        )
    _words(axes, run, first, last, wide=wide)


def _say(axes: Axes, share: float, x: float, row: int, text: str, colour: str) -> None:
    """Beside the arrow's head, on the side that has room."""
    room = share > 0.3
    axes.annotate(
        text,
        (x, row),
        xytext=(-10 if room else 2, 0 if room else -14),
        textcoords="offset points",
        ha="right" if room else "left",
        va="center",
        color=INK[colour],
        fontsize=10.5,
    )


def _arrow(axes: Axes, tail: tuple[float, float], head: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            tail,
            head,
            connectionstyle="arc3,rad=-0.06",
            arrowstyle="-|>,head_length=6,head_width=3.5",
            color=INK[colour],
            linewidth=1.6,
            shrinkA=3,
            shrinkB=1,
            zorder=6,
        )
    )


def _lane(run: Run, mark: Mark) -> int:
    """The stretch on which a checkpoint was written."""
    rows = [
        row
        for row, part in enumerate(run.parts)
        if part.attempt == mark.attempt and (part.resumed_from or 0) < mark.iteration
    ]
    return rows[-1] if rows else 0


def _words(axes: Axes, run: Run, first: float, last: float, *, wide: bool) -> None:
    """Injection to the left of its mark, the first alarm to the right: they are often close."""
    bottom = len(run.parts) - 0.3
    span = max(1, last - first)
    for drill in run.drills:
        at = drill["from_iteration"]
        if not first <= at <= last:
            continue
        axes.plot([at, at], [-0.75, bottom], color=INK["drill"], lw=1.3, ls=(0, (5, 2)), zorder=4)
        left = at - first > 0.25 * span
        # Where the alarm's words have to go to the left too, these go above them.
        near_end = any(at <= g.iteration and _near_end(g, first, span) for g in run.first_alarms)
        text = f"fault injected at {at}" if wide else f"fault {at}"
        _label(axes, at, text, "drill", left=left, lift=15 if near_end else 0)
    seen = [g for g in run.alarms if first <= g.iteration <= last]
    shown = [g for g in run.first_alarms if g in seen]
    for index, group in enumerate(shown):
        at = group.iteration
        axes.plot([at, at], [-0.75, bottom], color=INK["alarm"], lw=1.3, zorder=4)
        axes.fill_betweenx([-0.75, bottom], group.onset, at, color=INK["alarm"], alpha=0.14, lw=0)
        if index == 0:
            text = f"alarm at {at}, onset {group.onset}" if wide else f"alarm {at}"
            _label(axes, at, text, "alarm", left=_near_end(group, first, span))
    for group in seen:
        if group not in shown:
            colour = INK["alarm" if group.critical else "warn"]
            axes.plot([group.iteration], [-0.45], marker="v", markersize=5, color=colour)


def _near_end(group: AlarmGroup, first: float, span: float) -> bool:
    return group.iteration - first > 0.72 * span


def _label(axes: Axes, x: float, text: str, colour: str, *, left: bool, lift: int = 0) -> None:
    axes.annotate(
        text,
        (x, -0.75),
        xytext=(-4 if left else 4, 1 + lift),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom",
        color=INK[colour],
        fontsize=10.5,
        fontweight="bold",
        annotation_clip=False,
    )
