"""What counts as the same checkpoint."""

from __future__ import annotations

import os

import pytest

from mcore_monitors.recovery.files import SMALL, difference, digest


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "iter_0000500"
    (folder / "rank_0").mkdir(parents=True)
    (folder / "metadata.json").write_text('{"format": "torch_dist"}')
    with open(folder / "rank_0" / "weights.pt", "wb") as file:
        file.truncate(SMALL + 7)
    return folder


def test_the_same_files_match_wherever_they_lie(checkpoint, tmp_path):
    known = digest(checkpoint)
    assert difference(checkpoint, known) is None
    moved = checkpoint.rename(tmp_path / "elsewhere")
    assert difference(moved, known) is None


def truncate(folder):
    os.truncate(folder / "rank_0" / "weights.pt", SMALL)


def edit_small(folder):
    (folder / "metadata.json").write_text('{"format": "torch_dust"}')


def add(folder):
    (folder / "rank_1.pt").write_bytes(b"")


def lose(folder):
    (folder / "rank_0" / "weights.pt").unlink()


def rename(folder):
    (folder / "metadata.json").rename(folder / "metadata.jso")


@pytest.mark.parametrize("change", [truncate, edit_small, add, lose, rename])
def test_a_change_is_seen(checkpoint, change):
    known = digest(checkpoint)
    change(checkpoint)
    assert difference(checkpoint, known) == "its files are not those that were written"


def test_missing_files_are_called_missing(checkpoint, tmp_path):
    known = digest(checkpoint)
    assert difference(tmp_path / "nowhere", known) == "its files are missing"
    empty = tmp_path / "empty"
    (empty / "inner").mkdir(parents=True)
    assert difference(empty, known) == "its files are missing"
    with pytest.raises(FileNotFoundError, match="no files"):
        digest(empty)


def test_a_checkpoint_may_be_one_file(checkpoint):
    file = checkpoint / "metadata.json"
    known = digest(file)
    assert difference(file, known) is None
    file.write_text("{}")
    assert difference(file, known) is not None
