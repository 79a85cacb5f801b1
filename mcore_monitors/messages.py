"""One line for the person who watches a run's output."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a message of ours on standard error, recognisable and at once."""
    print(f"mcore-monitors: {text}", file=sys.stderr, flush=True)
