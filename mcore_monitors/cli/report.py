"""``mcore-monitors report``: one self-contained HTML page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcore_monitors.report import REPORT_FILE, write_report

_DESCRIPTION = f"""\
Makes one HTML page about a run: what happened in words, the curves, the injected fault if it was a
drill, the alarms, the rollback, the events. It opens without a network. The run may still be going
on. The page is RUN/{REPORT_FILE} unless --output says otherwise.
"""
_EPILOG = """\
Examples:
  mcore-monitors report runs/demo-0/recovered
  mcore-monitors report runs/demo-0/recovered --compare runs/demo-0/healthy --output page.html
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the words of ``mcore-monitors report``."""
    parser = subparsers.add_parser(
        "report",
        help="make an HTML page about a run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="run folder (run_dir of its settings)"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="the page to write")
    parser.add_argument(
        "--compare",
        metavar="RUN",
        type=Path,
        nargs="+",
        default=(),
        help="other runs, drawn thin behind, each under its folder's name",
    )


def run(args: argparse.Namespace) -> int:
    """Make the page and say where it is."""
    print(write_report(args.run, args.output, args.compare))
    return 0
