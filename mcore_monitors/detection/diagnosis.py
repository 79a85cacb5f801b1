"""From alarms to a cause: the rule table, and one sentence for the person who is woken up.

============== =============== ========== ==========================================
residuals      update spectra  router     cause
============== =============== ========== ==========================================
of attention   any             residual   combined
of a router,   any             any        router_numerics
not attention
of a norm or   any             any        kernel_numerics
the output,
no other
============== =============== ========== ==========================================

Residuals below are those of attention:

============== =============== ========== ==========================================
alarm          any             quiet      attention_numerics
alarm          any             alarm      combined
quiet          alarm           quiet      attention_numerics, held loosely
quiet          alarm           alarm      router_or_learning_rate: a large learning
                                          rate moves the attention's updates as well
not judged     alarm           quiet      attention_numerics
not judged     alarm           alarm      combined
quiet or none  quiet           alarm      router_or_learning_rate
quiet or none  quiet           quiet      data, if loss or gradient norm alarmed,
                                          else unknown
============== =============== ========== ==========================================

Once a critical alarm is there, warnings no longer count for the cause: late in an attention fault
the router drifts too, because everything does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.detection.alarm import CRITICAL, WARNING, Alarm, Diagnosis
from mcore_monitors.detection.localise import Sizes, localise

_RESIDUAL, _ROUTER_RESIDUAL, _KERNEL_RESIDUAL, _SPECTRUM, _ROUTER, _TRAINING, _OTHER = (
    "residual",
    "router residual",
    "kernel residual",
    "spectrum",
    "router",
    "training",
    "other",
)
_RESIDUALS = {_RESIDUAL, _ROUTER_RESIDUAL, _KERNEL_RESIDUAL}
#: sites that a diagnosis names at most; the worst come first
_SITES = 3

_FAULT = {
    "attention_numerics": "wrong numbers in the attention kernel",
    "router_numerics": "wrong numbers in the router's kernels",
    "kernel_numerics": "wrong numbers in a norm's or the loss's kernels",
    "router_or_learning_rate": "the router, or a learning rate too large for it",
    "combined": "wrong numbers in the attention kernel and a router (or learning-rate) fault at "
    "the same time",
    "data": "a stretch of bad data",
    "unknown": "unknown",
}


def _group(signal: str) -> str:
    name = base_name(signal)
    info = SIGNALS.get(name)
    if name in ("loss", "grad_norm"):
        return _TRAINING
    if info is not None and info.family == "conservation":
        by_place = {"attention": _RESIDUAL, "router": _ROUTER_RESIDUAL}
        return by_place.get(name.partition("/")[0], _KERNEL_RESIDUAL)
    if info is not None and name.startswith("attention/"):
        return _SPECTRUM
    if info is not None and name.startswith("router/"):
        return _ROUTER
    return _OTHER


def _decide(groups: Collection[str], residual_judged: bool, severity: str) -> tuple[str, float]:
    """Return (cause, confidence) for the groups that alarm."""
    residual, spectrum, router = (g in groups for g in (_RESIDUAL, _SPECTRUM, _ROUTER))
    if residual and (router or _ROUTER_RESIDUAL in groups):
        return "combined", 0.9
    if residual:
        return "attention_numerics", 0.95 if spectrum else 0.9
    if _ROUTER_RESIDUAL in groups:
        return "router_numerics", 0.9
    if _KERNEL_RESIDUAL in groups:
        return "kernel_numerics", 0.9
    if spectrum and router:
        return ("router_or_learning_rate", 0.6) if residual_judged else ("combined", 0.6)
    if spectrum:
        return "attention_numerics", 0.4 if residual_judged else 0.7
    if router:
        return "router_or_learning_rate", 0.8 if severity == CRITICAL else 0.5
    return ("data", 0.5) if _TRAINING in groups else ("unknown", 0.2)


def _reason(cause: str, groups: set[str], quiet: Collection[str]) -> str:
    """Return what speaks for the cause: the pattern, then the groups that are quiet."""
    others = "attention's " if groups & _RESIDUALS else ""
    silence = [
        words
        for group, words in (
            (_RESIDUAL, f"the {others}residuals hold"),
            (_SPECTRUM, "the attention's updates are normal so far"),
            (_ROUTER, "the router is quiet so far"),
        )
        if group in quiet
    ]
    if groups & _RESIDUALS:
        reason = (
            "the residual is zero whatever the data or the learning rate, so only a kernel that "
            "computes something else can move it"
        )
    elif cause == "router_or_learning_rate" and _SPECTRUM in groups:
        reason = "a learning rate that is too large moves the attention's updates as well"
    elif _SPECTRUM in groups:
        reason = "a small error of the same sign step after step narrows the attention's updates"
    elif _ROUTER in groups:
        reason = "the router left its course by itself"
    elif _TRAINING in groups:
        reason = "only the loss or the gradient norm moved"
    else:
        reason = "no rule knows this pattern"
    return "; ".join([reason, *silence])


def _numbers(values: Iterable[int]) -> str:
    known = sorted(set(values))
    if len(known) > 6:
        return f"{len(known)} from {known[0]} to {known[-1]}"
    return ", ".join(map(str, known))


def _place(alarms: Sequence[Alarm]) -> str:
    """Return where the alarms of one signal are: layers, and the units if it is one layer."""
    layers = {alarm.layer for alarm in alarms}
    text = f"{'layer' if len(layers) == 1 else 'layers'} {_numbers(layers)}"
    units = {alarm.unit for alarm in alarms if alarm.unit is not None}
    if len(layers) == 1 and units:
        info = SIGNALS.get(base_name(alarms[0].signal))
        name = info.unit if info is not None else "unit"
        text += f" ({name}{'s' if len(units) > 1 else ''} {_numbers(units)})"
    return text


def _finding(alarms: Sequence[Alarm]) -> str:
    """Return where a signal is off, by how much, against what, since when."""
    worst = max(alarms, key=lambda alarm: (_size(alarm), -alarm.layer))
    if worst.rule == "limit":
        against = f"{worst.value:.2e} against a limit of {worst.limit:.2e}"
    else:
        band = worst.band or {}
        edge = band["low"] if band["z"] < 0 else band["high"]
        against = (
            f"{worst.value:.3g} against a band {'down' if band['z'] < 0 else 'up'} to {edge:.3g} "
            f"(usual {band['median']:.3g})"
        )
    onset = min(alarm.onset_iteration for alarm in alarms)
    return f"{worst.signal} in {_place(alarms)} is {against} since iteration {onset}"


def _size(alarm: Alarm) -> float:
    if alarm.rule == "limit":
        return alarm.value / (alarm.limit or 1.0)
    return abs(alarm.band["z"]) if alarm.band else 0.0


def diagnose(
    alarms: Sequence[Alarm], judged: Collection[str], sizes: Sizes | None = None
) -> Diagnosis | None:
    """Return what the active alarms together say, or None when there are none.

    Args:
        alarms: all alarms that are active now, warnings included.
        judged: signals (without windows) that the rules judge, quiet ones included.
        sizes: conservation residuals over their limits, all of them, to say where the fault is.
    """
    if not alarms:
        return None
    severity = CRITICAL if any(alarm.severity == CRITICAL for alarm in alarms) else WARNING
    counted = [alarm for alarm in alarms if alarm.severity == severity]
    groups = {_group(alarm.signal) for alarm in counted}
    judged_groups = {_group(signal) for signal in judged}
    cause, confidence = _decide(groups, _RESIDUAL in judged_groups, severity)
    quiet = judged_groups - {_group(alarm.signal) for alarm in alarms}
    by_signal: dict[str, list[Alarm]] = {}
    for alarm in counted:
        by_signal.setdefault(alarm.signal, []).append(alarm)
    order = sorted(by_signal, key=lambda name: (_group(name) not in _RESIDUALS, name))
    findings = "; ".join(_finding(by_signal[name]) for name in order)
    site = ""
    if groups & _RESIDUALS:
        site = "; ".join(found.sentence for found in localise(sizes or {})[:_SITES])
    return Diagnosis(
        cause=cause,
        confidence=confidence,
        severity=severity,
        onset_iteration=min(alarm.onset_iteration for alarm in counted),
        signals=tuple(sorted({base_name(name) for name in by_signal})),
        sentence=f"{findings}. Likely fault: {_FAULT[cause]} (confidence {confidence:.0%}): "
        f"{_reason(cause, groups, quiet)}.{' Site: ' + site + '.' if site else ''}",
        site=site,
    )
