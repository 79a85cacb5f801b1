"""Makes a patch set from two copies of a host, one as released and one edited.

    python -m mcore_monitors.patching.make --pristine DIR --edited DIR \\
        --host megatron-core --versions 0.19.2 0.19.0

The diffs and the manifest go to ``patches/HOST/FIRST_VERSION``. Only files under the edited folder
count, so it may hold just those that differ. Needs git.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from mcore_monitors.errors import PatchError
from mcore_monitors.patching.diff import apply_diff
from mcore_monitors.patching.hosts import HOSTS
from mcore_monitors.patching.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    patches_folder,
    sha256,
)


def _diff(path: str, before: bytes, after: bytes) -> str:
    """Return git's diff of one file.

    git names both contents by their full ids, so that ``git apply --3way`` can merge the diff into
    a fork that has the release in its history.
    """
    with tempfile.TemporaryDirectory() as folder:
        for side, content in (("a", before), ("b", after)):
            file = Path(folder, side, path)
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
        # Settings of the user's own must not change what is written.
        done = subprocess.run(
            ["git", "-c", "core.autocrlf=false", "diff", "--no-index", "--no-prefix", "--no-color"]
            + ["--no-ext-diff", "--full-index", "--histogram", "--unified=3", "--", "a", "b"],
            cwd=folder,
            capture_output=True,
        )
    if done.returncode != 1:
        raise PatchError(f"{path}: git diff failed: {done.stderr.decode().strip()}")
    return done.stdout.decode("utf-8")


def make_patch_set(
    *, pristine: Path, edited: Path, host: str, versions: list[str], folder: Path
) -> list[str]:
    """Write a patch set and return the paths of the files that it patches.

    Args:
        pristine: the folder that holds the released host's top package.
        edited: the same with the call sites added; files that are absent or equal are left out.
        host: ``megatron-core`` or ``deepspeed``.
        versions: the releases that the set is good for.
        folder: the set's own folder; replaced if it exists.

    Raises:
        PatchError: the folders don't differ, or a diff doesn't reproduce the edited file.
    """
    diffs, records = {}, []
    for after_path in sorted(edited.rglob("*.py")):
        path = after_path.relative_to(edited).as_posix()
        before, after = (pristine / path).read_bytes(), after_path.read_bytes()
        if before == after:
            continue
        diff = _diff(path, before, after)
        if (apply_diff(before, diff), apply_diff(after, diff, reverse=True)) != (after, before):
            raise PatchError(f"{path}: the diff does not lead there and back.")
        name = path.replace("/", ".") + ".patch"
        diffs[name] = diff
        digests = [{"before": sha256(before), "after": sha256(after)}]
        records.append({"path": path, "diff": name, "digests": digests})
    if not records:
        raise PatchError(f"{edited} has no file that differs from {pristine}.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, diff in diffs.items():
        (folder / name).write_text(diff, encoding="utf-8")
    manifest = {"format": MANIFEST_FORMAT, "host": host, "versions": versions, "files": records}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return [record["path"] for record in records]


def main() -> None:
    """Read the command line, make the set and say what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m mcore_monitors.patching.make", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--pristine", type=Path, required=True, help="the host as released")
    parser.add_argument("--edited", type=Path, required=True, help="the host with its call sites")
    parser.add_argument("--host", choices=HOSTS, required=True)
    parser.add_argument("--versions", nargs="+", required=True, help="e.g. 0.19.2 0.19.0")
    args = parser.parse_args()
    folder = patches_folder() / args.host / args.versions[0]
    made = make_patch_set(
        pristine=args.pristine,
        edited=args.edited,
        host=args.host,
        versions=args.versions,
        folder=folder,
    )
    print(f"{folder}: {', '.join(made)}")


if __name__ == "__main__":
    main()
