"""The README's picture: what the residual saw, what the loss saw, and the way back.

    python launch/demo_picture.py runs/demo-0 --output docs/demo.png

Reads a demo's folder (`make demo`): its runs *recovered*, *healthy* and *left-alone*.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from mcore_monitors.errors import MonitorsError  # noqa: E402
from mcore_monitors.report.curves import limit_of, log_axis, smooth  # noqa: E402
from mcore_monitors.report.data import Run, readings, steps  # noqa: E402
from mcore_monitors.report.read import read_run  # noqa: E402
from mcore_monitors.sample import Sample  # noqa: E402

SIGNAL = "attention/key_shift"
MAIN, HEALTHY, ALONE, LEFT = "#2458d3", "#14854a", "#a03aa8", "#7c838e"
DRILL, ALARM, TEXT, GRID = "#a8560a", "#c81e2c", "#3a4250", "#dfe3e9"
#: early training is a course of its own and says nothing here
FROM = 300


def worst(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations [N] and the largest key shift over layers and query groups [N]."""
    at, values = readings(samples, SIGNAL)
    return at, np.nanmax(values, axis=1)


def draw(folder: Path) -> Figure:
    """Return the picture of one demo.

    Raises:
        MonitorsError: a run is missing, or shows no alarm and rollback.
    """
    recovered, healthy, alone = (
        read_run(folder / n) for n in ("recovered", "healthy", "left-alone")
    )
    if not (recovered.first_alarms and recovered.plans and recovered.drills):
        raise MonitorsError(f"{recovered.path}: no fault, alarm and rollback in this run")
    injected = recovered.drills[0]["from_iteration"]
    alarm = recovered.first_alarms[0].iteration
    first = FROM if FROM < recovered.plans[0].checkpoint_iteration else 0
    style = {"font.size": 11.5, "axes.spines.top": False, "axes.spines.right": False}
    colours = {"text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": "#b9c0ca"}
    ticks = {"xtick.color": "#b9c0ca", "ytick.color": "#b9c0ca"}
    labels = {"xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT}
    with matplotlib.rc_context(style | colours | ticks | labels):
        figure = Figure(figsize=(10.8, 5.4), layout="constrained", facecolor="white")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.25))
        for axes in (upper, lower):
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.axvline(injected, color=DRILL, linewidth=1.3, linestyle=(0, (5, 2)))
            axes.axvline(alarm, color=ALARM, linewidth=1.3)
        _residual(upper, recovered, alone)
        upper.annotate(
            f"fault injected at {injected} ", (injected, 1.02), xycoords=("data", "axes fraction"),
            ha="right", va="bottom", color=DRILL, fontweight="bold",
        )  # fmt: skip
        upper.annotate(
            f" alarm at {alarm}", (alarm, 1.02), xycoords=("data", "axes fraction"),
            ha="left", va="bottom", color=ALARM, fontweight="bold",
        )  # fmt: skip
        _loss(lower, recovered, healthy, alone, alarm=alarm, first=first)
        last = max(run.last_iteration for run in (recovered, healthy, alone))
        lower.set_xlim(first, last)
        lower.set_xlabel("iteration")
    return figure


def _residual(axes: Axes, recovered: Run, alone: Run) -> None:
    limit = limit_of(SIGNAL, (recovered, alone))
    axes.plot(*worst(alone.samples), color=ALONE, linewidth=1.6)
    axes.plot(*worst(recovered.samples), color=MAIN, linewidth=2)
    for left in recovered.abandoned:
        axes.plot(*worst(left), color=LEFT, linewidth=2, linestyle=(0, (3, 1.5)))
    values = np.concatenate([worst(run.samples)[1] for run in (recovered, alone)])
    log_axis(axes, values.min(), values.max())
    if limit is not None:
        axes.axhline(limit, color=ALARM, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            f"limit {limit:.0e}".replace("e-0", "e-"), (0.006, limit),
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            color=ALARM,
        )  # fmt: skip
    axes.set_title(
        "key shift, worst of all layers (zero for a right attention kernel)",
        loc="left",
        fontsize=11.5,
        pad=24,
    )


def _loss(axes: Axes, recovered: Run, healthy: Run, alone: Run, *, alarm: int, first: int) -> None:
    def course(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        x, y = steps(samples, "loss")
        return x, smooth(y, 25)

    back = recovered.plans[0].checkpoint_iteration
    axes.plot(*course(alone.samples), color=ALONE, linewidth=1.6, label="fault left alone")
    # Broad and pale: where the recovered run gives the same losses, it stays visible behind.
    axes.plot(
        *course(healthy.samples), color=HEALTHY, linewidth=5, alpha=0.35, label="without the fault"
    )
    axes.plot(*course(recovered.samples), color=MAIN, linewidth=1.8, label="recovered")
    for left in recovered.abandoned:
        x, y = course(left)
        style = {"color": LEFT, "linewidth": 2, "linestyle": (0, (3, 1.5))}
        axes.plot(x, y, label="abandoned by the rollback", **style)
    courses = [course(run.samples) for run in (recovered, alone)]
    seen = np.concatenate([y[x > first] for x, y in courses])
    low, high = np.nanmin(seen), np.nanmax(seen)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.12 * (high - low))
    level = np.nanmax(courses[0][1][max(0, back - 1) : alarm]) + 0.14 * (high - low)
    axes.annotate(
        "", (back, level - 0.08 * (high - low)), (alarm, level - 0.08 * (high - low)),
        arrowprops={"arrowstyle": "-|>,head_length=.55,head_width=.3", "color": ALARM,
                    "linewidth": 1.7, "connectionstyle": "arc3,rad=0.22",
                    "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    axes.annotate(
        f"back to the verified\ncheckpoint of {back}", (back, level), xytext=(-8, 10),
        textcoords="offset points", ha="right", va="center", color=ALARM,
    )  # fmt: skip
    axes.set_title("training loss (nats)", loc="left", fontsize=11.5)
    beside = {"bbox_to_anchor": (alarm, high), "bbox_transform": axes.transData}
    axes.legend(loc="upper left", frameon=False, **beside)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python launch/demo_picture.py runs/demo-0 --output docs/demo.png",
    )
    parser.add_argument("folder", type=Path, help="a demo's folder")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"), help="PNG to write")
    arguments = parser.parse_args()
    try:
        figure = draw(arguments.folder)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.output, dpi=130)
    except (MonitorsError, OSError) as error:
        print(f"demo_picture: {error}", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
