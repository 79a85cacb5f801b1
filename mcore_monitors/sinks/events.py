"""The event log: ``RUN/events.jsonl``, one record a happening, version 1.

Kinds and their fields are frozen by a test; a later release may add fields and kinds, never take
one away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mcore_monitors.sample import Sample
from mcore_monitors.sinks.jsonl import JsonLines, plain, read_json_lines

EVENTS_FILE = "events.jsonl"
EVENT_VERSION = 1

#: Kind → the fields it always has, beside v, time, kind, iteration and attempt.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "start": ("world_size", "layers", "monitors", "mode", "host", "versions"),
        "resume": ("from_iteration",),
        "drill": ("fault", "strength", "layers", "from_iteration"),
        "alarm": (
            "signal",
            "layer",
            "unit",
            "onset_iteration",
            "severity",
            "rule",
            "value",
            "evidence",
        ),
        "diagnosis": ("cause", "confidence", "signals", "sentence"),
        "checkpoint": ("path", "status"),
        "rollback": ("plan",),
        "remedy": (),
        "recovered": ("plan_id",),
        "gave_up": ("reason",),
        "monitor_disabled": ("monitor", "error"),
        "message": ("text",),
        "stop": ("exit_code",),
    }
)


def stamp(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of an event: version and time added, everything JSON-ready.

    Args:
        event: at least kind, iteration and attempt; a time that it already has is kept.
    """
    return {"v": EVENT_VERSION, "time": round(time.time(), 3), **plain(event)}


class EventWriter:
    """Appends events to ``RUN/events.jsonl`` and waits for the disk: they are few, and they matter.

    Raises:
        ConfigError: the run folder cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._lines = JsonLines(Path(run_dir) / EVENTS_FILE)

    def sample(self, sample: Sample) -> None:
        """Samples have a file of their own."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Append one event."""
        self._lines.write(stamp(event), durable=True)

    def close(self, exit_code: int = 0) -> None:
        """Close the file."""
        self._lines.close()


class EventReader:
    """Reads ``RUN/events.jsonl``, also while the run is being written."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir) / EVENTS_FILE

    def read(self) -> list[dict[str, Any]]:
        """Return every event in the order of the file; a torn last line is left out.

        Raises:
            MonitorsError: the file is missing or holds something else; names file and line.
        """
        return read_json_lines(self.path)
