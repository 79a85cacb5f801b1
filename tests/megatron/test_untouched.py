"""Training is not touched: losses are bit for bit those of the wheel as it came."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .train import EXACT, Result, train

#: exact losses from whatever Megatron it runs in
EXACT_HERE = "from mcore_monitors import cpu\ncpu.install()\n" + EXACT
SAYS_IMPORTED = """
import atexit, sys as _sys
atexit.register(lambda: print('OURS', sorted(
    m for m in _sys.modules if m.startswith('mcore_monitors') and '.cpu' not in m)))
"""


def exact(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output[-4000:]
    return result.exact


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed Megatron-core as it came, patches taken out of the copy."""
    folder = tmp_path_factory.mktemp("pristine")
    installed = Path(find_spec("megatron.core").origin).parents[1]
    shutil.copytree(installed, folder / "megatron")
    subprocess.run(
        [
            Path(sys.executable).parent / "mcore-monitors", "patch", "revert",
            "--host", "megatron-core", "--target", folder,
        ],
        check=True,
    )  # fmt: skip
    return folder


def test_losses_are_bitwise_the_wheels(pristine: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(pristine), os.environ.get("PYTHONPATH", "")])
    arguments = {"processes": 2, "iterations": 6, "before": EXACT_HERE}
    as_it_came = train(
        tmp_path / "a",
        "--expert-model-parallel-size 2",
        environment={"PYTHONPATH": path},
        cpu_flag=False,
        **arguments,
    )
    without = train(
        tmp_path / "b",
        "--expert-model-parallel-size 2",
        **arguments | {"before": EXACT_HERE + SAYS_IMPORTED},
    )
    watched = train(
        tmp_path / "c",
        "--expert-model-parallel-size 2",
        monitors={
            "interval": 2,
            "monitors": {
                "attention_update": {"windows": [2]},
                "koopman": {"enabled": True, "every": 4, "rank": 8},
            },
        },
        **arguments,
    )
    assert len(exact(as_it_came)) == 12  # two processes, six steps
    assert sorted(exact(without)) == sorted(exact(as_it_came))
    assert sorted(exact(watched)) == sorted(exact(as_it_came))
    assert len(watched.samples) == 3
    profiled = [s.iteration for s in watched.samples if "koopman/near_unit" in s.signals]
    assert profiled == [4]
    # only the stand-in itself, which this test asked for
    assert without.output.count("OURS ['mcore_monitors', 'mcore_monitors.errors']") == 2
