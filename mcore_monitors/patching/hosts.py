"""Where a host's files are and which release they belong to, found without importing the host."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mcore_monitors.errors import PatchError


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A host's files on disk.

    Attributes:
        host: ``megatron-core`` or ``deepspeed``.
        version: the release, without anything local such as a commit.
        root: the folder that holds the host's top package, e.g. ``site-packages``.
    """

    host: str
    version: str
    root: Path

    def __str__(self) -> str:
        return f"{self.host} {self.version} in {self.root}"


def _megatron_version(root: Path) -> str | None:
    """Read the numbers of ``package_info.py``; importing it would start git."""
    try:
        text = (root / "megatron/core/package_info.py").read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = [re.search(rf"^{name} = (\d+)$", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(numbers):
        return None
    suffix = re.search(r"""^PRE_RELEASE = ["']([^"']*)["']""", text, re.M)
    return ".".join(match[1] for match in numbers) + (suffix[1] if suffix else "")


def _deepspeed_version(root: Path) -> str | None:
    """Read what the installation wrote, else the ``version.txt`` of a checkout."""
    if not (root / "deepspeed/__init__.py").is_file():
        return None
    try:
        text = (root / "deepspeed/git_version_info_installed.py").read_text(encoding="utf-8")
        match = re.search(r"""^version=["']([^"'+]+)""", text, re.M)
        return match[1] if match else None
    except OSError:
        pass
    try:
        return (root / "version.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None


_VERSION_OF: dict[str, Callable[[Path], str | None]] = {
    "megatron-core": _megatron_version,
    "deepspeed": _deepspeed_version,
}
#: The hosts that patches exist for, by the name of their wheel.
HOSTS = tuple(_VERSION_OF)


def _installed_root(host: str) -> Path | None:
    """Return where an ``import`` of the host would look; only the parent namespace is imported."""
    try:
        spec = find_spec({"megatron-core": "megatron.core", "deepspeed": "deepspeed"}[host])
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).resolve().parent
    return package.parents[1] if host == "megatron-core" else package.parent


def find_trees(host: str | None = None, target: Path | None = None) -> list[Tree]:
    """Return the trees of hosts to work on, one a host.

    Args:
        host: only this one; by default all that are there.
        target: a git checkout or a ``site-packages`` folder; by default what is installed.

    Raises:
        PatchError: there is none.
    """
    trees = []
    for name in [host] if host else HOSTS:
        root = target.resolve() if target else _installed_root(name)
        version = _VERSION_OF[name](root) if root else None
        if version:
            trees.append(Tree(host=name, version=version, root=root))
    if not trees:
        wanted = host or " or ".join(HOSTS)
        if target:
            raise PatchError(
                f"{target} holds no {wanted}: expected a folder with megatron/core/package_info.py,"
                " or with deepspeed/ and its version.txt."
            )
        raise PatchError(f"No {wanted} is installed for this Python; name a checkout by --target.")
    return trees
