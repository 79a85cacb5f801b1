"""Reads a ``.wandb`` file back: LevelDB log format around W&B's own protocol buffers.

wandb 0.31 writes these files in its Go service and ships no reader in Python any more. Format:
7 bytes of header (``:W&B``, magic, version), then blocks of 32 KiB; a piece is CRC (4 bytes),
length (2), type (1: full, 2: first, 3: middle, 4: last).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

_BLOCK = 32768


def settle() -> None:
    """Wait for W&B's service, which still writes when ``finish`` has returned."""
    wandb.teardown()


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    at, whole = 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def _items(entries: Any) -> dict[str, Any]:
    return {
        entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


def history(path: Path) -> list[dict[str, Any]]:
    return [_items(r.history.item) for r in records(path) if r.HasField("history")]


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path):
        if record.HasField("summary"):
            found.update(_items(record.summary.update))
    return found


def runs(path: Path) -> list[wandb_internal_pb2.RunRecord]:
    return [r.run for r in records(path) if r.HasField("run")]


def alerts(path: Path) -> list[Any]:
    return [r.alert for r in records(path) if r.HasField("alert")]


def metrics(path: Path) -> list[Any]:
    return [r.metric for r in records(path) if r.HasField("metric")]
