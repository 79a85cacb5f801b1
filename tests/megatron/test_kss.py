"""Koopman spectral shaping in the real Megatron: sharded trainings are the one process's.

The weight of the term is far above what a training would use, so that a part of it that got lost
would show.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .train import Result, train

KSS = {"alpha": 5.0, "beta": 5.0, "interval": 2, "rank": 16}
SETTINGS = {
    "interval": 2,
    "monitors": {
        name: {"enabled": False}
        for name in ("attention_update", "conservation", "attention_activity", "optimizer")
    },
    "console": False,
    "wandb": {"enabled": False},
    "kss": KSS,
}
ANEW = "--no-load-optim --no-load-rng"
LAYOUTS = {
    # each rank has half of every sequence, and each layer is run twice
    "TP 2 with sequence parallelism and full recompute": (
        "--tensor-model-parallel-size 2 --sequence-parallel "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ),
    # each layer is on a stage of its own
    "PP 2": "--pipeline-model-parallel-size 2",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Initial weights depend on the layout, so all begin with one checkpoint."""
    folder = tmp_path_factory.mktemp("start")
    save = f"--save {folder}/ckpt --save-interval 2 --exit-interval 2"
    result = train(folder, save, iterations=8)
    assert result.exit_code == 0, result.output[-4000:]
    return folder / "ckpt"


@pytest.fixture(scope="module")
def alone(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("alone")
    result = train(folder, f"--load {start} {ANEW}", iterations=8, monitors=SETTINGS)
    assert result.exit_code == 0, result.output[-4000:]
    return result


def test_shaped_steps_show_in_the_gradient(alone: Result) -> None:
    norms = {iteration: float(norm) for iteration, (_, norm) in alone.losses.items()}
    assert min(norms[4], norms[6], norms[8]) > 1.1 * max(norms[3], norms[5], norms[7])
    assert not alone.kinds("message") and not alone.kinds("monitor_disabled")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, start: Path, alone: Result, tmp_path: Path) -> None:
    result = train(
        tmp_path,
        f"--load {start} {ANEW} {LAYOUTS[layout]}",
        processes=2,
        iterations=8,
        monitors=SETTINGS,
    )
    assert result.exit_code == 0, result.output[-4000:]
    assert not result.kinds("message") and not result.kinds("monitor_disabled")
    assert len(result.losses) == 6
    for iteration, (loss, norm) in result.losses.items():
        expected_loss, expected_norm = alone.losses[iteration]
        assert float(loss) == pytest.approx(float(expected_loss), rel=2e-5), iteration
        # printed with three digits behind the point
        assert float(norm) == pytest.approx(float(expected_norm), rel=2e-4, abs=2e-3), iteration
