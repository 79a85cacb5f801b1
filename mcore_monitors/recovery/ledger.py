"""The ledger: which checkpoints exist, how good they are, and what was planned with them.

``RUN/recovery.json`` (schema version 1) is rewritten atomically by global rank 0 and read at every
start. A checkpoint is *pending* when written, *verified* after a quiet time, *suspect* when an
alarm's onset does not lie behind it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecoveryError
from ..files import write_atomically

LEDGER_FILE = "recovery.json"
VERSION = 1
#: Files below this size go into a digest with their content, larger ones with name and size only:
#: hashing terabytes on one rank would hold up the run.
_DIGEST_BYTES = 2**20


@dataclass(kw_only=True)
class Checkpoint:
    """One checkpoint of the run."""

    iteration: int
    #: number of rollbacks before it was written
    attempt: int
    #: folder of this checkpoint, e.g. ``…/iter_0000550``
    path: str
    consumed_samples: int
    status: str = "pending"
    written_at: float = field(default_factory=time.time)
    digest: str = ""


@dataclass(kw_only=True)
class Plan:
    """One return to a checkpoint: planned, then applied, then done."""

    #: counts from 1; the run's attempt number while and after it is applied
    attempt: int
    alarm_iteration: int
    onset_iteration: int
    cause: str
    sentence: str
    checkpoint_iteration: int
    checkpoint_path: str
    checkpoint_digest: str
    #: samples behind the checkpoint that are passed over
    pass_over_samples: int
    #: in force from here on, earlier plans' remedies included
    attention: str
    learning_rate_factor: float
    status: str = "planned"
    created_at: float = field(default_factory=time.time)


class Ledger:
    """The state of ``RUN/recovery.json``.

    Attributes:
        checkpoints: by rising iteration; one entry a path.
        plans: in the order they were made.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / LEDGER_FILE
        self.checkpoints: list[Checkpoint] = []
        self.plans: list[Plan] = []

    @classmethod
    def load(cls, run_dir: str | Path) -> Ledger:
        """Read the ledger of a run folder; an empty one where there is none yet.

        Raises:
            RecoveryError: the file can't be read or is of another version. It is not touched.
        """
        ledger = cls(run_dir)
        try:
            data = json.loads(ledger.path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise RecoveryError(
                    f"{ledger.path} has schema version {data['version']!r}; this release reads "
                    f"{VERSION}. Use the release that wrote it, or another run_dir."
                )
            ledger.checkpoints = [Checkpoint(**c) for c in data["checkpoints"]]
            ledger.plans = [Plan(**p) for p in data["plans"]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecoveryError(
                f"{ledger.path} can't be read ({type(error).__name__}: {error}). It is written in "
                "one piece, so something else has changed it; restore it, or move it away to "
                "start without recovery state."
            ) from None
        return ledger

    def save(self) -> None:
        """Write the ledger atomically."""
        data: dict[str, Any] = {
            "version": VERSION,
            "checkpoints": [asdict(c) for c in self.checkpoints],
            "plans": [asdict(p) for p in self.plans],
        }
        write_atomically(self.path, json.dumps(data, indent=1) + "\n")

    @property
    def attempt(self) -> int:
        """Number of rollbacks so far."""
        return len(self.plans)

    @property
    def plan(self) -> Plan | None:
        """The latest plan."""
        return self.plans[-1] if self.plans else None

    @property
    def passed_over_samples(self) -> int:
        """Samples that all plans together pass over."""
        return sum(p.pass_over_samples for p in self.plans)

    def enter(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint; one that was written to the same folder before is gone."""
        kept = [c for c in self.checkpoints if c.path != checkpoint.path]
        self.checkpoints = sorted([*kept, checkpoint], key=lambda c: (c.iteration, c.attempt))


def digest(folder: str | Path) -> str:
    """SHA-256 over names and sizes of a checkpoint's files, and the content of the small ones.

    Returns:
        hex digest; an empty text where the folder holds no file.
    """
    root, total, any_file = Path(folder), hashlib.sha256(), False
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        any_file = True
        size = path.stat().st_size
        total.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        if size < _DIGEST_BYTES:
            total.update(path.read_bytes())
    return total.hexdigest() if any_file else ""


def damage(path: str, expected: str) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if not Path(path).is_dir():
        return f"{path} is gone"
    return None if digest(path) == expected else f"the files of {path} have changed"
