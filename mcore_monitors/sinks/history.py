"""The local history: ``RUN/history.jsonl``, one record a sample, at full resolution.

A run that went back to a checkpoint holds some iterations twice. :func:`segments` takes it apart
into the stretches between two starts, and :func:`effective` gives the course that the present
weights have really been through.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_monitors.errors import MonitorsError
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.jsonl import JsonLines, read_json_lines

HISTORY_FILE = "history.jsonl"


class HistoryWriter:
    """Appends samples to ``RUN/history.jsonl``; opening an existing run continues it.

    Raises:
        ConfigError: the run folder cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._lines = JsonLines(Path(run_dir) / HISTORY_FILE)

    def sample(self, sample: Sample) -> None:
        """Append one sample; it has left this process when the call returns."""
        self._lines.write_text(sample.to_json())

    def event(self, event: Mapping[str, Any]) -> None:
        """Events have a file of their own."""

    def close(self, exit_code: int = 0) -> None:
        """Close the file."""
        self._lines.close()


class HistoryReader:
    """Reads ``RUN/history.jsonl``, also while the run is being written."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir) / HISTORY_FILE

    def read(self) -> list[Sample]:
        """Return every sample in the order of the file; a torn last line is left out.

        Raises:
            MonitorsError: the file is missing or holds something else; names file and line.
        """
        samples = []
        for number, record in enumerate(read_json_lines(self.path), start=1):
            try:
                samples.append(Sample.from_record(record))
            except MonitorsError as error:
                raise MonitorsError(f"{self.path}, line {number}: {error}") from error
        return samples


@dataclass(kw_only=True)
class Segment:
    """A stretch of a run between two starts."""

    attempt: int
    """Number of rollbacks before it."""
    resumed_from: int | None
    """Iteration it went on from; None for the beginning."""
    samples: list[Sample]
    """In rising order of iteration."""
    kept: int
    """How many of the samples the present course still contains; the rest was abandoned."""


def segments(records: Iterable[Sample], resumes: Iterable[Mapping[str, Any]] = ()) -> list[Segment]:
    """Cut a history where the run went back to a checkpoint.

    Args:
        records: samples in the order of the file.
        resumes: events; those of kind ``resume`` are used (``from_iteration``, ``attempt``), others
            are passed over. Where one is missing, the first repeated iteration says where to cut.

    Returns:
        The stretches in the order of the file; together they hold every sample of ``records``.
    """
    starts: dict[int, list[int]] = {}
    for event in resumes:
        if event.get("kind", "resume") == "resume" and event.get("from_iteration") is not None:
            attempt, iteration = int(event["attempt"]), int(event["from_iteration"])
            starts.setdefault(attempt, []).append(iteration)

    parts: list[Segment] = []
    for sample in records:
        last = parts[-1].samples[-1] if parts else None
        goes_on = last and last.attempt == sample.attempt and last.iteration < sample.iteration
        if not goes_on:
            # Several starts may share an attempt (a crash is no rollback): the right one is the
            # latest that lies before this sample.
            before = [i for i in starts.get(sample.attempt, ()) if i < sample.iteration]
            origin = max(before, default=sample.iteration - 1 if parts else None)
            for part in parts:
                part.kept = sum(old.iteration <= origin for old in part.samples[: part.kept])
            parts.append(Segment(attempt=sample.attempt, resumed_from=origin, samples=[], kept=0))
        parts[-1].samples.append(sample)
        parts[-1].kept += 1
    return parts


def effective(records: Sequence[Sample], resumes: Iterable[Mapping[str, Any]] = ()) -> list[Sample]:
    """Return the history that the present weights have been through, rollbacks resolved.

    At attempt a, resumed from checkpoint iteration c, that is the earlier records up to c followed
    by those of attempt a; applied again for every rollback. Arguments as in :func:`segments`.
    """
    return [sample for part in segments(records, resumes) for sample in part.samples[: part.kept]]


def effective_history(run_dir: str | os.PathLike[str], upto: int | None = None) -> list[Sample]:
    """Return the effective history of a run folder, empty where nothing was written yet.

    Args:
        run_dir: the run folder.
        upto: leave out what lies after this iteration, e.g. the checkpoint that is resumed.

    Raises:
        MonitorsError: a file holds something else; names file and line.
    """
    history, events = HistoryReader(run_dir), EventReader(run_dir)
    samples = history.read() if history.path.exists() else []
    kept = effective(samples, events.read() if events.path.exists() else [])
    return [sample for sample in kept if upto is None or sample.iteration <= upto]
