"""The dataset of the standard library's sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.fresh import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path):
    """Four small sources, one of them not UTF-8, and one that belongs to a package."""
    root = tmp_path / "lib"
    for name, content in {
        "b.py": b"print('b')\n",
        "a.py": "# h\u00e9\n".encode(),
        "sub/c.py": b"c = 1\n",
        "sub/latin.py": b"# \xff\n",
        "site-packages/other.py": b"no\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def read(prefix: Path) -> list[bytes]:
    """Documents of a dataset, read by Megatron."""
    return [
        bytes(document)
        for document in run(
            """
            import sys
            from megatron.core.datasets.indexed_dataset import IndexedDataset
            result = [document.tolist() for document in IndexedDataset(sys.argv[1])]
            """,
            str(prefix),
        )
    ]


def make(prefix: Path, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/text.py", "--output", str(prefix), "--root", str(root)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_one_document_a_file_in_sorted_order(tmp_path, sources):
    prefix = tmp_path / "data" / "text"
    done = make(prefix, sources)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(prefix))
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["text.bin", "text.idx"]
    assert read(prefix) == [
        "# h\u00e9\n".encode() + b"\xff",
        b"print('b')\n\xff",
        b"c = 1\n\xff",
        b"# \n\xff",
    ]


def test_an_existing_dataset_is_left_alone(tmp_path, sources):
    prefix = tmp_path / "text"
    make(prefix, sources)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("text.*")}
    (sources / "a.py").write_text("changed\n")
    assert make(prefix, sources).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("text.*")} == before
    # Half a dataset is none: it is made again.
    (tmp_path / "text.idx").unlink()
    make(prefix, sources)
    assert read(prefix)[0] == b"changed\n\xff"


def test_a_folder_without_sources_is_an_error(tmp_path):
    done = make(tmp_path / "text", tmp_path)
    assert done.returncode != 0
    assert "no Python sources below" in done.stderr
    assert list(tmp_path.iterdir()) == []
