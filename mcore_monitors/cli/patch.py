"""``mcore-monitors patch``: put the call sites into the hosts, or take them out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mcore_monitors.errors import PatchError
from mcore_monitors.patching import actions
from mcore_monitors.patching.hosts import HOSTS, find_trees

_DESCRIPTION = """\
Puts a few call sites into the installed Megatron-core and DeepSpeed, or into a git checkout of one.
Without the monitors' own flag the patched host does what it did before.

  status   say what is there; exit code 1 unless all of it is patched or all as released
  apply    patch; harmless where it is done already, refused where a file has been edited
  revert   restore the released files, byte for byte, also after a half-applied patch
"""
_EPILOG = """\
Examples:
  mcore-monitors patch apply
  mcore-monitors patch status --target ~/Megatron-LM
  mcore-monitors patch revert --host deepspeed
"""

_ACTIONS = {"status": actions.status, "apply": actions.apply, "revert": actions.revert}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the words of ``mcore-monitors patch``."""
    parser = subparsers.add_parser(
        "patch",
        help="add the monitors' call sites to Megatron-core and DeepSpeed, or remove them",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=_ACTIONS)
    parser.add_argument(
        "--target",
        type=Path,
        metavar="DIR",
        help="a git checkout of Megatron-LM or DeepSpeed, or a site-packages folder "
        "(default: what this Python imports)",
    )
    parser.add_argument(
        "--host", choices=HOSTS, help="only this host (default: all that are there)"
    )


def run(args: argparse.Namespace) -> int:
    """Do the action for each host; one that is refused doesn't keep the other from its turn."""
    code = 0
    for tree in find_trees(args.host, args.target):
        try:
            print(_ACTIONS[args.action](tree))
        except PatchError as error:
            print(f"mcore-monitors: {error}", file=sys.stderr)
            code = 1
    return code
