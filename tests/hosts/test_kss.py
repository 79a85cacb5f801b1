"""Koopman spectral shaping at the layers: its gradient, when it acts, and how it fails."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcore_monitors.config import KssConfig, from_dict
from mcore_monitors.errors import ConfigError
from mcore_monitors.hosts.kss import Shaping
from mcore_monitors.monitors.base import StepState
from mcore_monitors.parallel import GroupSum
from mcore_monitors.signals.kss import directions, moments_of, operator_from, shaping_loss
from tests.distributed import run

WIDTH, LAYERS, RANK = 12, 4, 5
SETTINGS = KssConfig(alpha=0.7, beta=2.0, gamma=0.3, interval=10, share=0.5, rank=RANK)


class Layer(nn.Module):
    """Told its input by keyword and returning a tuple, as Megatron's layers do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 2)

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + (hidden_states @ self.weight).tanh(), None


class Stack(nn.Module):
    def __init__(self, recompute: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute is None:
                x, _ = layer(hidden_states=x)
            else:
                def call(y: Tensor, layer: Layer = layer) -> Tensor:
                    return layer(hidden_states=y)[0]

                x = checkpoint(call, x, use_reentrant=self.recompute == "reentrant")
        return x


def tokens(count: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 2, WIDTH, generator=generator)


def shaped(
    model: Stack, iteration: int, scale: float = 1.0, total: GroupSum | None = None
) -> Shaping:
    state = StepState(iteration=iteration)
    shaping = Shaping(
        SETTINGS, range(1, LAYERS + 1), state, torch.device("cpu"),
        scale=lambda _: scale, total=total,
    )  # fmt: skip
    for number, layer in enumerate(model.layers, start=1):
        shaping.attach(number, layer, WIDTH)
    return shaping


def gradients(model: Stack, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (scale * model(x).square().sum(-1).mean()).backward()
    return [x.grad, *(layer.weight.grad for layer in model.layers)]


def literal(x: Tensor, iteration: int) -> list[Tensor]:
    """The loss with the term written into it, by autograd alone."""
    model = Stack()
    shaping = shaped(Stack(), iteration)
    x = x.clone().requires_grad_()
    loss, states = 0.0, x
    for number, layer in enumerate(model.layers, start=1):
        after, _ = layer(hidden_states=states)
        if number in shaping.chosen(iteration):
            along = shaping._along(number, states)
            operator = operator_from(moments_of(states, after, along), RANK)
            loss = loss + 0.7 / 2 * shaping_loss(operator, beta=2.0, gamma=0.3)
        states = after
    (loss + states.square().sum(-1).mean()).backward()
    return [x.grad, *(layer.weight.grad for layer in model.layers)]


def same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-4) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_gradient_is_that_of_the_loss_with_the_term(recompute: str, scale: float) -> None:
    model = Stack(recompute)
    shaping = shaped(model, 20, scale)
    found = gradients(model, tokens(), scale)
    same([g / scale for g in found], literal(tokens(), 20))
    plain = gradients(Stack(), tokens())
    assert not torch.allclose(plain[0], found[0] / scale, rtol=1e-2)
    assert shaping.on_step(20) == []


def test_nothing_happens_in_between_and_in_evaluation() -> None:
    plain = gradients(Stack(), tokens())
    for iteration, training in ((21, True), (20, False)):
        model = Stack().train(training)
        shaped(model, iteration)
        for a, b in zip(gradients(model, tokens()), plain, strict=True):
            assert torch.equal(a, b)


def test_the_output_is_bitwise_the_layers_and_no_view() -> None:
    model, plain = Stack(), Stack()
    shaped(model, 20)
    out = model(tokens())
    assert torch.equal(out, plain(tokens())) and out._base is None


def test_half_of_the_layers_drawn_anew_each_time() -> None:
    shaping, other = shaped(Stack(), 20), shaped(Stack(), 20)
    drawn = [shaping.chosen(i) for i in range(10, 2010, 10)]
    assert drawn == [other.chosen(i) for i in range(10, 2010, 10)]
    assert {len(d) for d in drawn} == {2} and len({frozenset(d) for d in drawn}) == 6
    counts = [sum(n in d for d in drawn) for n in range(1, LAYERS + 1)]
    assert all(75 < c < 125 for c in counts)
    assert shaping.chosen(15) == set()


def test_what_is_not_finite_leaves_the_gradient_alone(capsys: pytest.CaptureFixture) -> None:
    x = tokens()
    x[3, 0, 2] = torch.nan
    model, plain = Stack(), Stack()
    shaping = shaped(model, 20)
    # a loss that does not see the broken token
    for m in (model, plain):
        m(x)[10:].square().mean().backward()
    for a, b in zip(model.layers, plain.layers, strict=True):
        assert torch.equal(a.weight.grad, b.weight.grad) or not b.weight.grad.isfinite().all()
    [event] = shaping.on_step(20)
    assert event["kind"] == "message" and "2 of 2 gradients" in event["text"]
    assert "not finite" in capsys.readouterr().err
    assert not shaping.off


def test_dead_hooks_are_said(capsys: pytest.CaptureFixture) -> None:
    shaping = shaped(Stack(), 10)
    assert shaping.on_step(10) == shaping.on_step(20) == []
    [event] = shaping.on_step(30)
    assert event == {
        "kind": "monitor_disabled", "monitor": "kss", "error": "no layer called its hooks"
    }  # fmt: skip
    assert shaping.off and "off on all ranks" in capsys.readouterr().err


def _half(rank: int, world: int) -> list[Tensor]:
    import torch.distributed as dist

    model = Stack()
    shaping = shaped(model, 20, total=GroupSum(dist.group.WORLD if world > 1 else None))
    x = tokens().chunk(world)[rank].clone().requires_grad_()
    (model(x).square().sum(-1).mean() / world).backward()
    assert shaping.on_step(20) == []
    weights = [layer.weight.grad for layer in model.layers]
    return [x.grad.numpy(), *(w.numpy() for w in weights)]


def _failing(rank: int) -> list[Any]:
    import torch.distributed as dist

    model = Stack()
    shaping = shaped(model, 20, total=GroupSum(dist.group.WORLD))
    if rank == 1:

        def broken(*_: Any) -> Tensor:
            raise RuntimeError("no directions")

        shaping._along = broken
    found = gradients(model, tokens())
    events = shaping.on_step(20)
    again = gradients(copy.deepcopy(Stack()), tokens())
    return [events, shaping.off, all(torch.equal(a, b) for a, b in zip(found, again, strict=True))]


def test_ranks_that_share_a_sequence_make_the_same_gradient() -> None:
    (alone,) = run(1, partial(_half), 1)
    first, second = run(2, _half, 2)
    together = [torch.cat([torch.tensor(first[0]), torch.tensor(second[0])])]
    weights = zip(first[1:], second[1:], strict=True)
    together += [torch.tensor(a) + torch.tensor(b) for a, b in weights]
    same(together, [torch.tensor(g) for g in alone])


def test_a_failure_on_one_rank_turns_it_off_on_all() -> None:
    for rank, (events, off, untouched) in enumerate(run(2, _failing)):
        assert off and untouched, rank
        assert events[0]["kind"] == "monitor_disabled"
    assert "no directions" in events[0]["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0), ("gamma", 1.5), ("beta", -1), ("share", 0), ("rank", 1), ("interval", 0)],
)
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"kss.{name}"):
        from_dict({"run_dir": "runs/x", "kss": {name: value}})


def test_more_modes_than_channels() -> None:
    shaping = Shaping(
        KssConfig(rank=WIDTH + 1), [1], StepState(), torch.device("cpu"), scale=lambda _: 1.0
    )
    with pytest.raises(ConfigError, match="2 to the hidden size 12"):
        shaping.attach(1, Layer(0), WIDTH)


def test_directions_are_orthonormal() -> None:
    along = directions(WIDTH, RANK, torch.Generator().manual_seed(0))
    assert torch.allclose(along.mT @ along, torch.eye(RANK), atol=1e-6)
