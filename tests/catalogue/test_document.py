"""The page of signals is what the code says, and the code says all of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mcore_monitors.catalogue import SIGNALS
from mcore_monitors.catalogue.document import COMMAND, document

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    kept = (ROOT / "docs" / "signals.md").read_text()
    assert kept == document(), f"docs/signals.md is not what the catalogue says; run: {COMMAND}"


def test_the_command_writes_the_page() -> None:
    """As a user runs it: without torch, in a fresh process."""
    words = COMMAND.split(" > ")[0].split()
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == document()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_says_everything(name: str) -> None:
    info = SIGNALS[name]
    for what in ("formula", "source", "unit", "measure", "healthy", "meaning", "tested"):
        assert getattr(info, what), f"{name} has no {what}"
    assert info.family in ("weights", "activations", "conservation")
    assert info.healthy in ("stable", "drifts", "low")
    assert info.watch in ("low", "high", "both", "limit", "record")
    (row,) = (line for line in document().splitlines() if line.startswith(f"| `{name}` |"))
    assert row.replace("\\|", "").count("|") == 9


def test_a_change_shows() -> None:
    infos = list(SIGNALS.values())
    changed = [replace(infos[0], meaning="something | else"), *infos[1:]]
    assert document(changed) != document(infos)
    assert "something \\| else" in document(changed)
