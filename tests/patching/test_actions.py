"""Applying and reverting on the real files: there and back, twice, and every reason to refuse."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest

from mcore_monitors.errors import PatchError
from mcore_monitors.patching import actions
from mcore_monitors.patching.actions import State, examine, overall
from mcore_monitors.patching.hosts import HOSTS, find_trees
from mcore_monitors.patching.make import make_patch_set
from mcore_monitors.patching.manifest import patches_folder, sha256
from tests.patching.trees import contents, patch_set, snapshot


def _files(tree) -> list[Path]:
    return [tree.root / file.path for file in patch_set(tree.host, tree.version).files]


def _refused(action, tree, *words: str) -> None:
    """Check that an action is refused with these words and that nothing at all has changed."""
    before = snapshot(tree.root)
    with pytest.raises(PatchError) as error:
        action(tree)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(tree.root) == before


def test_there_and_back(tree):
    released = snapshot(tree.root)
    assert overall(examine(tree)) is State.PRISTINE

    assert "applied to" in actions.apply(tree)
    assert overall(examine(tree)) is State.PATCHED
    patched = snapshot(tree.root)
    changed = {path for path in released if released[path][0] != patched[path][0]}
    assert changed == {file.path for file in patch_set(tree.host, tree.version).files}
    assert all(released[path][1] == patched[path][1] for path in released), "a mode has changed"
    for path in changed:
        compile(patched[path][0], path, "exec")

    assert "already applied" in actions.apply(tree)
    assert snapshot(tree.root) == patched

    assert "reverted" in actions.revert(tree)
    assert contents(tree.root) == {path: content for path, (content, _, _) in released.items()}
    assert "nothing to revert" in actions.revert(tree)


def test_only_lines_are_added(tree):
    for file in patch_set(tree.host, tree.version).files:
        body = [line for line in file.diff.splitlines() if line[:3] not in ("---", "+++")]
        assert not [line for line in body if line.startswith("-")]
        assert 0 < len([line for line in body if line.startswith("+")]) <= 45


@pytest.mark.parametrize("host", ["megatron-core", "deepspeed"])
def test_released_means_as_in_the_wheel(host, released):
    """The installer noted a digest of every file before anybody could patch it."""
    noted = {str(file): file.hash.value for file in distribution(host).files if file.hash}
    for file in patch_set(host, released[host].version).files:
        digest = base64.urlsafe_b64decode(noted[file.path] + "=").hex()
        assert digest in {pair.before for pair in file.digests}


def test_an_edited_file_is_refused(tree):
    edited = _files(tree)[1]
    edited.write_bytes(edited.read_bytes() + b"# mine\n")
    _refused(actions.apply, tree, f"{edited.relative_to(tree.root)}: neither as released nor as")
    _refused(actions.revert, tree, str(edited.relative_to(tree.root)), "pip install")
    _refused(actions.status, tree, "neither as released nor as patched")


def test_a_missing_file_is_refused(tree):
    _files(tree)[0].unlink()
    _refused(actions.apply, tree, str(_files(tree)[0].relative_to(tree.root)), "missing")


def test_an_unknown_version_is_refused(tree):
    other = replace(tree, version=tree.version[:-1] + "9")
    _refused(actions.apply, other, other.version, tree.version, "Did you mean")


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_read_only_place_is_refused(tree, place):
    last = _files(tree)[-1] if place == "file" else _files(tree)[-1].parent
    mode = last.stat().st_mode
    last.chmod(mode & 0o555)
    try:
        _refused(actions.apply, tree, str(last), "read-only")
    finally:
        last.chmod(mode)


def test_a_half_applied_patch_can_only_be_reverted(tree):
    released = contents(tree.root)
    first = _files(tree)[0]
    actions.apply(tree)
    for path in _files(tree)[1:]:
        path.write_bytes(released[str(path.relative_to(tree.root))])

    patched = f"patched: {first.relative_to(tree.root)};"
    _refused(actions.apply, tree, "half-applied", patched, "revert")
    _refused(actions.status, tree, "half-applied")
    assert "reverted 1 of" in actions.revert(tree)
    assert contents(tree.root) == released


def test_a_failure_in_the_middle_leaves_nothing_behind(tree, monkeypatch):
    """The disk fails at the last of the renames; what was renamed before is put back."""
    before = snapshot(tree.root)
    last, rename = _files(tree)[-1], os.replace

    def failing(source, destination):
        if destination == last:
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(PatchError, match="No space left"):
        actions.apply(tree)
    after = snapshot(tree.root)
    assert after.keys() == before.keys()
    assert all(after[path][:2] == before[path][:2] for path in before)


def test_a_hard_linked_cache_stays_as_released(tree, tmp_path):
    """Some installers link site-packages to a cache that other environments share."""
    cached = tmp_path / "cached.py"
    cached.hardlink_to(_files(tree)[0])
    content = cached.read_bytes()
    actions.apply(tree)
    assert cached.read_bytes() == content != _files(tree)[0].read_bytes()


def test_making_the_set_again_gives_the_shipped_one(tree, released, tmp_path):
    shipped = patches_folder() / tree.host / tree.version
    (pristine,) = (one.root for one in released.values() if replace(one, root=tree.root) == tree)
    actions.apply(tree)
    make_patch_set(
        pristine=pristine,
        edited=tree.root,
        host=tree.host,
        versions=list(patch_set(tree.host, tree.version).versions),
        folder=tmp_path / "made",
    )
    assert contents(tmp_path / "made") == contents(shipped)


def test_several_released_forms_of_a_file(tree, tmp_path):
    """Releases that differ in lines no diff touches share a set; each keeps its own bytes."""
    last, more = _files(tree)[-1], b"\n# one line more in this release\n"
    folder = tmp_path / "patches" / tree.host / tree.version
    shutil.copytree(patches_folder() / tree.host / tree.version, folder)
    other = last.read_bytes() + more
    actions.apply(tree)
    patched_other = last.read_bytes() + more
    actions.revert(tree)
    record = json.loads((folder / "manifest.json").read_text())
    record["files"][-1]["digests"].append({"before": sha256(other), "after": sha256(patched_other)})
    (folder / "manifest.json").write_text(json.dumps(record))

    last.write_bytes(other)
    actions.apply(tree, tmp_path / "patches")
    assert last.read_bytes() == patched_other
    actions.revert(tree, tmp_path / "patches")
    assert last.read_bytes() == other


def test_the_hosts_of_this_environment_are_patched():
    """All other tests of the hosts rely on it; ``make setup`` does it."""
    trees = find_trees()
    assert [tree.host for tree in trees] == list(HOSTS)
    for tree in trees:
        assert tree.root.is_relative_to(Path(sys.prefix))
        assert overall(examine(tree)) is State.PATCHED
