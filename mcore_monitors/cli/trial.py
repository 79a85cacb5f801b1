"""Start a training command with other settings, to look at it and leave nothing behind.

What ``mcore-monitors check`` and ``mcore-monitors profile`` share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_monitors.cli.child import Children
from mcore_monitors.cli.settings import read_settings, with_settings
from mcore_monitors.errors import EXIT_BAD_CONFIG, MonitorsError

#: lines of a failed command's output that are shown
_TAIL = 25


@dataclass(frozen=True)
class Trial:
    """A command that has ended.

    Attributes:
        word: the subcommand that started it.
        exit_code: its own.
        log: the last of what it printed.
        run_dir: where it left its history and events; gone when the trial is.
        shown: whether the user has seen its output.
    """

    word: str
    exit_code: int
    log: str
    run_dir: Path
    shown: bool

    def measured_nothing(self) -> int:
        """Show why, as far as the command says it; the exit code to leave with.

        Raises:
            MonitorsError: unless the command refused its settings, which it has said itself.
        """
        if not self.shown:
            sys.stderr.write(self.log)
        if self.exit_code == EXIT_BAD_CONFIG:
            return EXIT_BAD_CONFIG
        raise MonitorsError(
            f"{self.word}: nothing was measured; the command ended with exit code "
            f"{self.exit_code}. Its last lines are above. Is the host patched (mcore-monitors "
            "patch status), and does the run have a step left to do?"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the words that say what to run and how."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings to use (default: those that COMMAND names, else the defaults)",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where the run may keep its files meanwhile; on several machines a folder that all "
        "of them see (default: the system's place for such files)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show what the command prints while it runs"
    )
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")


def command_of(args: argparse.Namespace) -> list[str]:
    """The training command behind ``--``; empty where none was given."""
    return args.training[1:] if args.training[:1] == ["--"] else args.training


@contextmanager
def trial(
    word: str, args: argparse.Namespace, change: Callable[[dict[str, Any], Path], dict[str, Any]]
) -> Iterator[Trial]:
    """Run the training command to its end with changed settings.

    Args:
        word: the subcommand, for messages.
        args: what :func:`add_options` has read.
        change: the user's settings and a run folder in, the settings of the trial out.

    Raises:
        ConfigError: the settings cannot be used.
        MonitorsError: there is no command, it cannot be started, or it was stopped.
    """
    command = command_of(args)
    if not command:
        raise MonitorsError(
            f"{word}: no command. Give it behind --, for example: mcore-monitors {word} -- "
            "deepspeed --num_accelerators 2 train.py --mcore-monitors moe.yaml"
        )
    settings = read_settings(command, args.config)
    with tempfile.TemporaryDirectory(prefix=f"mcore-monitors-{word}-", dir=args.dir) as folder:
        run_dir = Path(folder) / "run"
        command = with_settings(command, change(settings, run_dir), Path(folder))
        code, log = _run(word, command, Path(folder) / "output.log", show=args.verbose)
        yield Trial(word, code, log, run_dir, args.verbose)


def _run(word: str, command: Sequence[str], log: Path, *, show: bool) -> tuple[int, str]:
    """Run the command; return its exit code and the last of what it printed."""
    children = Children()
    with children.forwarding(), log.open("w+") as output:
        code = children.run(command, None if show else output)
    if children.stopped_by is not None:
        raise MonitorsError(f"{word}: stopped by {children.stopped_by.name}")
    lines = log.read_text(errors="replace").splitlines(keepends=True)
    return code, "".join(lines[-_TAIL:])
