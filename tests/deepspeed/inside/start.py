"""Start a walk and read what it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_monitors.sample import Sample
from mcore_monitors.sinks.history import HistoryReader

from ..processes import start


@dataclass
class Walked:
    """What a walk left in its folder."""

    folder: Path
    processes: int

    def samples(self, name: str) -> list[Sample]:
        """The history of a layout."""
        return HistoryReader(self.folder / name).read()

    def ranks(self, name: str) -> list[dict[str, Any]]:
        """What each rank wrote of a layout."""
        return [
            json.loads((self.folder / f"{name}.{rank}.json").read_text())
            for rank in range(self.processes)
        ]


def walk(folder: Path, processes: int, layouts: list[dict[str, Any]]) -> Walked:
    """Train the engines of all layouts, one after another, in a few processes.

    Raises:
        AssertionError: a process failed; its output is in the text.
    """
    (folder / "layouts.json").write_text(json.dumps(layouts))
    code, output = start("tests.deepspeed.inside.walk", folder, processes=processes)
    assert code == 0, output[-4000:]
    return Walked(folder, processes)
