"""Replaces several files all or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mcore_monitors.errors import PatchError


def refuse_read_only(paths: list[Path]) -> None:
    """Raise before anything is touched if a file or its folder may not be written.

    A mode without any write bit counts also for root, who could write all the same: somebody made
    the file read-only on purpose.

    Raises:
        PatchError: names the first such file or folder.
    """
    for path in paths:
        for place in (path, path.parent):
            writable = os.access(place, os.W_OK) and place.stat().st_mode & (
                stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
            )
            if not writable:
                raise PatchError(f"{place} is read-only; nothing was changed.")


def _write_beside(path: Path, content: bytes) -> Path:
    """Write content to a new file in the same folder, with the same mode, and return its path."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, name)
    return Path(name)


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Give files new contents, all of them or none.

    Renaming rather than writing in place keeps two promises: a process that is importing reads the
    old file or the new one, and an installer's cache that is hard-linked to the file stays as it
    is.

    Args:
        contents: the new content of each file; all exist.

    Raises:
        PatchError: the system refused; the old contents are back.
    """
    old = {path: path.read_bytes() for path in contents}
    ready: dict[Path, Path] = {}
    replaced: list[Path] = []
    try:
        for path, content in contents.items():
            ready[path] = _write_beside(path, content)
        for path, temporary in ready.items():
            os.replace(temporary, path)
            replaced.append(path)
    except BaseException as error:
        for path in replaced:
            os.replace(_write_beside(path, old[path]), path)
        if isinstance(error, OSError):
            raise PatchError(f"{error}; the files are as they were.") from error
        raise
    finally:
        for temporary in ready.values():
            temporary.unlink(missing_ok=True)
