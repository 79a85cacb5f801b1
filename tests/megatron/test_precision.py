"""Updates of a bfloat16 run are those of the fp32 run, where they are read from main weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run


def _trained(rank: int, which: list[dict[str, bool]]) -> list[dict[str, Any]]:
    from mcore_monitors import cpu

    cpu.install()
    from .inside import precision

    found = [precision.both_ways(**settings) for settings in which]
    if {"bf16": True, "distributed": True} in which and len(which) == 1:
        found.append(precision.pieces())
    return found


def _worst(values: list[float], reference: list[float]) -> float:
    return max(abs(v / r - 1) for v, r in zip(values, reference, strict=True))


@pytest.fixture(scope="module")
def one() -> list[dict[str, Any]]:
    kinds = [{"bf16": False, "distributed": False}, {"bf16": True, "distributed": False}]
    return run(1, _trained, kinds, timeout=240)[0]


@pytest.fixture(scope="module")
def two() -> list[list[dict[str, Any]]]:
    return run(2, _trained, [{"bf16": True, "distributed": True}], timeout=240)


def test_main_weights_give_the_values_of_fp32(one: Any, two: Any) -> None:
    """Learning rate 3e-6, window 50: seen 0.2%; 20% to 50% too high from bf16 weights."""
    fp32, whole = one
    assert len(fp32["best"]) == 8  # two layers of four heads
    for run_of_bf16 in (whole, *(found for found, _ in two)):
        assert run_of_bf16["formats"] == ["torch.float32"]
        assert _worst(run_of_bf16["best"], fp32["best"]) < 0.05
        assert run_of_bf16["left_out"][0] == []
    for sharded, _ in two:
        assert sharded["collective"] == [True, True]
        # without: rounding is as large as the update and fills the spectrum
        assert all(b > 1.15 * v for b, v in zip(sharded["plain"], fp32["best"], strict=True))
        assert "fp32 main weights" in sharded["left_out"][1][0]
    assert whole["collective"] == [False, False]


def test_weights_that_are_gathered_late_are_read_from_the_pieces(two: Any) -> None:
    """With overlapped gathering the model's own weights are one step old on the other ranks."""
    for _, late in two:
        assert late["best"] < 1e-8
        assert late["plain"] == pytest.approx(3e-6, rel=0.1)
