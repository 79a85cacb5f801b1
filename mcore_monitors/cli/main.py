"""Entry point of the ``mcore-monitors`` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from mcore_monitors import __version__
from mcore_monitors.errors import EXIT_BAD_CONFIG, ConfigError, MonitorsError

#: Subcommands in the order of ``--help``; each is the module of that name beside this one.
SUBCOMMANDS = ("patch", "launch", "report")


def _commands() -> dict[str, ModuleType]:
    """Return the module of each subcommand by name."""
    modules = {}
    for name in SUBCOMMANDS:
        path = f"mcore_monitors.cli.{name}"
        try:
            modules[name] = importlib.import_module(path)
        except ModuleNotFoundError as missing:
            if missing.name != path:
                raise
    return modules


def build_parser(commands: dict[str, ModuleType]) -> argparse.ArgumentParser:
    """Return the parser of the whole command.

    Args:
        commands: the module of each subcommand; its ``add_parser(subparsers)`` adds its own words.
    """
    parser = argparse.ArgumentParser(
        prog="mcore-monitors",
        description="Training-stability monitors for Megatron-core and DeepSpeed.",
        epilog="Example: mcore-monitors patch apply",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in commands.values():
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after the command's name; those of this process by default.

    Returns:
        The exit code: the subcommand's own, 78 for a setting that cannot be used, 1 for any other
        error that a user can cause, 130 after Ctrl-C.
    """
    commands = _commands()
    args = build_parser(commands).parse_args(argv)
    try:
        return commands[args.command].run(args)
    except ConfigError as error:
        print(f"mcore-monitors: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except MonitorsError as error:
        print(f"mcore-monitors: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mcore-monitors: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
