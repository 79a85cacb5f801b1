"""Numbers, alarms and events in words, the same on the console, in W&B and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mcore_monitors.catalogue import SIGNALS, base_name

_COMMON = {"v", "time", "kind", "iteration", "attempt"}


def number(value: float | None) -> str:
    """Return a number as people read it: four digits, a dash for unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def alarm_text(event: Mapping[str, Any]) -> str:
    """Return an alarm in one sentence: signal, layer, head, value, bound and onset."""
    signal = str(event.get("signal", "?"))
    info = SIGNALS.get(base_name(signal))
    where = f"layer {event['layer']}" if event.get("layer") is not None else "the model"
    if event.get("unit") is not None and info is not None and info.unit != "layer":
        where += f", {info.unit} {event['unit']}"
    value = event.get("value")
    text = f"{signal} in {where}: {number(value) if isinstance(value, (int, float)) else value}"
    limit, band = event.get("limit"), event.get("band")
    if isinstance(limit, (int, float)):
        text += f" against a limit of {number(limit)}"
    elif isinstance(band, Mapping) and isinstance(band.get("median"), (int, float)):
        text += f" against a usual {number(band['median'])}"
    if event.get("onset_iteration") is not None:
        text += f"; onset at iteration {event['onset_iteration']}"
    return text


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return a recovery plan in one sentence: where to, what is passed over, which remedy."""
    text = f"back to the checkpoint of iteration {plan.get('checkpoint_iteration', '?')}"
    if plan.get("pass_over_samples"):
        text += f", passing over {plan['pass_over_samples']} samples"
    remedy = plan.get("remedy") or {}
    if remedy.get("attention") == "safe":
        text += ", on the safe attention path"
    factor = remedy.get("learning_rate_factor")
    if isinstance(factor, (int, float)) and factor != 1:
        text += f", learning rate × {number(factor)}"
    return text


def event_text(event: Mapping[str, Any]) -> str | None:
    """Return an event in one line of plain words; None for what needs no telling."""
    kind = event["kind"]
    get = event.get
    if kind == "alarm":
        return alarm_text(event)
    if kind == "diagnosis":
        return str(get("sentence") or get("cause"))
    if kind == "rollback":
        return plan_text(get("plan") or {})
    if kind == "remedy":
        fields = {k: v for k, v in event.items() if k not in _COMMON}
        return _pairs(fields)
    if kind == "resume":
        return f"going on from iteration {get('from_iteration')}, attempt {get('attempt')}"
    if kind == "drill":
        return (
            f"fault {get('fault')} of strength {get('strength')} from iteration "
            f"{get('from_iteration')} on, layers {get('layers') or 'all'}"
        )
    if kind == "recovered":
        return f"the run passed the old alarm quietly; plan {get('plan_id')} is done"
    if kind == "gave_up":
        return str(get("reason"))
    if kind == "monitor_disabled":
        return f"{get('monitor')} is off from here on: {get('error')}"
    if kind == "message":
        return str(get("text"))
    return None


def _value(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) else str(value)


def _pairs(fields: Any) -> str:
    if not isinstance(fields, Mapping):
        return str(fields)
    return ", ".join(f"{key} {_value(value)}" for key, value in fields.items())
