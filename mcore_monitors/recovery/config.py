"""Settings of recovery: whether it acts, how long a checkpoint has to prove itself, the remedies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mcore_monitors.detection.alarm import CAUSES
from mcore_monitors.errors import ConfigError, nearest

#: ``pass_over``: everything between the checkpoint and the alarm.
UP_TO_THE_ALARM = -1


def _integer(setting: str, value: object, least: int, allowed: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(setting, value, allowed or f"an integer >= {least}")


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What is changed when a run goes back to a checkpoint."""

    attention: Literal["keep", "safe"] = "keep"
    """``safe``: the trusted attention path from there on; ``keep``: attention as it is."""
    learning_rate_factor: float = 1.0
    """Factor on every learning rate of the schedule from there on, in (0, 1]."""
    pass_over: int = 0
    """Training samples after the checkpoint that are not trained on again; -1: all up to the
    alarm."""

    def __post_init__(self) -> None:
        prefix = "recovery.remedies.*."
        if self.attention not in ("keep", "safe"):
            hint = nearest(str(self.attention), ("keep", "safe"))
            raise ConfigError(f"{prefix}attention", self.attention, "keep or safe", hint)
        factor = self.learning_rate_factor
        good = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not good or not math.isfinite(factor) or not 0.0 < factor <= 1.0:
            allowed = "a number above 0 and at most 1"
            raise ConfigError(f"{prefix}learning_rate_factor", factor, allowed)
        allowed = "a number of samples, or -1 for all up to the alarm"
        _integer(f"{prefix}pass_over", self.pass_over, UP_TO_THE_ALARM, allowed)

    def on_top_of(self, before: Remedy) -> Remedy:
        """Return both together: factors multiply, the safe attention path stays on."""
        return Remedy(
            attention="safe" if "safe" in (self.attention, before.attention) else "keep",
            learning_rate_factor=self.learning_rate_factor * before.learning_rate_factor,
            pass_over=self.pass_over,
        )


#: Remedy of each cause, unless the settings name another.
DEFAULT_REMEDIES: dict[str, Remedy] = {
    "attention_numerics": Remedy(attention="safe"),
    # no other router, norm or loss kernel is at hand: go back, and if it comes again a person looks
    "router_numerics": Remedy(),
    "kernel_numerics": Remedy(),
    "router_or_learning_rate": Remedy(learning_rate_factor=0.5),
    "combined": Remedy(attention="safe", learning_rate_factor=0.5),
    "data": Remedy(pass_over=UP_TO_THE_ALARM),
    "unknown": Remedy(pass_over=UP_TO_THE_ALARM),
}


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What happens after an alarm."""

    mode: Literal["log", "notify", "rollback"] = "log"
    """``log``: record it. ``notify``: say it aloud too. ``rollback``: on a critical alarm go back
    to a good checkpoint."""
    how: Literal["auto", "in_place", "relaunch"] = "auto"
    """``relaunch``: the run ends with exit code 85 and goes back when it is started again.
    ``in_place``: the processes go on and load the checkpoint themselves; DeepSpeed only.
    ``auto``: in place where the host and the training script can, else by relaunch."""
    quiet: int = 100
    """Iterations without a critical alarm after which a checkpoint counts as good, and after which
    a rollback counts as successful. Longer than the slowest detector's delay."""
    margin: int = 0
    """Iterations by which the checkpoint must lie before the onset, on top of being verified."""
    max_attempts: int = 2
    """Rollbacks in one episode (until one succeeds) before the run ends with exit code 86."""
    remedies: dict[str, Remedy] = field(default_factory=dict)
    """Cause → remedy; causes that are left out keep their default."""

    def __post_init__(self) -> None:
        modes = ("log", "notify", "rollback")
        if self.mode not in modes:
            hint = nearest(str(self.mode), modes)
            raise ConfigError("recovery.mode", self.mode, ", ".join(modes), hint)
        ways = ("auto", "in_place", "relaunch")
        if self.how not in ways:
            hint = nearest(str(self.how), ways)
            raise ConfigError("recovery.how", self.how, ", ".join(ways), hint)
        _integer("recovery.quiet", self.quiet, 1)
        _integer("recovery.margin", self.margin, 0)
        _integer("recovery.max_attempts", self.max_attempts, 1)
        for cause, remedy in self.remedies.items():
            setting = f"recovery.remedies.{cause}"
            if cause not in CAUSES:
                hint = nearest(str(cause), CAUSES)
                raise ConfigError(setting, cause, "one of " + ", ".join(CAUSES), hint)
            if not isinstance(remedy, Remedy):
                allowed = "a remedy (attention, learning_rate_factor, pass_over)"
                raise ConfigError(setting, remedy, allowed)

    def remedy(self, cause: str) -> Remedy:
        """Return the remedy for a cause."""
        return self.remedies.get(cause, DEFAULT_REMEDIES[cause])

    def check_quiet(self, slowest_delay: int) -> None:
        """See that a checkpoint cannot be verified before a fault in it would have been seen.

        Args:
            slowest_delay: iterations until the slowest rule alarms
                (``DetectionConfig.slowest_delay``).

        Raises:
            ConfigError: ``quiet`` is shorter than that.
        """
        if self.quiet < slowest_delay:
            raise ConfigError(
                "recovery.quiet",
                self.quiet,
                f"an integer >= {slowest_delay}",
                "A fault runs that many iterations before the slowest rule sees it (interval × "
                "sustain + the longest judged window), and a checkpoint must not count as good "
                "earlier.",
            )
