"""Run a function in a few gloo processes and hand back what each rank returned.

The processes are forked from a server that has imported torch once, so a call costs a fraction of
a second and no state of the test process leaks into the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch.distributed", "mcore_monitors.runtime"])


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of a fresh gloo group.

    Args:
        world: number of processes.
        function: defined at the top of a module, so that it can be sent to a process.
        args: the same on every rank; picklable.
        timeout: seconds for all of it.

    Returns:
        What each rank returned, in the order of ranks.

    Raises:
        AssertionError: a rank raised (its traceback is in the text), died, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, ranks = [], []
        for rank in range(world):
            ours, theirs = _processes.Pipe()
            process = _processes.Process(
                target=_rank,
                args=(rank, world, str(Path(folder) / "store"), theirs, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            ends.append(ours)
            ranks.append(process)
        try:
            return _gather(ends, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _gather(ends: list[Connection], deadline: float) -> list[Any]:
    results = []
    for rank, end in enumerate(ends):
        if not end.poll(max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"rank {rank} did not end in time; it may wait in a collective")
        try:
            error, result = end.recv()
        except EOFError:
            raise AssertionError(f"rank {rank} died") from None
        if error is not None:
            raise AssertionError(f"rank {rank} raised:\n{error}")
        results.append(result)
    return results


def _rank(
    rank: int,
    world: int,
    store: str,
    end: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        end.send((traceback.format_exc(), None))
    else:
        end.send((None, result))
