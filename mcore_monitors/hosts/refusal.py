"""Ending a start that can't be used: one sentence, and an exit code a scheduler can rely on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import EXIT_BAD_CONFIG, MonitorsError
from ..messages import say


@contextmanager
def refusing() -> Iterator[None]:
    """End the process where the block raises an error of ours; rank 0 says why."""
    try:
        yield
    except MonitorsError as error:
        if int(os.environ.get("RANK", "0")) == 0:  # before the process groups exist, too
            say(str(error))
        sys.exit(getattr(error, "exit_code", EXIT_BAD_CONFIG))
