"""One child command in a process group of its own, with signals handed on and nothing left behind.

A launcher such as ``deepspeed`` is a chain of processes. A signal that reaches only its first link
leaves the workers running, with their devices and ports, and a relaunch beside them would fail. So
the chain gets a process group of its own: signals go to all of it, and it counts as ended when all
of it has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mcore_monitors.errors import MonitorsError

#: Signals that ask a launcher to stop.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that a group may live on after its first process. DeepSpeed gives its workers 30.
_GRACE = 40.0


class Children:
    """Runs commands one after the other until one is stopped by a signal.

    Args:
        grace: seconds that the rest of a process group may take to end before it is killed.
    """

    def __init__(self, grace: float = _GRACE) -> None:
        self.stopped_by: signal.Signals | None = None
        """The last signal that was handed on, or None."""
        self._grace = grace
        self._group: int | None = None

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Hand SIGINT, SIGTERM and SIGHUP on to the command that runs, instead of dying of them."""
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str], output: IO[str] | None = None) -> int:
        """Run a command to its end and return its exit code, 128 + n where signal n ended it.

        Args:
            output: takes what the command prints, instead of the terminal.

        Raises:
            MonitorsError: the command cannot be started.
        """
        try:
            process = subprocess.Popen(
                command,
                start_new_session=True,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )
        except OSError as error:
            raise MonitorsError(f"cannot start {command[0]!r}: {error.strerror}") from error
        self._group = process.pid
        if self.stopped_by is not None:  # it came between the last check and the start
            self._signal(self.stopped_by)
        code = process.wait()
        self._end_group()
        self._group = None
        return code if code >= 0 else 128 - code

    def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal comes."""
        end = time.monotonic() + seconds
        while self.stopped_by is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _forward(self, number: int, _frame: object) -> None:
        self.stopped_by = signal.Signals(number)
        self._signal(number)

    def _signal(self, number: int) -> None:
        if self._group is not None:
            try:
                os.killpg(self._group, number)
            except ProcessLookupError:
                pass  # it ended by itself meanwhile

    def _end_group(self) -> None:
        end = time.monotonic() + self._grace
        while _alive(self._group):
            if time.monotonic() > end:
                self._signal(signal.SIGKILL)
                return
            time.sleep(0.1)


def _alive(group: int) -> bool:
    """Return whether a process of the group still runs.

    Zombies do not count: in a container whose first process reaps nothing they stay for ever, and
    ``killpg(group, 0)`` would see them.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name, which may hold anything) state parent group …
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(its_group) == group and state not in "ZX":
            return True
    return False
