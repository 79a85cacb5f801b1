"""Append-only files of one JSON object a line, made to survive a kill at any moment."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_monitors.errors import ConfigError, MonitorsError


class JsonLines:
    """Writer: one record is one ``write`` to the operating system, so that a line is whole or torn.

    Opening an existing file continues it; a last line that an earlier process left torn is removed
    first, because what follows would otherwise be glued to it.

    Args:
        path: the file; missing folders are made.

    Raises:
        ConfigError: the folder cannot be written; names the setting ``run_dir``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
            self._mend()
        except OSError as error:
            raise ConfigError(
                "run_dir",
                str(self.path.parent),
                "a folder that this user can write",
                f"{self.path.name}: {error.strerror or error}",
            ) from error

    def _mend(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        tail, start = b"", size
        while start > 0 and b"\n" not in tail:
            step = min(start, 1 << 16)
            start -= step
            self._file.seek(start)
            tail = self._file.read(step) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            json.loads(last)
            self._file.write(b"\n")
        except ValueError:
            self._file.truncate(size - len(last))

    def write(self, record: Mapping[str, Any], *, durable: bool = False) -> None:
        """Append one record.

        Args:
            record: JSON-ready; a float that is not finite becomes null.
            durable: wait until the disk has it (for the few records that must not be lost).

        Raises:
            OSError: the disk refuses.
        """
        try:
            line = _dumps(record)
        except (TypeError, ValueError):  # something in it is not JSON's own
            line = _dumps(plain(record))
        self.write_text(line)
        if durable:
            os.fsync(self._file.fileno())

    def write_text(self, line: str) -> None:
        """Append one record that is JSON already, on one line.

        Raises:
            OSError: the disk refuses.
        """
        data = line.encode() + b"\n"
        if self._file.write(data) != len(data):
            raise OSError(f"{self.path}: the disk took only a part of a record (is it full?)")

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()


def _dumps(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return all records; a torn last line is left out.

    Raises:
        MonitorsError: the file cannot be read, or a line before the last is not a JSON object;
            names the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MonitorsError(f"{path}: {error.strerror or error}") from error
    # A finished file ends with a newline, hence an empty last piece.
    torn = lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        records.append(_parse(path, number, line))
    if torn.strip():
        try:
            records.append(_parse(path, len(lines) + 1, torn))
        except MonitorsError:
            pass
    return records


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise MonitorsError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise MonitorsError(f"{path}, line {number}: not a JSON object")
    return record


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's own types: paths and others as text, NaN and inf as null."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)
