"""Every attention layout under every split: the views against the layers' own dense maps.

The processes build real Megatron layers, so the stand-in is put in before Megatron is imported.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed import run

#: (tensor-parallel ranks, data replicas)
SPLITS = {2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1)]}
HEADS = list(range(4))
LATENT = sorted((part, head) for part in ("nope", "rope") for head in HEADS)
PLAIN = [("", head) for head in HEADS]


def _walk(rank: int, splits: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
    from mcore_monitors import cpu

    cpu.install()
    from .inside import layouts

    found = {}
    for split in splits:
        rows, left_out = layouts.walk(split[0])
        found[split] = rows, layouts.counted_once(rows), left_out
    return found


def _alone(rank: int) -> tuple[Any, dict[str, list[float]]]:
    found = _walk(rank, [(1, 1)])
    from .inside import layouts

    return found, layouts.norms()


def test_one_process() -> None:
    ((found, norms),) = run(1, _alone, timeout=240)
    check(found)
    # the scale of Megatron's real norms is folded in
    assert sorted(norms) == ["LayerNorm", "RMSNorm"]
    for values in norms.values():
        assert values == pytest.approx([1, 2, 3, 4, 5, 6, *[3] * 6], rel=1e-5)


@pytest.mark.parametrize("world", SPLITS)
def test_more_processes(world: int) -> None:
    for found in run(world, _walk, SPLITS[world], timeout=240):
        assert list(found) == SPLITS[world]
        check(found)


def check(found: dict[tuple[int, int], Any]) -> None:
    """One rank's readings against the dense values, and what all ranks computed."""
    for split, (rows, counted, left_out) in found.items():
        assert len(rows) == 12 and left_out == []
        for name, values in rows.items():
            # every head by exactly one of all ranks
            assert counted[name] == (LATENT if name.startswith("latent") else PLAIN), name
            for part, head, wanted, qr, gram in values:
                where = (split, name, part, head, wanted, qr, gram)
                assert 1 < wanted < 13, where
                assert math.isclose(qr, wanted, rel_tol=1e-6), where
                assert math.isclose(gram, wanted, rel_tol=1e-3), where
