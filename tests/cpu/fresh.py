"""Run a snippet in an interpreter of its own: the stand-in cannot be taken back in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *arguments: str, timeout: float = 240) -> Any:
    """Return what the snippet assigned to ``result``, sent back as JSON.

    Args:
        code: Python source; it runs without the switch of the stand-in in its environment.
        arguments: command-line arguments that it sees.
        timeout: seconds.
    """
    program = f"{textwrap.dedent(code)}\nimport json\nprint('\\n' + json.dumps(result))"
    environment = {k: v for k, v in os.environ.items() if k != "MCORE_MONITORS_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rstrip().splitlines()[-1])
