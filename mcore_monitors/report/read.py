"""Reads a run folder: history, events and ledger, checked and put in order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_monitors.errors import MonitorsError, RecoveryError
from mcore_monitors.recovery.ledger import LEDGER_FILE, PENDING, Ledger
from mcore_monitors.report.data import AlarmGroup, Mark, Run
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader, segments


def read_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run folder, also while the run is going on.

    Raises:
        MonitorsError: the folder or its history is missing or empty, or a file holds something
            else; names the file.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        why = "is a file, not a run folder" if folder.exists() else "there is no such folder"
        raise MonitorsError(f"{folder}: {why}; give the run_dir of the run's configuration")
    history, log = HistoryReader(folder), EventReader(folder)
    samples = history.read()
    if not any(s.loss or s.signals for s in samples):
        raise MonitorsError(f"{history.path} is empty: the run has not taken a sample yet")
    events = log.read() if log.path.exists() else []
    try:
        ledger = Ledger.load(folder)
    except RecoveryError as error:
        raise MonitorsError(
            f"{folder / LEDGER_FILE} is not a ledger of this release: {error.__cause__}"
        ) from error
    _check_all(log.path, events)
    return Run(
        name=folder.resolve().name,
        path=folder,
        parts=segments(samples, events),
        events=events,
        alarms=_alarms(events),
        drills=_drills(events),
        checkpoints=_checkpoints(events, ledger),
        plans=ledger.plans,
        gave_up=_gave_up(events, ledger),
    )


_INTEGERS = {
    "alarm": ("layer", "unit", "onset_iteration"),
    "resume": ("from_iteration",),
    "drill": ("from_iteration",),
    "checkpoint": ("checkpoint_iteration",),
}
_NEEDED = {"alarm": ("signal", "severity"), "drill": ("fault", "from_iteration")}


def _check(event: Mapping[str, Any]) -> None:
    kind = event["kind"]
    if not isinstance(kind, str):
        raise TypeError(f"kind {kind!r}")
    optional = [name for name in _INTEGERS.get(kind, ()) if event.get(name) is not None]
    for name in ("iteration", "attempt", *optional):
        if not isinstance(event[name], int):
            raise TypeError(f"{name} {event[name]!r} is not an integer")
    for name in _NEEDED.get(kind, ()):
        event[name]


def _check_all(path: Path, events: list[dict[str, Any]]) -> None:
    for number, event in enumerate(events, start=1):
        try:
            _check(event)
        except (KeyError, TypeError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise MonitorsError(f"{path}, line {number}: not an event record ({why})") from error


def _alarms(events: list[dict[str, Any]]) -> list[AlarmGroup]:
    groups: dict[tuple, AlarmGroup] = {}
    for event in events:
        if event["kind"] != "alarm":
            continue
        at, signal, severity = event["iteration"], str(event["signal"]), str(event["severity"])
        onset = at if event.get("onset_iteration") is None else event["onset_iteration"]
        group = groups.setdefault(
            (signal, at, event["attempt"], severity),
            AlarmGroup(
                signal=signal,
                iteration=at,
                attempt=event["attempt"],
                severity=severity,
                onset=onset,
                worst=event,
            ),
        )
        group.onset = min(group.onset, onset)
        group.units += event.get("unit") is not None
        if event.get("layer") is not None:
            group.layers = sorted({*group.layers, event["layer"]})
        if _excess(event) > _excess(group.worst):
            group.worst = event
    return list(groups.values())


def _excess(event: Mapping[str, Any]) -> float:
    value, limit, band = event.get("value"), event.get("limit"), event.get("band")
    try:
        return abs(float(value) / float(limit)) if limit else abs(float(band["z"]))
    except (TypeError, KeyError, ValueError):
        return 0.0


def _drills(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    once: dict[tuple, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "drill":
            once.setdefault((str(event["fault"]), event["from_iteration"]), event)
    return list(once.values())


def _checkpoints(events: list[dict[str, Any]], ledger: Ledger) -> list[Mark]:
    marks: list[Mark] = []
    for event in events:
        if event["kind"] != "checkpoint":
            continue
        path, status = str(event.get("path")), str(event.get("status"))
        at = event.get("checkpoint_iteration")
        mark = next((m for m in reversed(marks) if m.path == path), None)
        if mark is None or status == PENDING:
            mark = Mark(
                iteration=event["iteration"] if at is None else at,
                attempt=event["attempt"],
                status=status,
                path=path,
            )
            marks.append(mark)
        mark.status, mark.reason = status, str(event.get("reason") or "")
    for entry in ledger.checkpoints:
        known = [m for m in marks if (m.path, m.attempt) == (entry.path, entry.attempt)]
        mark = known[-1] if known else None
        if mark is None:
            mark = Mark(
                iteration=entry.iteration,
                attempt=entry.attempt,
                status=entry.status,
                path=entry.path,
            )
            marks.append(mark)
        mark.status, mark.reason = entry.status, entry.reason
    return marks


def _gave_up(events: list[dict[str, Any]], ledger: Ledger) -> str | None:
    if ledger.gave_up is not None:
        return str(ledger.gave_up["reason"])
    # A person may let a run that gave up start again: what counts is how it goes on.
    after = [e for e in events if e["kind"] in ("gave_up", "start")]
    if after and after[-1]["kind"] == "gave_up":
        return str(after[-1].get("reason"))
    return None
