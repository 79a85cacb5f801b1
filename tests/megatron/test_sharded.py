"""Sharded equals unsharded: every signal under every layout is the single process's value.

One process trains to iteration 2 and saves; it and every layout start from those weights on the same
data, with a drill's faulty kernel on, so that the key shift is a number and not round-off. The
optimizer starts anew in all of them: Megatron can't load its state under another expert parallelism.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from .train import Result, train

SETTINGS = {
    "interval": 2,
    "monitors": {
        "attention_update": {"windows": [2, 4], "every": 1},
        "router": {"every": 1},
        "attention_activity": {"every": 1},
        "optimizer": {"every": 1},
        "conservation": {"whole": True},  # other layouts look at other sequences otherwise
        "koopman": {"enabled": True, "every": 4, "rank": 16},
    },
    "detection": {"windows": [2, 4]},  # so that both are compared at every sample
    "drill": {"strength": 0.01, "from_iteration": 3},
    "console": False,
    "wandb": {"enabled": False},
}
ANEW = "--no-load-optim --no-load-rng"
LAYOUTS = {
    "TP 2 with sequence parallelism": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "EP 2": (2, "--expert-model-parallel-size 2"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "DP 2": (2, ""),
    "DP 2 with the distributed optimizer": (2, "--use-distributed-optimizer"),
    "TP 2 x PP 2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "4 micro-batches": (1, "--micro-batch-size 1"),
}
#: relative; the layouts add the same fp32 numbers up in another order, and six steps of training
#: carry that on. Δ2 is a difference of two nearly equal weights and shows it most.
TOLERANCE = {
    **{
        f"attention/{matrix}_{measure}": 1e-3
        for matrix in ("delta2", "delta3", "query_update", "key_update")
        for measure in ("effective_rank", "spectral_entropy", "frobenius", "stable_rank")
    },
    **{
        f"attention/{matrix}_{measure}": 1e-3
        for matrix in ("query_update", "key_update")
        for measure in ("spike_strength", "outliers")
    },
    **dict.fromkeys(
        (
            "attention/key_shift",
            "attention/value_output",
            "attention/query_key",
            "attention/key_shift_bias",
            "attention/query_key_spread",
            "router/shift",
            "norm/scale",
            "output/vocabulary_shift",
        ),
        1e-3,
    ),
    "attention/max_logit": 1e-4,
    "attention/entropy": 1e-5,
    "optimizer/update_weight_ratio": 1e-4,
    "optimizer/adam_update_rms": 1e-4,
    "optimizer/gradient_spike_share": 2e-2,  # a share of few: one element at the edge shows
    **{
        f"koopman/{name}": 1e-4
        for name in (
            "near_unit",
            "super_unit",
            "sub_unit",
            "spectral_radius",
            "condition",
            "kreiss",
            "nonlinearity",
            "tokens",
            "eigenvalue_real",
            "eigenvalue_imaginary",
            "mode_residual",
        )
    },
    "router/weight_similarity": 1e-4,
    "router/centred_conditioning": 1e-4,
    "router/row_norm_spread": 1e-4,
    "router/topk_margin_q05": 1e-4,
    # of two numbers that nearly agree
    "router/prediction_gap": 1e-3,
    **dict.fromkeys(
        (
            f"router/{name}"
            for name in (
                "routing_entropy",
                "routing_entropy_q05",
                "routing_entropy_q50",
                "routing_entropy_q95",
                "routing_entropy_normalised",
                "routing_entropy_normalised_q05",
                "routing_entropy_normalised_q50",
                "routing_entropy_normalised_q95",
                "predicted_entropy",
                "mixing_entropy",
                "topk_margin",
                "load_max_violation",
                "effective_experts",
                "dead_experts",
                "underused_experts",
                "largest_share",
                "largest_share_held",
                "z",
            )
        ),
        1e-5,
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save = f"--save {folder}/ckpt --save-interval 2 --exit-interval 2"
    result = train(folder, save, iterations=8)
    assert result.exit_code == 0, result.output
    return folder / "ckpt"


@pytest.fixture(scope="module")
def alone(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The reference: one process, one micro-batch layout, never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    result = train(folder, f"--load {start} {ANEW}", iterations=8, monitors=SETTINGS)
    assert result.exit_code == 0, result.output
    return result


def compare(result: Result, reference: Result, first: int = 0) -> int:
    """Compare all readings from iteration ``first`` on; returns how many there were."""
    compared = 0
    samples = {s.iteration: s for s in result.samples}
    for expected in reference.samples:
        if expected.iteration < first:
            continue
        sample = samples[expected.iteration]
        assert sample.signals.keys() == expected.signals.keys()
        for name, layers in expected.signals.items():
            assert sample.signals[name].keys() == layers.keys(), name
            tolerance = TOLERANCE[name.partition("@")[0]]
            for layer, values in layers.items():
                got = sample.signals[name][layer]
                assert len(got) == len(values)
                for value, wanted in zip(got, values, strict=True):
                    if math.isnan(wanted):  # a norm that this layer does not have
                        assert math.isnan(value)
                        continue
                    where = f"{name} layer {layer} iteration {sample.iteration}"
                    assert math.isclose(value, wanted, rel_tol=tolerance, abs_tol=1e-6), (
                        where, got, values,
                    )  # fmt: skip
                    compared += 1
        assert sample.loss == pytest.approx(expected.loss, rel=1e-5)
        assert sample.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    return compared


def test_reference_is_complete(alone: Result) -> None:
    assert [s.iteration for s in alone.samples] == [4, 6, 8]
    last = alone.samples[-1].signals
    assert {name.partition("@")[0] for name in last} == set(TOLERANCE)
    assert {len(v) for v in last["attention/delta2_effective_rank@4"].values()} == {4}
    assert {len(v) for v in last["attention/key_shift"].values()} == {2}
    assert all(v > 1e-4 for values in last["attention/key_shift"].values() for v in values)
    assert last["output/vocabulary_shift"].keys() == {2}
    assert all(len(v) == 2 for n, v in last.items() if not n.startswith("output/"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, start: Path, alone: Result, tmp_path: Path) -> None:
    processes, arguments = LAYOUTS[layout]
    result = train(
        tmp_path,
        f"--load {start} {ANEW} {arguments}",
        processes=processes,
        iterations=8,
        monitors=SETTINGS,
    )
    assert result.exit_code == 0, result.output[-4000:]
    assert compare(result, alone) >= 40


def test_resume_continues_the_grid(start: Path, alone: Result, tmp_path: Path) -> None:
    """A run that stops at 4 and is started again reads what an uninterrupted one reads."""
    save = f"--save {tmp_path}/saved --save-interval 4 --exit-interval 4"
    first = train(tmp_path, f"--load {start} {ANEW} {save}", iterations=8, monitors=SETTINGS)
    assert first.exit_code == 0, first.output[-4000:]
    second = train(tmp_path, f"--load {tmp_path}/saved", iterations=8, monitors=SETTINGS)
    assert second.exit_code == 0, second.output[-4000:]
    assert [e["from_iteration"] for e in second.kinds("resume")] == [2, 4]
    # snapshots are not saved: the window of 4 is full again at 4 + 4
    assert [s.iteration for s in second.samples] == [4, 6, 8]
    resumed = {s.iteration: s for s in second.samples}
    for iteration in (6, 8):
        for name, layers in resumed[iteration].signals.items():
            if name == "router/largest_share_held" or name.endswith("_bias"):  # start anew
                continue
            reference = next(s for s in alone.samples if s.iteration == iteration)
            for layer, values in layers.items():
                assert values == pytest.approx(
                    reference.signals[name][layer],
                    rel=TOLERANCE[name.partition("@")[0]],
                    abs=1e-6,
                    nan_ok=True,
                ), name


