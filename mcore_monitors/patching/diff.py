"""Strict application of a unified diff, forward or back: every line at its place, no fuzz."""

from __future__ import annotations

from unidiff import Hunk, PatchSet

from mcore_monitors.errors import PatchError


def _lines(text: str) -> list[str]:
    """Split after each newline only; ``str.splitlines`` would also split at form feeds."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _sides(hunk: Hunk, reverse: bool) -> tuple[int, list[str], list[str]]:
    """Return where a hunk starts (a line number from 1), what it expects and what it leaves."""
    source = [line.value for line in hunk.source_lines()]
    target = [line.value for line in hunk.target_lines()]
    if reverse:
        return hunk.target_start, target, source
    return hunk.source_start, source, target


def apply_diff(content: bytes, diff: str, *, reverse: bool = False) -> bytes:
    """Return a file's content with a unified diff of that one file applied.

    Args:
        content: the file as it is, UTF-8.
        diff: the unified diff; its hunks have context around them and stand in order.
        reverse: take the diff's changes out instead of putting them in.

    Raises:
        PatchError: a line that the diff expects isn't where it should be.
    """
    (patched_file,) = PatchSet(diff)
    lines = _lines(content.decode("utf-8"))
    result: list[str] = []
    done = 0
    for hunk in patched_file:
        start, expected, replacement = _sides(hunk, reverse)
        begin = start - 1
        found = lines[begin : begin + len(expected)]
        if begin < done or found != expected:
            raise PatchError(
                f"{patched_file.path}: the lines from {start} on are not those the patch expects."
            )
        result += lines[done:begin] + replacement
        done = begin + len(expected)
    return "".join(result + lines[done:]).encode("utf-8")
