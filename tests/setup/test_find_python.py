"""``launch/find_python.sh``: the Python that the virtual environment is made with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/find_python.sh"
#: The interpreter behind the virtual environment, which has ``venv`` and ``ensurepip``.
BASE = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"


def _find(path: Path, pyenv: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "PYENV_ROOT": str(pyenv), "HOME": str(pyenv)}
    command = ["/bin/sh", str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _script(place: Path, body: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"#!/bin/sh\n{body}\n")
    place.chmod(0o755)


@pytest.mark.parametrize("name", ["python3.12", "python3.13", "python3", "python"])
def test_on_path_under_any_name(tmp_path, name):
    _script(tmp_path / "bin" / name, f'exec {BASE} "$@"')
    found = _find(tmp_path / "bin", tmp_path)
    assert found.returncode == 0
    assert Path(found.stdout.strip()).resolve() == BASE.resolve()


def test_a_name_that_does_not_run_or_does_not_fit_is_passed_over(tmp_path):
    """A version manager leaves its shim behind for every version, also when switched off."""
    _script(tmp_path / "bin/python3.12", 'echo "command not found" >&2; exit 127')
    _script(tmp_path / "bin/python3", "exit 1")
    _script(tmp_path / "versions/3.12.9/bin/python", f'exec {BASE} "$@"')
    found = _find(tmp_path / "bin", tmp_path)
    assert (found.returncode, found.stdout) == (0, f"{tmp_path}/versions/3.12.9/bin/python\n")
    assert found.stderr == ""


def test_nothing_found_says_what_to_install(tmp_path):
    found = _find(tmp_path / "bin", tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert "3.12" in found.stderr and "install" in found.stderr
