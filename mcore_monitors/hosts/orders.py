"""What is put in force on a model, and how that is said and recorded; the same on every host."""

from __future__ import annotations

from collections.abc import Iterable

from .. import parallel
from ..config import DrillConfig
from ..messages import say
from ..recovery import StartOrder
from ..runtime import Runtime
from .taps import AttentionKernel, AttentionTap


def tell_remedy(order: StartOrder, runtime: Runtime) -> None:
    """Record the remedies of a plan, which are in force from here on."""
    runtime.event(
        "remedy",
        order.iteration,
        plan_id=order.plan_id,
        attention=order.remedy.attention,
        learning_rate_factor=order.remedy.learning_rate_factor,
        pass_over_samples=order.pass_over_samples,
    )


def put_fault(
    drill: DrillConfig,
    layers: list[int],
    taps: Iterable[AttentionTap],
    kernel: AttentionKernel,
    runtime: Runtime,
) -> None:
    """Start a drill, and say it loudly.

    Args:
        layers: all layers that it damages, in the whole model.
        taps: those of them that are on this rank.
        kernel: the faulty kernel.
    """
    for tap in taps:
        tap.faulty, tap.faulty_from = kernel, drill.from_iteration
    runtime.event(
        "drill",
        drill.from_iteration,
        fault=drill.fault,
        strength=drill.strength,
        layers=layers,
        from_iteration=drill.from_iteration,
    )
    if parallel.rank() == 0:
        say(
            f"DRILL: {drill.fault} of strength {drill.strength} in layers {layers} "
            f"from iteration {drill.from_iteration} on. This run is being damaged on purpose."
        )
