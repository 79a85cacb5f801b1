"""How the demo follows a run's files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from demo_runs import _Lines  # noqa: E402


def test_each_line_is_told_once_and_when_it_is_whole(tmp_path):
    path = tmp_path / "run.log"
    lines = _Lines(path)
    assert lines.new() == []
    path.write_text("one\ntwo\nhalf")
    assert lines.new() == ["one", "two"]
    assert lines.new() == []
    with path.open("ab") as file:
        file.write(b" a line \xff\nfour\n")
    assert lines.new() == ["half a line \ufffd", "four"]
    assert lines.new() == []
