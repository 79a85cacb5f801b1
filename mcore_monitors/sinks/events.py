"""The event log: ``RUN/events.jsonl``, one record a happening, version 1.

Kinds and their fields are frozen by a test; a later release may add fields and kinds, never take
one away.
"""

from __future__ import annotations

import json
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
        "start": (
            "world_size",
            "layers",
            "monitors",
            "mode",
            "limits",
            "host",
            "versions",
            "left_out",
        ),
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
        "diagnosis": ("cause", "confidence", "signals", "sentence", "site"),
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


class EventFollower:
    """Gives a sink the events that another rank writes to ``RUN/events.jsonl``.

    The host's W&B run may live on a rank that judges nothing (Megatron's last), while events are
    made on rank 0. Following the file costs no collective; it needs a run folder that both ranks
    see, and without one the sink gets samples only.

    Args:
        sink: takes samples as they come and events from the file, from now on.
        run_dir: the run folder.
    """

    def __init__(self, sink: Any, run_dir: str | os.PathLike[str]) -> None:
        self._sink = sink
        self._path = Path(run_dir) / EVENTS_FILE
        self._at = self._path.stat().st_size if self._path.exists() else 0

    def sample(self, sample: Sample) -> None:
        """Hand on the events so far, then the sample."""
        self._catch_up()
        self._sink.sample(sample)

    def event(self, event: Mapping[str, Any]) -> None:
        """This rank's own copy of an event; the file has it too."""

    def close(self, exit_code: int = 0) -> None:
        """Hand on what is left and close the sink."""
        self._catch_up()
        self._sink.close(exit_code)

    def _catch_up(self) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._at)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._sink.event(json.loads(line))
