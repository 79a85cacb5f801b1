"""Settings of recovery: whether to act, how to know a good checkpoint, what to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

#: ``pass_over`` that means: all samples between the checkpoint and the alarm
UP_TO_THE_ALARM = -1

Cause = Literal["attention_numerics", "router_or_learning_rate", "combined", "data", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What is changed when a run goes on from a checkpoint."""

    attention: Literal["host", "safe"] = "host"
    """``safe``: plain fp32 attention instead of the host's kernel."""
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Multiplies every learning rate of the schedule; factors of several attempts multiply."""
    pass_over: Annotated[int, Field(ge=UP_TO_THE_ALARM)] = 0
    """Samples behind the checkpoint that are not trained on; −1: all up to the alarm."""


REMEDIES: dict[str, Remedy] = {
    "attention_numerics": Remedy(attention="safe"),
    "router_or_learning_rate": Remedy(learning_rate_factor=0.5),
    "combined": Remedy(attention="safe", learning_rate_factor=0.5),
    "data": Remedy(pass_over=UP_TO_THE_ALARM),
    "unknown": Remedy(pass_over=UP_TO_THE_ALARM),
}
"""What is done for each diagnosis unless the configuration says otherwise."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """When and how a run goes back to a checkpoint known to be good."""

    mode: Literal["log", "notify", "rollback"] = "log"
    """``log``: only record. ``notify``: alert as well. ``rollback``: go back, within bounds."""
    quiet: Annotated[int, Field(gt=0)] = 100
    """Iterations without an alarm after which a checkpoint is verified and a plan is done."""
    margin: Annotated[int, Field(ge=0)] = 0
    """A checkpoint must be more than this many iterations older than the onset."""
    max_attempts: Annotated[int, Field(gt=0)] = 2
    """Rollbacks in one episode before the run stops for a person to look."""
    remedies: dict[Cause, Remedy] = field(default_factory=dict)
    """Remedy by cause, instead of :data:`REMEDIES`."""

    def remedy(self, cause: str) -> Remedy:
        """The remedy for a diagnosis."""
        return self.remedies.get(cause, REMEDIES[cause])
