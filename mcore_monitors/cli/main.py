"""Entry point of the ``mcore-monitors`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mcore_monitors import __version__
from mcore_monitors.cli import check, launch, patch, profile, report
from mcore_monitors.errors import EXIT_BAD_CONFIG, ConfigError, MonitorsError

#: The subcommands' modules by name, in the order of ``--help``.
COMMANDS = {
    "patch": patch,
    "profile": profile,
    "check": check,
    "launch": launch,
    "report": report,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; each subcommand's module adds its own words."""
    parser = argparse.ArgumentParser(
        prog="mcore-monitors",
        description="Training-stability monitors for Megatron-core and DeepSpeed.",
        epilog="Example: mcore-monitors patch apply",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS.values():
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
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
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
