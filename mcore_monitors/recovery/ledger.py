"""The ledger of a run: its checkpoints, its plans, and whether it gave up (``RUN/recovery.json``).

The file is replaced as a whole and atomically, so that whatever kills the run leaves either the
state before a change or the state after it. Every rank may read it; only global rank 0 writes.
The schema is documented in ``docs/recovery.md``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mcore_monitors.errors import ConfigError, RecoveryError
from mcore_monitors.files import write_atomically
from mcore_monitors.recovery.config import Remedy

LEDGER_FILE = "recovery.json"
LEDGER_VERSION = 1

PENDING, VERIFIED, SUSPECT = "pending", "verified", "suspect"
PLANNED, APPLIED, DONE, FAILED = "planned", "applied", "done", "failed"

#: Checkpoints that the ledger remembers; older ones are of no use to a rollback.
KEPT = 200
#: Annotation → types that JSON may give for it.
_TYPES = {"int": int, "str": str, "float": (int, float)}


@dataclass(kw_only=True)
class Checkpoint:
    """One checkpoint that the host wrote."""

    iteration: int
    attempt: int
    """Number of rollbacks before it was written."""
    path: str
    """Folder (or file), absolute."""
    status: str = PENDING
    """``pending``, ``verified`` or ``suspect``."""
    reason: str = ""
    """Why it is suspect."""
    written_at: float
    """Seconds since the epoch."""
    consumed_samples: int
    """Training samples behind it, passed-over ones included."""
    passed_over_samples: int = 0
    """Samples that plans had the run pass over on the way to it."""
    digest: str
    """What its files looked like (:mod:`.files`)."""


@dataclass(kw_only=True)
class Plan:
    """One rollback: where to, what to leave out, what to change."""

    id: str
    """``rollback-1``, ``rollback-2``, …"""
    attempt: int
    """Number of this rollback in the run, from 1; what ``attempt`` in the history will be."""
    episode_attempt: int
    """Number of this rollback since the last one that succeeded, from 1 to ``max_attempts``."""
    created_at: float
    """Seconds since the epoch."""
    status: str = PLANNED
    """``planned``, ``applied``, ``done`` or ``failed``."""
    alarm_iteration: int
    onset_iteration: int
    cause: str
    sentence: str
    """The diagnosis in words."""
    checkpoint_iteration: int
    checkpoint_path: str
    remedy: Remedy
    """All that is in force from this plan on, that of earlier plans included; its ``pass_over`` is
    the setting, ``pass_over_samples`` what came of it."""
    pass_over_samples: int
    """Samples after the checkpoint that are not trained on."""
    passed_over_total: int
    """Samples passed over since the beginning of the run, these included."""


@dataclass(kw_only=True)
class Ledger:
    """What is known of a run's checkpoints and plans."""

    path: Path
    checkpoints: list[Checkpoint] = field(default_factory=list)
    """In the order of writing."""
    plans: list[Plan] = field(default_factory=list)
    """In the order of making."""
    gave_up: dict[str, Any] | None = None
    """``iteration``, ``time`` and ``reason``, once the run has given up."""

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> Ledger:
        """Read the ledger of a run folder; an empty one where there is no file yet.

        Raises:
            RecoveryError: the file cannot be understood; says what to do.
        """
        path = Path(run_dir) / LEDGER_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls(path=path)
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(path, str(error)) from error
        try:
            data = json.loads(text)
            if data["version"] != LEDGER_VERSION:
                raise ValueError(f"version {data['version']!r} instead of {LEDGER_VERSION}")
            return cls(
                path=path,
                checkpoints=[_checkpoint(entry) for entry in data["checkpoints"]],
                plans=[_plan(entry) for entry in data["plans"]],
                gave_up=_gave_up(data["gave_up"]),
            )
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(path, f"{type(error).__name__}: {error}") from error

    def save(self) -> None:
        """Replace the file atomically; when this returns, the new state survives a power cut.

        Raises:
            OSError: the disk refuses; the old state is still there.
        """
        data = {
            "version": LEDGER_VERSION,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "plans": [asdict(plan) for plan in self.plans],
            "gave_up": self.gave_up,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")

    def copy(self) -> Ledger:
        """Return a copy whose entries can be changed without changing these."""
        return Ledger(
            path=self.path,
            checkpoints=[replace(checkpoint) for checkpoint in self.checkpoints],
            plans=[replace(plan) for plan in self.plans],
            gave_up=self.gave_up,
        )

    def enter(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint; one written to the same place before is no more."""
        kept = [old for old in self.checkpoints if old.path != checkpoint.path]
        self.checkpoints = [*kept, checkpoint][-KEPT:]

    @property
    def last_plan(self) -> Plan | None:
        """The newest plan, whatever its status."""
        return self.plans[-1] if self.plans else None

    @property
    def episode(self) -> list[Plan]:
        """The plans of the episode that is open: since one succeeded, or since a person let a run
        that had given up start again."""
        last = self.last_plan
        if last is None or last.status == DONE or (last.status == FAILED and self.gave_up is None):
            return []
        return self.plans[-last.episode_attempt :]

    def good(self, before: float) -> list[Checkpoint]:
        """Return the verified checkpoints of iterations below ``before``, the newest first."""
        found = [c for c in self.checkpoints if c.status == VERIFIED and c.iteration < before]
        return sorted(found, key=lambda checkpoint: checkpoint.iteration, reverse=True)


def _build(kind: type, entry: dict[str, Any], statuses: tuple[str, ...] = ()) -> Any:
    built = kind(**entry)
    for f in fields(kind):
        value, allowed = getattr(built, f.name), _TYPES.get(str(f.type))
        if allowed is not None and (not isinstance(value, allowed) or isinstance(value, bool)):
            raise ValueError(f"{kind.__name__.lower()} with {f.name} {value!r}, not {f.type}")
    if statuses and built.status not in statuses:
        raise ValueError(f"status {built.status!r} is none of {', '.join(statuses)}")
    return built


def _checkpoint(entry: dict[str, Any]) -> Checkpoint:
    return _build(Checkpoint, entry, (PENDING, VERIFIED, SUSPECT))


def _plan(entry: dict[str, Any]) -> Plan:
    remedy = _build(Remedy, entry["remedy"])
    return _build(Plan, {**entry, "remedy": remedy}, (PLANNED, APPLIED, DONE, FAILED))


def _gave_up(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    if entry is not None and not (
        isinstance(entry["iteration"], int) and isinstance(entry["reason"], str)
    ):
        raise ValueError("gave_up without iteration and reason")
    return entry


def _unusable(path: Path, why: str) -> RecoveryError:
    return RecoveryError(
        f"{path} cannot be used: {why}. It says which checkpoints are good and which plan has to "
        f"be obeyed, so the run does not start without it. Restore it from a backup, or, to start "
        f"with no recorded checkpoint, plan and remedy, move it away: mv {path} {path}.bad"
    )
