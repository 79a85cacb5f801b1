"""The errors a user can meet, and the exit codes a scheduler can rely on.

Every message names the setting, the value that was given and what would be right, so that it can
be acted on at night without opening the source.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

#: A recovery plan has been written; start the same command again and it will be obeyed.
EXIT_ROLLBACK = 85
#: The allowed attempts are spent, or no good checkpoint exists; a person has to look.
EXIT_GAVE_UP = 86
#: ``mcore-monitors check`` found a broken conservation identity.
EXIT_BROKEN = 87
#: A run that was started by ``mcore-monitors check`` has measured what is needed and ends.
EXIT_CHECKED = 88
#: The configuration cannot be used (EX_CONFIG of sysexits.h); nothing was started.
EXIT_BAD_CONFIG = 78


class MonitorsError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MonitorsError):
    """A setting has a value that cannot be used.

    Args:
        setting: dotted name as the user wrote it, e.g. ``detection.sustain``.
        value: what was given.
        allowed: what would be right, in words.
        hint: a further sentence, e.g. the nearest spelling.
    """

    def __init__(self, setting: str, value: Any, allowed: str, hint: str | None = None) -> None:
        self.setting, self.value, self.allowed, self.hint = setting, value, allowed, hint
        text = f"{setting}: {value!r} cannot be used; allowed: {allowed}."
        super().__init__(f"{text} {hint}" if hint else text)


class HostError(MonitorsError):
    """The host (Megatron-core, DeepSpeed) is not in a state that can be monitored."""


class PatchError(MonitorsError):
    """A host's files are not what a patch expects; nothing was changed."""


class RecoveryError(MonitorsError):
    """The recovery state cannot be read or obeyed."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return ``Did you mean 'x'?`` for the nearest known spelling, or None."""
    match = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {match[0]!r}?" if match else None
