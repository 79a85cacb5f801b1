"""Koopman spectral shaping in the real DeepSpeed: a shaped engine trains like PyTorch by hand."""

from __future__ import annotations

import json

import pytest

from .processes import start


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("kss")
    code, output = start("tests.deepspeed.inside.kss", folder, processes=1)
    assert code == 0, output[-4000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize(
    "name",
    ["huggingface ZeRO 0", "huggingface ZeRO 3", "dense ZeRO 2, divided by the script"],
)
def test_an_engine_trains_as_by_hand(name: str, losses: dict[str, list[float]]) -> None:
    by_hand = losses[f"{name.split()[0]} by hand"]
    assert losses[name] == pytest.approx(by_hand, rel=1e-4)


def test_shaping_shows(losses: dict[str, list[float]]) -> None:
    shaped, plain = losses["huggingface by hand"], losses["huggingface unshaped"]
    assert shaped[:4] == plain[:4]  # two micro-batches a step, the first shaped step is the second
    # ten times what an engine may be off
    assert max(abs(a / b - 1) for a, b in zip(shaped[6:], plain[6:], strict=True)) > 1e-3
