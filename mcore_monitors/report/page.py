"""Puts the page together: head, curves, tables, how to read it. What a run says is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from mcore_monitors.catalogue import SIGNALS, base_name, is_judged
from mcore_monitors.report.data import Run
from mcore_monitors.report.figures import (
    closer_window,
    draw_recorded,
    draw_signal,
    draw_story,
    layers_of,
    name_of,
)
from mcore_monitors.report.story import against, layers_text, tell
from mcore_monitors.report.svg import OTHERS
from mcore_monitors.report.tables import checkpoint_table, cost_text, event_table, plan_table
from mcore_monitors.windows import window_of

#: In how a signal runs when all is well, and on which side a fault shows.
_HEALTHY = {
    "low": "stays at the round-off floor",
    "stable": "keeps its level",
    "drifts": "drifts slowly",
}
_WATCH = {
    "limit": "passing a fixed limit above that floor",
    "low": "a fall below its own recent band",
    "high": "a rise above its own recent band",
    "both": "leaving its own recent band on either side",
}


def build_page(run: Run, others: Sequence[Run] = ()) -> str:
    """Return the HTML page of a run.

    Args:
        run: the run that it is about.
        others: runs drawn thin behind.
    """
    story = tell(run)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in story.facts)
    parts = [
        f'<header class="{story.state}"><p class="name"><code>{escape(run.name)}</code> '
        f'<span class="badge">{escape(story.badge)}</span></p>'
        f"<h1>{escape(story.headline)}</h1><dl>{facts}</dl></header>",
        _section("The course of the run", _story_figure(run, others)),
        _signals(run, others),
        _section("Events", event_table(run)),
    ]
    if run.plans:
        parts.append(_section("Plans", plan_table(run)))
    if run.checkpoints:
        parts.append(_section("Checkpoints", checkpoint_table(run)))
    parts += [_section("How to read it", _reading(run)), _section("Cost", cost_text(run))]
    style = files("mcore_monitors.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded and no script runs, whatever a run is called.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(run.name)}: {escape(story.badge)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _legend(run: Run, others: Sequence[Run]) -> str:
    items = [("line main", f"{run.name}: steps that count")]
    if run.abandoned:
        items.append(("line left", "left behind by a rollback or restart"))
    for index, other in enumerate(others):
        text = other.name + against(run, other)
        items.append((f"line {OTHERS[index % len(OTHERS)]}", text))
    if run.drills:
        items.append(("line drill", "fault injected"))
    if any(g.critical for g in run.alarms):
        items.append(("line alarm", "alarm, shaded from its onset"))
    if any(not g.critical for g in run.alarms):
        items.append(("line warn", "warning, not acted on"))
    for status, colour in (("verified", "good"), ("pending", "pending"), ("suspect", "suspect")):
        if any(mark.status == status for mark in run.checkpoints):
            shape = "cross" if status == "suspect" else "tick"
            items.append((f"{shape} {colour}", f"checkpoint, {status}"))
    spans = (f'<li><i class="{kind}"></i>{escape(text)}</li>' for kind, text in items)
    return f'<ul class="legend">{"".join(spans)}</ul>'


def _story_figure(run: Run, others: Sequence[Run]) -> str:
    def both(window: tuple[float, float] | None) -> str:
        return "".join(
            f'<figure class="{kind}">'
            f"{draw_story(run, others, wide=kind == 'wide', window=window)}</figure>"
            for kind in ("wide", "narrow")
        )

    body = f"{_legend(run, others)}{both(None)}"
    window = closer_window(run)
    if window is not None:
        body += f"<h3>A closer look at the rollback</h3>{both(window)}"
    return body


def _signals(run: Run, others: Sequence[Run]) -> str:
    loud = [g.signal for g in sorted(run.alarms, key=lambda g: (not g.critical, g.iteration))]
    there = {name for sample in run.samples for name in sample.signals}
    judged = sorted(name for name in there if is_judged(name, run.judged_windows))
    order = dict.fromkeys([*(s for s in loud if s in there), *judged])
    blocks = []
    for index, signal in enumerate(order):
        layers, count = layers_of(run, signal)
        drawn = draw_signal(run, others, signal, layers, f"s{index}")
        figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
        info = SIGNALS.get(base_name(signal))
        note = ""
        if info is not None and info.unit != "layer":
            note = f"Line: median over the {info.unit}s of a layer; shade: lowest to highest. "
        if count > len(layers):
            note += f"{len(layers)} of {count} layers, those with alarms first. "
        own = [g for g in run.alarms if g.signal == signal]
        for group in own[:3]:
            kind = "Alarm" if group.critical else "Warning"
            note += f"{kind} at iteration {group.iteration} in {layers_text(group.layers)}. "
        note += "" if own else "No alarm."
        blocks.append(
            f"<h3><code>{escape(signal)}</code></h3><p class='soft'>{escape(note)}</p>"
            f'<div class="grid">{figures}</div>'
        )
    blocks += _recorded(run, sorted(there - order.keys(), key=_by_window))
    return _section("Every signal, layer by layer", "".join(blocks)) if blocks else ""


def _by_window(signal: str) -> tuple[str, int]:
    return name_of(signal), window_of(signal) or 0


def _recorded(run: Run, signals: Sequence[str]) -> list[str]:
    """What no rule judges, folded away: one small figure a signal, over all layers."""
    if not signals:
        return []
    names = [list(group) for _, group in groupby(signals, key=name_of)]
    figures = "".join(
        f"<figure>{draw_recorded(run, group, f'r{index}')}</figure>"
        for index, group in enumerate(names)
    )
    note = (
        "Written and shown, judged by no rule. Line: median over all layers; the number on it "
        "is the window in iterations, and a signal without one has a shade from lowest to highest."
    )
    return [
        f"<details><summary>{len(names)} more signals, recorded only</summary>"
        f'<p class="soft">{note}</p><div class="grid">{figures}</div></details>'
    ]


def _reading(run: Run) -> str:
    there = sorted({name for sample in run.samples for name in sample.signals})
    rows = [
        "<p>A signal is judged against its own healthy course, or, where exact arithmetic fixes "
        "its value, against a limit. An alarm names the iteration at which the deviation began "
        "(its onset). A rollback returns to the newest checkpoint that was verified before it.</p>"
    ]
    folded = []
    for name in dict.fromkeys(base_name(signal) for signal in there):
        info = SIGNALS.get(name)
        if info is None:
            continue
        windowed = [s for s in there if "@" in s and base_name(s) == name]
        window = ", ".join(map(str, sorted({window_of(s) for s in windowed})))
        alarm = _WATCH.get(info.watch)
        (rows if alarm else folded).append(
            f"<h3><code>{escape(name)}</code></h3><p>{escape(info.formula)}"
            f"{escape(f' (here W = {window})') if window else ''}. One value a "
            f"{escape(info.unit)}. In health it {_HEALTHY[info.healthy]}"
            f"{f'; an alarm is {alarm}' if alarm else ''}. {escape(info.meaning)} "
            f"<span class='soft'>Source: {escape(info.source)}.</span></p>"
        )
    if folded:
        rows.append(
            f"<details><summary>{len(folded)} more signals, recorded only</summary>"
            f"{''.join(folded)}</details>"
        )
    return "".join(rows)
