"""The tables of the page: events, plans, checkpoints; and what monitoring cost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape
from itertools import pairwise

import numpy as np

from mcore_monitors.report.data import Run
from mcore_monitors.report.story import drill_text, group_text
from mcore_monitors.sinks.wording import event_text, number

#: Kinds that have a table of their own, or say nothing to a reader.
_ELSEWHERE = {"checkpoint", "alarm"}


def table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """Return an HTML table; every cell is escaped.

    Args:
        head: column titles.
        rows: CSS class and cells of each row.
    """
    titles = list(head)
    lines = []
    for kind, cells in rows:
        tds = "".join(
            f'<td data-title="{escape(title)}">{escape(str(cell))}</td>'
            for title, cell in zip(titles, cells, strict=True)
        )
        lines.append(f'<tr class="{escape(kind)}">{tds}</tr>')
    header = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def event_table(run: Run) -> str:
    """Return the events in the order of happening; alarms of one signal and iteration are one."""
    groups = {(g.signal, g.iteration, g.attempt, g.severity): g for g in run.alarms}
    rows = []
    for event in run.events:
        kind, text = event["kind"], event_text(event)
        style = kind
        if kind == "alarm":
            key = (event["signal"], event["iteration"], event["attempt"], event["severity"])
            group = groups.pop((str(key[0]), key[1], key[2], str(key[3])), None)
            if group is None:
                continue
            kind = style = "alarm" if group.critical else "warning"
            text = group_text(group)
        elif kind in _ELSEWHERE:
            continue
        elif kind == "drill":
            text = drill_text(event)
        elif kind == "start":
            text = _start(event)
        elif kind == "stop":
            text = f"exit code {event.get('exit_code')}"
        elif kind == "diagnosis" and event.get("severity") == "warning":
            style = "warning"
        cells = (event["iteration"], _clock(event), kind.replace("_", " "), text or "")
        rows.append((style, cells))
    if not rows:
        return "<p>None on record.</p>"
    return table(("iteration", "time", "event", "what"), rows)


def _start(event: dict) -> str:
    versions = event.get("versions")
    parts = [f"{event.get('host')} on {event.get('world_size')} processes"]
    if isinstance(versions, dict):
        parts += [f"{name} {version}" for name, version in versions.items()]
    return ", ".join([*parts, f"recovery mode {event.get('mode')}"])


def _clock(event: dict) -> str:
    try:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return "–"


def checkpoint_table(run: Run) -> str:
    """Return the checkpoints; those that were written again later stay in the table."""
    rows = [
        (mark.status, (mark.iteration, mark.attempt, mark.status, mark.reason, mark.path))
        for mark in run.checkpoints
    ]
    return table(("iteration", "attempt", "status", "why", "path"), rows)


def plan_table(run: Run) -> str:
    """Return the rollback plans."""
    rows = []
    for plan in run.plans:
        remedy = plan.remedy
        changes = ["safe attention path"] if remedy.attention == "safe" else []
        if remedy.learning_rate_factor != 1:
            changes.append(f"learning rate × {number(remedy.learning_rate_factor)}")
        if plan.pass_over_samples:
            changes.append(f"{plan.pass_over_samples} samples passed over")
        rows.append(
            (
                plan.status,
                (
                    plan.id,
                    plan.status,
                    plan.alarm_iteration,
                    plan.onset_iteration,
                    plan.checkpoint_iteration,
                    plan.cause.replace("_", " "),
                    ", ".join(changes) or "nothing changed",
                ),
            )
        )
    head = ("plan", "status", "alarm at", "onset", "back to", "cause", "remedy")
    return table(head, rows)


def cost_text(run: Run) -> str:
    """Return what monitoring took of the training time, by the median sample."""
    times, costs = [], []
    for part in run.parts:
        for before, sample in pairwise(part.samples):
            count = sample.iteration - before.iteration
            if count > 0 and sample.time > before.time:
                times.append((sample.time - before.time) / count)
                costs.append(sample.cost_seconds / count)
    if not times:
        return "<p>Not enough samples yet to say.</p>"
    step, cost = float(np.median(times)), float(np.median(costs))
    return (
        f"<p>Monitoring took {number(1000 * cost)} ms of a step of {number(1000 * step)} ms "
        f"(medians over {len(times)} samples): <strong>{100 * cost / step:.2f}%</strong>. "
        '<span class="soft">Wall time between samples, checkpoints and pauses included in the step '
        "but hardly in its median; measured by the run itself on its first rank.</span></p>"
    )
