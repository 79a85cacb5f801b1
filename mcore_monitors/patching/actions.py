"""Status, apply and revert: what the digests say, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mcore_monitors.errors import PatchError, nearest
from mcore_monitors.patching.diff import apply_diff
from mcore_monitors.patching.hosts import Tree
from mcore_monitors.patching.manifest import FilePatch, read_patch_sets, sha256
from mcore_monitors.patching.replace import refuse_read_only, replace_files


class State(Enum):
    """What a digest says about a file, or the digests of all files about a tree."""

    PRISTINE = "as released"
    PATCHED = "patched"
    HALF = "half-applied"
    EDITED = "neither as released nor as patched"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a host beside its patch.

    Attributes:
        path: where it is.
        patch: what belongs to it.
        content: its bytes; empty where it is missing.
        state: as released, patched, edited or missing.
        result: the digest it has once applied or reverted; None where it isn't recognised.
    """

    path: Path
    patch: FilePatch
    content: bytes
    state: State
    result: str | None


def _look(tree: Tree, patch: FilePatch) -> File:
    path = tree.root / patch.path
    if not path.is_file():
        return File(path=path, patch=patch, content=b"", state=State.MISSING, result=None)
    content = path.read_bytes()
    digest = sha256(content)
    state, result = State.EDITED, None
    for pair in patch.digests:
        if digest == pair.before:
            state, result = State.PRISTINE, pair.after
        elif digest == pair.after:
            state, result = State.PATCHED, pair.before
    return File(path=path, patch=patch, content=content, state=state, result=result)


def examine(tree: Tree, patches: Path | None = None) -> list[File]:
    """Return the files that the patch of this release is about, with their states.

    Args:
        tree: the host's files.
        patches: the folder with the patch sets; this package's own by default.

    Raises:
        PatchError: there is no patch for this release.
    """
    sets = read_patch_sets(tree.host, patches)
    for patch_set in sets:
        if tree.version in patch_set.versions:
            return [_look(tree, patch) for patch in patch_set.files]
    known = [version for patch_set in sets for version in patch_set.versions]
    hint = nearest(tree.version, known)
    raise PatchError(
        f"{tree}: there is no patch for this version; there is for {', '.join(known)}."
        f"{' ' + hint if hint else ''} docs/patches.md says how to make one."
    )


def overall(files: list[File]) -> State:
    """Return the state of a tree: that of its files where all agree, else the worst of them."""
    states = {file.state for file in files}
    for state in (State.MISSING, State.EDITED):
        if state in states:
            return state
    return states.pop() if len(states) == 1 else State.HALF


def _names(files: list[File], *states: State) -> str:
    return ", ".join(file.patch.path for file in files if file.state in states)


def _refuse_unknown(tree: Tree, files: list[File]) -> None:
    """Raise if a file is one that no digest knows."""
    unknown = _names(files, State.EDITED, State.MISSING)
    if unknown:
        raise PatchError(
            f"{tree}: {unknown}: {overall(files).value}; nothing was changed. Install the release "
            f"anew (pip install --force-reinstall --no-deps {tree.host}=={tree.version}, or git "
            "checkout), or see docs/patches.md for a fork with edits of its own."
        )


def _switch(files: list[File], *, reverse: bool) -> None:
    """Patch files, or take the patch out; every result is checked before the first is written."""
    contents = {}
    for file in files:
        content = apply_diff(file.content, file.patch.diff, reverse=reverse)
        if sha256(content) != file.result:
            raise PatchError(
                f"{file.path}: the patch does not give the file that the manifest promises; nothing"
                " was changed. Reinstall mcore-monitors."
            )
        contents[file.path] = content
    refuse_read_only(list(contents))
    replace_files(contents)


def status(tree: Tree, patches: Path | None = None) -> str:
    """Return a line about a tree that is patched, or as released.

    Raises:
        PatchError: it is neither; the message names the state of each file.
    """
    files = examine(tree, patches)
    state = overall(files)
    if state in (State.PRISTINE, State.PATCHED):
        return f"{tree}: {state.value} ({len(files)} files)"
    each = "; ".join(f"{file.patch.path} {file.state.value}" for file in files)
    raise PatchError(f"{tree}: {state.value}: {each}")


def apply(tree: Tree, patches: Path | None = None) -> str:
    """Patch a host and return a line about what was done; nothing where it is patched already.

    Raises:
        PatchError: a file isn't as released (or only some are patched), or may not be written.
    """
    files = examine(tree, patches)
    _refuse_unknown(tree, files)
    if overall(files) is State.PATCHED:
        return f"{tree}: already applied"
    if overall(files) is State.HALF:
        raise PatchError(
            f"{tree}: half-applied (patched: {_names(files, State.PATCHED)}; as released: "
            f"{_names(files, State.PRISTINE)}); nothing was changed. Run 'mcore-monitors patch "
            "revert', which restores the patched files, and apply again."
        )
    _switch(files, reverse=False)
    return f"{tree}: applied to {len(files)} files"


def revert(tree: Tree, patches: Path | None = None) -> str:
    """Restore the released bytes of a host and return a line about what was done.

    A half-applied patch is taken out too: what is undone is known by its digest, file by file.

    Raises:
        PatchError: a file is neither as released nor as patched, or may not be written.
    """
    files = examine(tree, patches)
    _refuse_unknown(tree, files)
    patched = [file for file in files if file.state is State.PATCHED]
    if not patched:
        return f"{tree}: not applied, nothing to revert"
    _switch(patched, reverse=True)
    return f"{tree}: reverted {len(patched)} of {len(files)} files"
