"""Settings of a drill: a fault injected on purpose, to see the alarm and the recovery work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class DrillConfig:
    """A faulty attention kernel, switched on in the middle of a run.

    ``attention_row_term`` adds ``strength * mean|δ_row|`` to the row term of the softmax backward
    (the direct injector of :mod:`mcore_monitors.faults.attention`).
    """

    fault: Literal["attention_row_term"] = "attention_row_term"
    #: size of the error relative to the mean row term
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    #: layers that get the faulty kernel, counted from 1; empty means all
    layers: list[int] = field(default_factory=list)
    #: first faulty iteration
    from_iteration: Annotated[int, Field(gt=0)]
