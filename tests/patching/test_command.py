"""``mcore-monitors patch`` on a git checkout, and what the command says when it can't."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mcore_monitors import __version__
from mcore_monitors.cli import patch
from mcore_monitors.cli.main import main
from mcore_monitors.errors import EXIT_BAD_CONFIG, ConfigError, HostError
from mcore_monitors.patching import actions
from mcore_monitors.patching.hosts import find_trees
from mcore_monitors.patching.manifest import patches_folder
from tests.patching.trees import contents, patch_set


def _git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tree):
    """The released files as a git checkout; DeepSpeed's names its release in ``version.txt``."""
    installed = tree.root / "deepspeed/git_version_info_installed.py"
    if installed.is_file():
        installed.unlink()
        (tree.root / "version.txt").write_text(tree.version + "\n")
    _git(tree.root, "init", "--quiet")
    _git(tree.root, "add", "--all")
    _git(tree.root, "commit", "--quiet", "--message", tree.version)
    return tree


def test_a_git_checkout(checkout, capsys):
    released = contents(checkout.root)
    target = ["--target", str(checkout.root)]
    assert main(["patch", "status", *target]) == 0
    assert "as released" in capsys.readouterr().out

    assert main(["patch", "apply", *target]) == 0
    assert f"{checkout.host} {checkout.version}" in capsys.readouterr().out
    changed = _git(checkout.root, "diff", "--name-only").split()
    assert changed == [file.path for file in patch_set(checkout.host, checkout.version).files]
    assert _git(checkout.root, "ls-files", "--others") == ""

    assert main(["patch", "revert", *target]) == 0
    assert _git(checkout.root, "status", "--porcelain") == ""
    assert {k: v for k, v in contents(checkout.root).items() if not k.startswith(".git")} == {
        k: v for k, v in released.items() if not k.startswith(".git")
    }


def test_git_understands_the_diffs(checkout):
    """A fork with edits of its own takes them with ``git apply --3way``, as the manual says."""
    folder = patches_folder() / checkout.host / checkout.version
    _git(checkout.root, "apply", *map(str, sorted(folder.glob("*.patch"))))
    assert "already applied" in actions.apply(checkout)


def test_a_fork_is_found_by_its_own_version(checkout):
    assert find_trees(target=checkout.root) == [replace(checkout, root=checkout.root.resolve())]


def test_a_folder_without_a_host(tmp_path, capsys):
    assert main(["patch", "apply", "--target", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert str(tmp_path) in err and "package_info.py" in err


def test_one_refusal_does_not_keep_the_other_host_from_its_turn(released, tmp_path, capsys):
    for name in ("megatron-core", "deepspeed"):
        for path, content in contents(released[name].root).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
    (tmp_path / "megatron/core/__init__.py").write_text("# mine\n")
    assert main(["patch", "apply", "--target", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "deepspeed" in out and "applied to" in out
    assert "megatron/core/__init__.py" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("detection.sustain", 0, "an integer >= 1"), EXIT_BAD_CONFIG),
        (HostError("no host"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_and_a_code(monkeypatch, capsys, error, code):
    def failing(args):
        raise error

    monkeypatch.setattr(patch, "run", failing)
    assert main(["patch", "status"]) == code
    err = capsys.readouterr().err
    assert err.startswith("mcore-monitors: ") and err.count("\n") == 1


def test_version_and_lightness():
    """The command answers without importing torch or a host."""
    script = (
        "import sys; from mcore_monitors.cli import main\n"
        "try: main.main(['--version'])\n"
        "except SystemExit as leave: code = leave.code\n"
        "heavy = {'torch', 'megatron', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(code or f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mcore-monitors {__version__}\n"), done.stderr
