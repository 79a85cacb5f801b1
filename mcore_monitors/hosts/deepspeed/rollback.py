"""Carrying out a plan while the processes live on.

The plan is on disk before anything happens here, and is marked as obeyed after everything has: a
kill at any moment in between leaves a plan that the next start obeys from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import parallel
from ...errors import HostError
from ...messages import say
from ..orders import tell_remedy
from .checkpoints import order_for_all

if TYPE_CHECKING:
    from .engine import EngineMonitors


def go_back(ours: EngineMonitors, put_data_back: Callable[[int], None]) -> None:
    """Load the plan's checkpoint, put the data back, apply the remedies. On every rank together.

    Args:
        ours: the monitors of the engine that goes back.
        put_data_back: lets the data go on from a position in sequences.

    Raises:
        HostError: there is no plan, or it can't be obeyed.
        Exception: DeepSpeed or the training script could not do its part.
    """
    order = order_for_all(ours.config)
    if order is None:
        raise HostError("there is no recovery plan to obey.")
    if parallel.rank() == 0:
        say(f"{order.plan_id}: back to iteration {order.iteration} in place")
    ours.checkpoints.load_ordered(order)
    put_data_back(ours.engine.global_samples)
    ours.apply(order)
    ours.runtime.gone_back(order.iteration, order.attempt)
    tell_remedy(order, ours.runtime)
