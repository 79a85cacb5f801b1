"""Says in plain words what happened in a run: the head of the page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.errors import EXIT_ROLLBACK
from mcore_monitors.recovery.ledger import APPLIED, DONE, FAILED, PLANNED
from mcore_monitors.report.data import AlarmGroup, Run, steps
from mcore_monitors.sinks.wording import alarm_text, number, plan_text

#: Steps over which two runs are compared.
LAST_STEPS = 50
#: What to call each cause of a diagnosis.
CAUSES: Mapping[str, str] = {
    "attention_numerics": "wrong numbers in the attention",
    "router_numerics": "wrong numbers in the router",
    "kernel_numerics": "wrong numbers in a norm or the loss",
    "router_or_learning_rate": "the router, or its learning rate",
    "combined": "attention numerics and router together",
    "data": "the data",
    "unknown": "not known",
}


@dataclass(kw_only=True)
class Story:
    """The head of the page."""

    state: str
    """``calm``, ``warned``, ``alarm``, ``recovering``, ``recovered`` or ``gave-up``."""
    badge: str
    """The state in a word or two."""
    headline: str
    """One sentence."""
    facts: list[tuple[str, str]]
    """Question and answer, in the order of reading."""


def plural(count: int, word: str) -> str:
    """Return ``1 head``, ``3 heads``, ``2 query groups``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def layers_text(layers: Sequence[int]) -> str:
    """Return ``layer 3``, ``layers 1–4`` or ``layers 1–4, 7``; no layer is the model."""
    if not layers:
        return "the model"
    ranges: list[list[int]] = []
    for layer in sorted(set(layers)):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    text = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in ranges)
    return f"layer {text}" if len(set(layers)) == 1 else f"layers {text}"


def where(group: AlarmGroup) -> str:
    """Return where a group of alarms is: ``layers 1–4, 16 query groups``."""
    info = SIGNALS.get(base_name(group.signal))
    text = layers_text(group.layers)
    if group.units and info is not None:
        text += f", {plural(group.units, info.unit)}"
    return text


def group_text(group: AlarmGroup) -> str:
    """Return a group of alarms in one line, its worst value included."""
    if group.units <= 1 and len(group.layers) <= 1:
        return alarm_text(group.worst)
    layer = group.worst.get("layer")
    worst = alarm_text({**group.worst, "onset_iteration": None, "unit": None})
    worst = worst.split(": ", 1)[-1]
    found = f"worst {worst}" + (f" in layer {layer}" if layer is not None else "")
    return f"{group.signal}, {where(group)}: {found}; onset at iteration {group.onset}"


def joined(words: Iterable[str]) -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    *start, last = list(words) or [""]
    return f"{', '.join(start)} and {last}" if start else last


def drill_text(event: Mapping[str, Any]) -> str:
    """Return a drill in words."""
    layers = event.get("layers")
    good = isinstance(layers, list) and all(isinstance(n, int) for n in layers) and layers
    return (
        f"the fault {event['fault']} is injected on purpose from iteration "
        f"{event['from_iteration']} on, strength {event.get('strength')}, "
        f"{layers_text(layers) if good else 'all layers'}"
    )


def against(run: Run, other: Run) -> str:
    """Return how another run's loss compares, e.g. ``, loss 0.726 higher in the end``.

    Over the last steps that both have; nothing where they share none.
    """
    (x, mine), (y, theirs) = steps(run.samples, "loss"), steps(other.samples, "loss")
    _, i, j = np.intersect1d(x, y, return_indices=True)
    gaps = theirs[j] - mine[i]
    gaps = gaps[np.isfinite(gaps)]
    if not len(gaps):
        return ""
    if not gaps.any():
        return ": the same loss at every step"
    gap = float(np.mean(gaps[-LAST_STEPS:]))
    end = int(min(run.samples[-1].iteration, other.samples[-1].iteration))
    return f": loss {abs(gap):.3f} {'higher' if gap > 0 else 'lower'} at iteration {end}"


def tell(run: Run) -> Story:
    """Return the head of the page for a run."""
    critical = [group for group in run.alarms if group.critical]
    state, badge = _state(run, critical)
    return Story(
        state=state,
        badge=badge,
        headline=_headline(run, critical, state),
        facts=_facts(run, critical),
    )


def _state(run: Run, critical: list[AlarmGroup]) -> tuple[str, str]:
    if run.gave_up is not None:
        return "gave-up", "gave up"
    plan = run.plans[-1] if run.plans else None
    since = plan.alarm_iteration if plan else None
    again = [g for g in critical if plan and g.attempt >= plan.attempt]
    if plan and plan.status == DONE and not again:
        return "recovered", "recovered"
    if plan and plan.status in (PLANNED, APPLIED) and not again:
        if plan.status == PLANNED:
            return "recovering", "waiting for a restart"
        return "recovering", "ended early" if _finished(run) else "going on"
    if critical:
        return "alarm", "alarm" if since is None else "alarm again"
    return ("warned", "calm, with warnings") if run.alarms else ("calm", "calm")


def _headline(run: Run, critical: list[AlarmGroup], state: str) -> str:
    end = run.samples[-1].iteration
    if not critical:
        calm = f"A calm run up to iteration {end}"
        if state == "warned":
            count = plural(len(run.alarms), "warning")
            return f"{calm}: {count}, no alarm, nothing had to be done."
        return f"{calm}: no signal left its healthy course." if not run.plans else f"{calm}."
    first = critical[0]
    together = [g for g in critical if g.iteration == first.iteration]
    layers = layers_text(sorted({n for g in together for n in g.layers}))
    text = f"{joined(dict.fromkeys(g.signal for g in together))} raised the alarm"
    text += f" at iteration {first.iteration} in {layers}"
    plan = run.plans[-1] if run.plans else None
    if plan is not None:
        back = f"the run went back to the checkpoint of iteration {plan.checkpoint_iteration}"
        times = f" ({len(run.plans)} rollbacks in all)" if len(run.plans) > 1 else ""
        proof = "has yet to pass the old alarm quietly for long enough"
        if _finished(run):
            proof = "ended before it had passed the old alarm quietly for long enough"
        then = {
            "recovered": f" and passed the old alarm quietly: recovered{times}.",
            "recovering": f" and {proof}{times}.",
            "alarm": f"{times}, and the alarm came again.",
            "gave-up": f"{times}, and gave up in the end.",
        }[state]
        if plan.status == PLANNED and state == "recovering":
            back = f"a plan to go back to the checkpoint of iteration {plan.checkpoint_iteration}"
            then = " is written; start the run again and it will be obeyed."
        return f"{text}; {back}{then}"
    if state == "gave-up":
        return f"{text}; the run gave up."
    return f"{text}; nothing was changed."


def _facts(run: Run, critical: list[AlarmGroup]) -> list[tuple[str, str]]:
    facts = []
    for drill in run.drills:
        text = drill_text(drill)
        if drill["from_iteration"] > run.last_iteration:
            text += " (not reached yet)"
        facts.append(("Drill", text))
    if critical:
        first = critical[0]
        facts.append(("First alarm", f"iteration {first.iteration}: {group_text(first)}"))
        onset = min(g.onset for g in critical if g.iteration == first.iteration)
        delay = first.iteration - onset
        facts.append(("Onset", f"iteration {onset}, {plural(delay, 'step')} before the alarm"))
    said = [e for e in run.events if e["kind"] == "diagnosis"]
    grave = [e for e in said if e.get("severity", "critical") == "critical"]
    if critical and grave:
        cause = str(grave[0].get("cause"))
        facts.append(("Diagnosis", f"{CAUSES.get(cause, cause)}. {grave[0].get('sentence') or ''}"))
    if run.plans:
        for plan in run.plans:
            facts.append(("Done", f"{plan.id}: {_plan_text(plan)}; {_plan_state(plan.status)}"))
    elif critical:
        start = run.last_event("start")
        mode = start.get("mode") if start else None
        why = f"; recovery.mode is {mode}" if mode in ("log", "notify") else ""
        facts.append(("Done", f"nothing{why}"))
    warned = [g for g in run.alarms if not g.critical]
    if warned:
        last = warned[-1]
        many = f" (newest of {len(warned)})" if len(warned) > 1 else ""
        facts.append(
            ("Warning", f"iteration {last.iteration}: {group_text(last)}; not acted on{many}")
        )
    if run.gave_up is not None:
        facts.append(("Gave up", run.gave_up))
    facts.append(("Now", _now(run)))
    return facts


def _plan_text(plan: Any) -> str:
    remedy = plan.remedy
    return plan_text(
        {
            "checkpoint_iteration": plan.checkpoint_iteration,
            "pass_over_samples": plan.pass_over_samples,
            "remedy": {
                "attention": remedy.attention,
                "learning_rate_factor": remedy.learning_rate_factor,
            },
        }
    )


def _plan_state(status: str) -> str:
    return {
        PLANNED: "not obeyed yet",
        APPLIED: "obeyed; the old alarm is not passed quietly yet",
        DONE: "the run passed the old alarm quietly",
        FAILED: "it did not help",
    }[status]


def _finished(run: Run) -> bool:
    ends = [e for e in run.events if e["kind"] in ("start", "stop")]
    return bool(ends) and ends[-1]["kind"] == "stop" and ends[-1].get("exit_code") == 0


def _now(run: Run) -> str:
    last = run.samples[-1]
    loss = [value for sample in run.samples[-10:] for value in sample.loss if value is not None]
    text = f"iteration {last.iteration}"
    if loss:
        text += f", loss {number(sum(loss) / len(loss))} nats over the last {len(loss)} steps"
    ends = [e for e in run.events if e["kind"] in ("start", "stop")]
    if ends and ends[-1]["kind"] == "stop":
        code = ends[-1].get("exit_code")
        planned = code == EXIT_ROLLBACK
        return f"{text}; ended with code {code}" + (" to be started again" if planned else "")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.time))
    return f"{text}; going on, or killed: the last sample is of {when}"
