"""The demo's result: what was injected, who saw it when, and where the run ended.

The published loss and gradient-norm rules clip or skip single steps, and fire in healthy training
too: ZClip on one step in twenty. Read as an alarm, a rule alarms when it fires more densely than it
ever did in the healthy run, that is with no false alarm there
(:func:`mcore_monitors.detection.baselines.first_alarm`). The summary has two more readings beside
it: the first firing after the injection at all, and the first one that the healthy run, on the same
data, does not have; both are the rule's noise as much as the fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcore_monitors.catalogue import base_name
from mcore_monitors.detection.baselines import RULES, first_alarm, scan
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import effective_history

#: steps at the end of a run over which its loss is averaged
FINAL_STEPS = 50
#: firings before this iteration are those of early training
WARM_UP = 200
DELTA2 = "attention/delta2_effective_rank"


def per_step(samples: list[Sample]) -> tuple[list[float | None], list[float | None]]:
    """Loss and gradient norm of every step from iteration 1 on; None where unknown."""
    last = samples[-1].iteration
    loss: list[float | None] = [None] * last
    norm: list[float | None] = [None] * last
    for sample in samples:
        for i, (value, size) in enumerate(zip(sample.loss, sample.grad_norm, strict=True)):
            loss[sample.first_step - 1 + i] = value
            norm[sample.first_step - 1 + i] = size
    return loss, norm


def final_loss(samples: list[Sample], end: int) -> float:
    """Mean training loss in nats over the last steps up to iteration ``end``."""
    loss = per_step(samples)[0][end - FINAL_STEPS : end]
    if len(loss) != FINAL_STEPS or None in loss:
        raise ValueError(f"the run has not recorded steps {end - FINAL_STEPS + 1} to {end}")
    return sum(loss) / FINAL_STEPS


def summarise(folder: Path, *, injected_at: int, seconds: float) -> dict[str, Any]:
    """Read the three runs below ``folder``; keys as in the project's other results."""
    runs = {n: effective_history(folder / n) for n in ("recovered", "healthy", "left-alone")}
    events = {n: EventReader(folder / n).read() for n in runs}
    alarms = [e for e in events["recovered"] if e["kind"] == "alarm"]
    first = min(alarms, key=lambda e: e["iteration"], default=None)
    diagnosis = next((e for e in events["recovered"] if e["kind"] == "diagnosis"), None)
    rollback = next((e for e in events["recovered"] if e["kind"] == "rollback"), None)
    unattended = [
        e
        for e in events["left-alone"]
        if e["kind"] == "alarm" and base_name(e["signal"]) == DELTA2
    ]
    fires = scan(*per_step(runs["left-alone"]))
    calm = scan(*per_step(runs["healthy"]))
    alarmed, first_firing, not_in_twin, healthy_firings = {}, {}, {}, {}
    for rule in RULES:
        healthy = [i for i in calm[rule] if i > WARM_UP]
        since = [i for i in fires[rule] if i >= injected_at]
        alarmed[rule] = first_alarm(fires[rule], injected_at - 1, healthy)
        first_firing[rule] = since[0] if since else None
        not_in_twin[rule] = next((i for i in since if i not in healthy), None)
        healthy_firings[rule] = len(healthy)
    end = runs["healthy"][-1].iteration
    return {
        "injected_at": injected_at,
        "alarm_at": first and first["iteration"],
        "alarm_signal": first and first["signal"],
        "diagnosis": diagnosis and diagnosis["cause"],
        "delta2_alarm_at": min((e["iteration"] for e in unattended), default=None),
        "baselines": alarmed,
        "baselines_first_firing": first_firing,
        "baselines_first_not_in_healthy_run": not_in_twin,
        "baselines_healthy_firings": healthy_firings,
        "rolled_back_to": rollback and rollback["plan"]["checkpoint_iteration"],
        "final_iteration": end,
        "final_loss": final_loss(runs["recovered"], end),
        "healthy_loss": final_loss(runs["healthy"], end),
        "left_alone_iteration": runs["left-alone"][-1].iteration,
        "left_alone_loss": final_loss(runs["left-alone"], runs["left-alone"][-1].iteration),
        "healthy_alarms": sum(e["kind"] == "alarm" for e in events["healthy"]),
        "seconds": round(seconds, 1),
    }


def print_table(summary: dict[str, Any]) -> None:
    """The summary for people."""
    at = summary["injected_at"]

    def after(iteration: int | None) -> str:
        return "not at all" if iteration is None else f"{iteration}  (+{iteration - at})"

    rows = [
        ("fault injected at", str(at)),
        ("alarm at", f"{after(summary['alarm_at'])} by {summary['alarm_signal']}"),
        ("diagnosis", str(summary["diagnosis"])),
        ("rolled back to", str(summary["rolled_back_to"])),
        ("final loss", f"{summary['final_loss']:.4f} nat at {summary['final_iteration']}"),
        ("same run without the fault", f"{summary['healthy_loss']:.4f} nat"),
        ("", ""),
        ("left alone with the fault:", ""),
        ("  update spectrum (Δ2) alarm at", after(summary["delta2_alarm_at"])),
    ]
    for rule, iteration in summary["baselines"].items():
        calm = summary["baselines_healthy_firings"][rule]
        note = f"; it fires {calm} times in the healthy run" if calm else ""
        rows.append((f"  {rule} alarm at", after(iteration) + note))
    rows.append(
        (
            "  its loss in the end",
            f"{summary['left_alone_loss']:.4f} nat at {summary['left_alone_iteration']}",
        )
    )
    print()
    for name, value in rows:
        print(f"{name:34}{value}".rstrip())
