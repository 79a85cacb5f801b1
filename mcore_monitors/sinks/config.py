"""The settings of the sinks that need any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mcore_monitors.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. Without a key a run is kept offline in the run folder."""

    enabled: bool | Literal["auto"] = "auto"
    """``auto`` and ``true``: online with a key, offline without one, off (with a message) where the
    package ``wandb`` is missing. ``false``: never."""
    project: str = "mcore-monitors"
    """Project of our own run; unused where the host already has a W&B run, which we then join."""
    name: str | None = None
    """Name of our own run; by default the name of the run folder."""
    entity: str | None = None
    """User or team; by default the one that the key belongs to."""
    signals: Literal["judged", "all"] = "judged"
    """``judged``: what a rule judges, layer by layer, and of everything else three numbers for the
    whole model. ``all``: everything layer by layer, a few hundred keys a layer. The local history
    holds every value in any case."""

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool) and self.enabled != "auto":
            hint = nearest(self.enabled, ["auto"]) if isinstance(self.enabled, str) else None
            raise ConfigError("wandb.enabled", self.enabled, "auto, true or false", hint)
        if not _is_text(self.project):
            raise ConfigError("wandb.project", self.project, "a non-empty text")
        if self.signals not in ("judged", "all"):
            raise ConfigError("wandb.signals", self.signals, "judged or all")
        for setting in ("name", "entity"):
            value = getattr(self, setting)
            if value is not None and not _is_text(value):
                raise ConfigError(f"wandb.{setting}", value, "a non-empty text, or null")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
