"""Weights out of ZeRO's shards: attention-update signals are those of the dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from tests.deepspeed.inside.layouts import FOUR, TWO
from tests.deepspeed.inside.models import batch, huggingface_model, initialise, loss_of
from tests.deepspeed.inside.start import Walked
from tests.deepspeed.inside.walk import ADAMW, BATCH, STEPS

HF = [(2, x) for x in TWO if x["model"] in ("huggingface", "autoep") and "dtype" not in x]
HF += [(4, x) for x in FOUR if x["model"] == "huggingface"]


def factors(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer W_q [4, d, D] and W_k [4, d, D] for each query head, QK-norm folded in, fp64."""
    out = []
    for layer in model.model.layers:
        a = layer.self_attn
        query = a.q_proj.weight.detach().double().unflatten(0, (4, 4))
        key = a.k_proj.weight.detach().double().unflatten(0, (2, 4)).repeat_interleave(2, dim=0)
        query = query * a.q_norm.weight.detach().double()[:, None]
        key = key * a.k_norm.weight.detach().double()[:, None]
        out.append((query.clone(), key.clone()))
    return out


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[int, list[list[float]]]]:
    """Signal to iteration to [layer][head], from D×D matrices of a plain training."""
    torch.manual_seed(0)
    model = huggingface_model()
    initialise(model, 0, 1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    course = []
    for step in range(STEPS):
        loss_of(model, batch(step, BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
        course.append(factors(model))
    signals: dict[str, dict[int, list[list[float]]]] = {}
    for window in (1, 2):
        for step in range(window, STEPS):
            for (q0, k0), (q1, k1) in zip(course[step - window], course[step], strict=True):
                heads = [
                    dense(q1[h] - q0[h], k1[h] - k0[h], q0[h], k0[h]) for h in range(4)
                ]
                for name in heads[0]:
                    place = signals.setdefault(f"attention/{name}@{window}", {})
                    place.setdefault(step + 1, []).append([head[name] for head in heads])
    return signals


def dense(dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> dict[str, float]:
    """Signals of one head from Δ2 = ΔW_q W_kᵀ + W_q ΔW_kᵀ and Δ3 as D×D matrices."""
    out = {}
    for name, matrix in {"delta2": dq.T @ k + q.T @ dk, "delta3": dq.T @ dk}.items():
        s2 = torch.linalg.svdvals(matrix).square()
        p = s2 / s2.sum()
        out[f"{name}_effective_rank"] = math.exp(float(torch.special.entr(p).sum()))
        out[f"{name}_stable_rank"] = float(s2.sum() / s2.max())
        out[f"{name}_frobenius"] = float(s2.sum().sqrt())
    return out


@pytest.mark.parametrize(
    ("processes", "layout"), HF, ids=[f"{n} processes, {x['name']}" for n, x in HF]
)
def test_update_signals_are_those_of_dense_matrices(
    processes: int,
    layout: dict,
    reference: dict[str, dict[int, list[list[float]]]],
    request: pytest.FixtureRequest,
) -> None:
    walked: Walked = request.getfixturevalue({2: "two", 4: "four"}[processes])
    compared = 0
    for sample in walked.samples(layout["name"]):
        for name, by_iteration in reference.items():
            for layer, values in enumerate(by_iteration.get(sample.iteration, []), start=1):
                assert sample.signals[name][layer] == pytest.approx(values, rel=1e-3), name
                compared += 1
    assert compared == 6 * (2 + 1) * 2  # signals, samples with a window of 1 and of 2, layers


@pytest.mark.parametrize("layout", TWO, ids=[x["name"] for x in TWO])
def test_views_read_the_best_weight_there_is(layout: dict, two: Walked) -> None:
    for rank in two.ranks(layout["name"]):
        weights = rank["weights"]
        assert weights["format"] == "torch.float32"
        assert weights["shape"] == [2, 4, 16]
        low = "dtype" in layout
        assert weights["collective"] == (layout["stage"] == 3 or low)
        if low:  # finer than the model's own bf16, whose weight and norm are each rounded
            assert 0 < weights["off"] < 2**-7
        else:
            assert weights["off"] < 1e-6  # the norm's ε
