"""Copies of the real hosts' files to patch: of both installed releases and of an older wheel."""

from __future__ import annotations

import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

from mcore_monitors.patching import actions
from mcore_monitors.patching.hosts import Tree, find_trees
from mcore_monitors.patching.manifest import PatchSet, read_patch_sets

#: The file of each host that names its release.
VERSION_FILE = {
    "megatron-core": "megatron/core/package_info.py",
    "deepspeed": "deepspeed/git_version_info_installed.py",
}


def patch_set(host: str, version: str) -> PatchSet:
    """Return the shipped patch set of a release."""
    (found,) = (one for one in read_patch_sets(host) if version in one.versions)
    return found


def copy_installed(host: str, folder: Path) -> Tree:
    """Copy what a patch is about from the installed host, and take the patch out of the copy."""
    (installed,) = find_trees(host)
    paths = [file.path for file in patch_set(host, installed.version).files]
    for path in [*paths, VERSION_FILE[host], f"{host.partition('-')[0]}/__init__.py"]:
        if (installed.root / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed.root / path, folder / path)
    tree = replace(installed, root=folder)
    actions.revert(tree)
    return tree


def older_wheel() -> Path:
    """Return the older Megatron-core that the set-up downloaded into the environment."""
    (wheel,) = Path(sys.prefix, "wheels").glob("megatron_core-0.18.2-*.whl")
    return wheel


def unpack_wheel(folder: Path) -> Tree:
    """Unpack the files of the older Megatron-core that a patch is about."""
    paths = [file.path for file in patch_set("megatron-core", "0.18.2").files]
    with zipfile.ZipFile(older_wheel()) as archive:
        archive.extractall(folder, [*paths, VERSION_FILE["megatron-core"]])
    return Tree(host="megatron-core", version="0.18.2", root=folder)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return content, mode and time of change (ns) of every file under a folder."""
    marks = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), mark.st_mode, mark.st_mtime_ns)
        for path, mark in marks.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file under a folder."""
    return {path: content for path, (content, _, _) in snapshot(folder).items()}
