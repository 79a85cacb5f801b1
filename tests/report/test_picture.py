from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.report import make

SCRIPT = Path(__file__).parents[2] / "launch" / "demo_picture.py"


def draw(demo: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(demo), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_picture_of_a_demo(tmp_path):
    make.rolled_back(tmp_path / "recovered")
    make.calm(tmp_path / "healthy")
    samples = [make.make_sample(i, shift=1e-3 if i >= 200 else 5e-8) for i in range(10, 301, 10)]
    make.write(tmp_path / "left-alone", samples, make.alarms())
    output = tmp_path / "docs" / "demo.png"
    done = draw(tmp_path, output)
    assert (done.returncode, done.stderr) == (0, "")
    picture = output.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 150_000


def test_demo_without_its_runs_is_refused(tmp_path):
    done = draw(tmp_path, tmp_path / "demo.png")
    assert done.returncode == 1
    assert "recovered: there is no such folder" in done.stderr
    assert not (tmp_path / "demo.png").exists()
