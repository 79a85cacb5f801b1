"""A table in plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import IO


def print_columns(
    lines: Sequence[Sequence[str]], out: IO[str], left: Collection[int] = ()
) -> None:
    """Print lines of cells below each other, numbers to the right.

    Args:
        lines: as many cells in each.
        left: columns whose cells stand to the left.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=out)
