"""The local report: one HTML page about a run, for people without W&B or without a network.

:mod:`.read` reads a run folder into :mod:`.data`, :mod:`.story` says in words what happened,
:mod:`.figures` draws, :mod:`.page` puts the page together. matplotlib is imported only when a page
is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mcore_monitors.errors import MonitorsError
from mcore_monitors.files import write_atomically

REPORT_FILE = "report.html"


def write_report(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    compare: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Make the page of one run and return where it is.

    Args:
        run_dir: the run folder; the run may still be going on.
        output: the file to write, ``run_dir/report.html`` by default.
        compare: other run folders, drawn thin behind, each under its folder's name.

    Raises:
        MonitorsError: a file is missing, empty or cannot be understood, or the page cannot be
            written; names the file. No half-written page is left behind.
    """
    from mcore_monitors.report.page import build_page
    from mcore_monitors.report.read import read_run

    run, others = read_run(run_dir), [read_run(other) for other in compare]
    path = Path(output) if output is not None else Path(run_dir) / REPORT_FILE
    if path.is_dir():
        raise MonitorsError(f"--output: {path} is a folder; give the name of a file in it")
    page = build_page(run, others)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise MonitorsError(f"{path} cannot be written: {error.strerror or error}") from error
    return path
