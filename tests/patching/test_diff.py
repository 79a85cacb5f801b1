"""The applier of unified diffs: exact, in both directions."""

from __future__ import annotations

import random

import pytest

from mcore_monitors.errors import PatchError
from mcore_monitors.patching.diff import apply_diff
from mcore_monitors.patching.make import _diff

BEFORE = "".join(f"line {number}\n" for number in range(20)).encode()
AFTER = BEFORE.replace(b"line 9\n", b"line 9\nadded\n")


def test_forward_and_back():
    diff = _diff("x.py", BEFORE, AFTER)
    assert apply_diff(BEFORE, diff) == AFTER
    assert apply_diff(AFTER, diff, reverse=True) == BEFORE


@pytest.mark.parametrize(
    "content",
    [b"shifted\n" + BEFORE, BEFORE.replace(b"line 8\n", b"line 8 \n"), BEFORE[:40], b"", AFTER],
    ids=["shifted", "edited context", "cut off", "empty", "already applied"],
)
def test_no_fuzz(content):
    with pytest.raises(PatchError, match=r"x\.py: the lines from 8 on"):
        apply_diff(content, _diff("x.py", BEFORE, AFTER))


def test_random_edits_lead_there_and_back():
    """Lines with form feeds and separators that ``str.splitlines`` would split are kept whole."""
    draw = random.Random(0)
    words = ["a", "b", "\x0c", "x\u2028y", "\t", "", "c\r"]
    for _ in range(60):
        before = [draw.choice(words) for _ in range(draw.randint(1, 40))]
        after = [line for line in before if draw.random() > 0.1]
        for _ in range(draw.randint(1, 5)):
            after.insert(draw.randint(0, len(after)), draw.choice(words) + "new")
        old, new = (("\n".join(lines) + "\n").encode() for lines in (before, after))
        diff = _diff("x.py", old, new)
        assert apply_diff(old, diff) == new
        assert apply_diff(new, diff, reverse=True) == old
