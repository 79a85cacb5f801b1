"""Adam's state out of DeepSpeed's shards: each element counts once, for the step that was made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.hosts.deepspeed.optimizer_state import AdamSteps, Piece
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.optimizer import OptimizerMonitor
from mcore_monitors.parallel import Packed
from mcore_monitors.signals.optimizer import SUMS
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.views import ModelView
from tests.deepspeed.inside.layouts import (
    ALONE,
    COMPILED,
    FOLLOWED,
    FOUR,
    LEFT_OUT,
    PADDED,
    TWO,
    compiled,
)
from tests.deepspeed.inside.models import (
    EXPERTS,
    LAYERS,
    WIDTH,
    batch,
    huggingface_model,
    initialise,
    loss_of,
)
from tests.deepspeed.inside.start import Walked
from tests.deepspeed.inside.walk import ADAMW, BATCH, STEPS

EVERY = [(1, x) for x in ALONE] + [(2, x) for x in (*TWO, *FOLLOWED)]
EVERY += [(4, x) for x in (*FOUR, PADDED)]
NAMES = [f"{n} processes, {x['name']}" for n, x in EVERY]
FLOAT32 = [(n, x) for n, x in EVERY if "dtype" not in x and "followed" not in x]

#: a layer of DeepSpeed's own: attention, gate and experts with two linear maps
DEEPSPEED = 48 * WIDTH + WIDTH * EXPERTS + EXPERTS * (4 * WIDTH**2 + 3 * WIDTH)

follow = [pytest.param(2, x, id=x["name"]) for x in FOLLOWED]
follow += [pytest.param(4, PADDED, id=PADDED["name"])]
follow += [
    pytest.param(
        2,
        x,
        id=x["name"],
        marks=pytest.mark.skipif(not compiled(name), reason=f"DeepSpeed's {name} is not compiled"),
    )
    for name, layouts in COMPILED.items()
    for x in layouts
]


@pytest.fixture
def walked(request: pytest.FixtureRequest, processes: int) -> Walked:
    return request.getfixturevalue({1: "alone", 2: "two", 4: "four"}[processes])


def of_layer(model: torch.nn.Module, layer: int) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if f"layers.{layer - 1}." in n}


@pytest.fixture(scope="module")
def plain() -> dict[tuple[int, int], tuple[float, float]]:
    """(iteration, layer) to RMS(Δθ)/RMS(θ) and RMS(u) of a plain training, from its weights."""
    torch.manual_seed(0)
    model = huggingface_model()
    initialise(model, 0, 1)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    decay = optimizer.param_groups[0]["weight_decay"]
    assert decay > 0
    out = {}
    for step in range(STEPS):
        loss_of(model, batch(step, BATCH)).backward()
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for layer in range(1, LAYERS + 1):
            names = of_layer(model, layer)
            old = torch.cat([before[n].flatten() for n in names])
            new = torch.cat([p.detach().double().flatten() for p in names.values()])
            update = (old - new) / ADAMW["lr"] - decay * old
            rms = float(update.square().mean().sqrt())
            out[step + 1, layer] = (float((new - old).norm() / new.norm()), rms)
    return out


@pytest.mark.parametrize(("processes", "layout"), EVERY, ids=NAMES)
def test_each_element_counts_once(processes: int, layout: dict[str, Any], walked: Walked) -> None:
    if layout["model"] == "deepspeed":
        expected = [DEEPSPEED] * LAYERS
    else:
        model = huggingface_model(head_dim=layout.get("head_dim", 4))
        expected = [
            sum(p.numel() for p in of_layer(model, n).values()) for n in range(1, LAYERS + 1)
        ]
    samples = walked.ranks(layout["name"])[0]["sums"]
    assert len(samples) == layout.get("steps", STEPS)
    counts = [[sums[SUMS.index("elements")] for sums in layers] for layers in samples]
    taken = [count for count in counts if any(count)]
    assert len(taken) >= 2
    assert all(count == expected for count in taken)


@pytest.mark.parametrize(
    ("processes", "layout"), FLOAT32, ids=[f"{n} processes, {x['name']}" for n, x in FLOAT32]
)
def test_steps_are_those_of_a_plain_training(
    processes: int,
    layout: dict[str, Any],
    walked: Walked,
    alone: Walked,
    plain: dict[tuple[int, int], tuple[float, float]],
) -> None:
    """Of transformers' model; DeepSpeed's own has a plain training in DeepSpeed alone."""
    if layout["model"] == "deepspeed":
        reference = {
            (s.iteration, layer): values(s, layer)
            for s in alone.samples("deepspeed-zero0-ep1-micro1")
            for layer in range(1, LAYERS + 1)
        }
    else:
        reference = plain
    samples = walked.samples(layout["name"])
    assert len(samples) == STEPS
    for sample in samples:
        for layer in range(1, LAYERS + 1):
            expected = reference[sample.iteration, layer]
            assert values(sample, layer) == pytest.approx(expected, rel=1e-5)


def values(sample: Any, layer: int) -> tuple[float, ...]:
    names = ("optimizer/update_weight_ratio", "optimizer/adam_update_rms")
    return tuple(sample.signals[name][layer][0] for name in names)


@pytest.mark.parametrize(("processes", "layout"), follow)
def test_steps_are_those_of_whole_tensors(
    processes: int, layout: dict[str, Any], walked: Walked
) -> None:
    """With clipping, weight decay and a learning rate that moves; fp16 with steps that overflow."""
    ranks = walked.ranks(layout["name"])
    assert all(rank["sums"] == ranks[0]["sums"] for rank in ranks)
    # DeepSpeed's operators correct for the beginning in single precision
    own = not layout["config"]["optimizer"]["params"]["torch_adam"]
    tolerance = {"updates": 1e-6, "moved": 5e-5 if own else 1e-5, "weights": 1e-6}
    spikes = searched = 0
    for sums, expected, sample in zip(
        ranks[0]["sums"], ranks[0]["expected"], walked.samples(layout["name"]), strict=True
    ):
        if expected is None:
            assert not any(map(any, sums))
            assert not any(name.startswith("optimizer/") for name in sample.signals)
            continue
        for found, there in zip(sums, expected, strict=True):
            found, there = (dict(zip(SUMS, x, strict=True)) for x in (found, there))
            for name, close in tolerance.items():
                assert found[name] == pytest.approx(there[name], rel=close), name
            assert found["elements"] == there["elements"]
            assert found["searched"] == there["searched"]
            assert found["spikes"] == pytest.approx(there["spikes"], rel=0.05, abs=1)
            spikes, searched = spikes + there["spikes"], searched + there["searched"]
    if layout["followed"]["searched"]:
        assert 20 < spikes < searched / 10
    else:
        assert spikes == searched == 0
    skipped = ranks[0]["expected"].count(None)
    assert skipped >= 2 if "fp16" in layout["config"] and layout["stage"] > 0 else skipped == 0


@pytest.mark.parametrize(("processes", "layout"), follow)
def test_losses_are_bitwise_those_without(
    processes: int, layout: dict[str, Any], walked: Walked
) -> None:
    for rank in walked.ranks(layout["name"]):
        assert len(rank["with"]) == layout["steps"] * layout["accumulate"]
        assert rank["with"] == rank["without"]


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_what_cannot_be_read_is_said(reason: str, two: Walked) -> None:
    name = LEFT_OUT[reason]["name"]
    (start,) = (e for e in EventReader(two.folder / name).read() if e["kind"] == "start")
    assert f"optimizer signals: {reason}" in start["left_out"]
    assert "optimizer" not in start["monitors"]
    assert len(two.samples(name)) == STEPS
    for rank in two.ranks(name):
        assert rank["with"] == rank["without"]


class CountsOnTheHost(torch.optim.Optimizer):
    """Its state is as that of DeepSpeed's and Apex's Adam."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8})
        self.defaults["weight_decay"] = self.param_groups[0]["weight_decay"] = 0.0

    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter)


def test_nothing_waits_for_the_card() -> None:
    """On fake CUDA tensors, which have no values: a large piece, and a small one of the same."""
    card = torch.device("cuda")
    with FakeTensorMode():
        main = torch.nn.Parameter(torch.empty(30_000, device=card))
        optimizer = CountsOnTheHost([main])
        state = StepState(iteration=10, armed=True)
        pieces = [
            Piece(layer=1, main=main, start=5, size=20_000),
            Piece(layer=1, main=main, start=20_005, size=100),
        ]
        steps = AdamSteps(optimizer, pieces, state, searched_from=2)
        model = ModelView(
            layers=2, heads=1, groups=1, experts=1, device=card, sequence_length=8,
            activation_dtype=torch.bfloat16, optimizer=steps.views(),
        )  # fmt: skip
        monitor = OptimizerMonitor(model, interval=10, every=2)
        crew = SimpleNamespace(monitors=[monitor], guarded=lambda monitor, call: call)
        steps.listen(SimpleNamespace(crew=crew))
        packed = Packed(monitor.schema(), card)
        for state.iteration, held in ((10, True), (20, False), (30, True)):
            main.grad = torch.empty_like(main)
            optimizer.step()
            main.grad = None
            # the second sample is the other layers' turn
            assert all((piece.noted is not None) == held for piece in pieces)
            monitor.collect(state.iteration, packed.fields)
            assert all(piece.noted is None for piece in pieces)
            assert packed.fields["sums"].device.type == "cuda"
            assert packed.reduce()["sums"].device.type == "cpu"
