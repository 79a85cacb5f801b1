"""Start a module of the tests in a few gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(module: str, *arguments: str | Path, processes: int) -> tuple[int, str]:
    """Run ``python -m module arguments`` as every rank; worst exit code and all output."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(processes)
    ]
    outputs = [child.communicate(timeout=560)[0] for child in children]
    return max(abs(child.returncode) for child in children), "\n".join(outputs)
