"""Whether a checkpoint's files are still those that were written.

A digest of every byte would take rank 0 minutes on a checkpoint of terabytes. Taken in are all
names and sizes, and the content of the small files: those hold the metadata, without which nothing
can be loaded. That finds what happens in practice (a checkpoint pruned, overwritten by a later
attempt, copied in part, cut off by a full disk), not a flipped bit in a large tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

#: Files below this many bytes are read.
SMALL = 1 << 20


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        yield from (Path(folder) / name for name in sorted(names))


def digest(path: str | os.PathLike[str]) -> str:
    """Return the digest of a checkpoint, a folder or a file.

    Raises:
        FileNotFoundError: there is nothing, or only empty folders.
    """
    root = Path(path)
    total, count = hashlib.sha256(), 0
    for file in _files(root):
        size = file.stat().st_size
        total.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode())
        if size < SMALL:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        count += 1
    if not count:
        raise FileNotFoundError(f"no files in {root}")
    return f"sha256:{total.hexdigest()}"


def difference(path: str | os.PathLike[str], expected: str) -> str | None:
    """Return in words why a checkpoint cannot be trusted, or None where its files match."""
    try:
        found = digest(path)
    except FileNotFoundError:
        return "its files are missing"
    except OSError as error:
        return f"its files cannot be read ({error.strerror})"
    return None if found == expected else "its files are not those that were written"
