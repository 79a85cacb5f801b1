"""The patch sets that come with this package: hosts, releases, files and digests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mcore_monitors.errors import PatchError

#: Version of ``manifest.json`` that this code reads and writes.
MANIFEST_FORMAT = 1
MANIFEST_NAME = "manifest.json"


def sha256(content: bytes) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Digests:
    """One released form of a file and what the patch makes of it, as SHA-256."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class FilePatch:
    """The patch of one file.

    Attributes:
        path: the file, relative to the folder that holds the host's top package.
        diff: the unified diff.
        digests: the released forms that the diff belongs to; more than one where releases differ
            in lines that it doesn't touch.
    """

    path: str
    diff: str
    digests: tuple[Digests, ...]


@dataclass(frozen=True, kw_only=True)
class PatchSet:
    """All patches for one host, good for the given releases."""

    host: str
    versions: tuple[str, ...]
    files: tuple[FilePatch, ...]


def patches_folder() -> Path:
    """Return the folder with the patch sets: inside an installed package, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_patches"
    return bundled if bundled.is_dir() else package.parent / "patches"


def read_patch_set(folder: Path) -> PatchSet:
    """Read one patch set.

    Raises:
        PatchError: the manifest or a diff is missing or damaged.
    """
    manifest = folder / MANIFEST_NAME
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        if record["format"] != MANIFEST_FORMAT:
            raise PatchError(
                f"{manifest}: format {record['format']!r} is not known; "
                f"this version of mcore-monitors reads {MANIFEST_FORMAT}."
            )
        files = tuple(
            FilePatch(
                path=item["path"],
                diff=(folder / item["diff"]).read_text(encoding="utf-8"),
                digests=tuple(Digests(**pair) for pair in item["digests"]),
            )
            for item in record["files"]
        )
        return PatchSet(host=record["host"], versions=tuple(record["versions"]), files=files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(
            f"{manifest} cannot be read ({error!r}); reinstall mcore-monitors."
        ) from error


def read_patch_sets(host: str, folder: Path | None = None) -> list[PatchSet]:
    """Return the patch sets of a host, sorted by folder name.

    Args:
        host: ``megatron-core`` or ``deepspeed``.
        folder: where the sets are; this package's own by default.
    """
    manifests = (folder or patches_folder()).glob(f"{host}/*/{MANIFEST_NAME}")
    return [read_patch_set(manifest.parent) for manifest in sorted(manifests)]
