"""Trees of the real hosts, as released, to patch."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from mcore_monitors.patching.hosts import Tree
from tests.patching.trees import copy_installed, unpack_wheel


@pytest.fixture(scope="session")
def released(tmp_path_factory) -> dict[str, Tree]:
    """Trees as released, by name; not to be changed."""
    return {
        "megatron-core": copy_installed("megatron-core", tmp_path_factory.mktemp("megatron")),
        "deepspeed": copy_installed("deepspeed", tmp_path_factory.mktemp("deepspeed")),
        "megatron-core-0.18.2": unpack_wheel(tmp_path_factory.mktemp("older")),
    }


@pytest.fixture(params=["megatron-core", "deepspeed", "megatron-core-0.18.2"])
def tree(request, released, tmp_path) -> Tree:
    """A tree as released, one's own to patch; a test runs once for each release."""
    original = released[request.param]
    shutil.copytree(original.root, tmp_path / "tree")
    return replace(original, root=tmp_path / "tree")
