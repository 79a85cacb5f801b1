"""One start of two processes that several test files look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .processes import start


class Rollbacks:
    """What :mod:`.inside.rollbacks` left behind.

    Attributes:
        folder: of all scenarios.
        seen: scenario → what each rank saw.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        self.seen: dict[str, list[dict[str, Any]]] = {
            name: [rank[name] for rank in ranks] for name in ranks[0]
        }


@pytest.fixture(scope="session")
def rollbacks(tmp_path_factory: pytest.TempPathFactory) -> Rollbacks:
    """All scenarios, gone through once."""
    folder = tmp_path_factory.mktemp("rollbacks")
    code, output = start("tests.deepspeed.inside.rollbacks", folder, processes=2)
    assert code == 0, output[-4000:]
    return Rollbacks(folder)
