"""Conservation monitor on norms."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from mcore_monitors.hosts.observed_norm import norm_form, observe_norm
from mcore_monitors.hosts.taps import Tap
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import TOKENS

from .models import reduced, sample
from .watched import SCALE, SHIFT, CarelessRMSNorm, Residual, built, monitor, normal


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
def test_a_right_norm_keeps_its_identities_whatever_its_epsilon(make, scale: float) -> None:
    block, watched, _ = built(make(16, eps=1e-5))
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.copy_(normal(16, seed=5))
    for seed in range(2):
        (block(scale * normal(6, 2, 16, seed=seed)).square().sum()).backward()
    # without an input that wants a gradient there is none to look at
    assert sample([watched], 10) == {}
    for seed in range(2):
        x = (scale * normal(6, 2, 16, seed=seed)).requires_grad_()
        block(x).square().sum().backward()
    readings = sample([watched], 10)
    assert set(readings) == {SCALE, SHIFT} if make is nn.LayerNorm else {SCALE}
    for layers in readings.values():
        values = layers[2]
        assert [math.isnan(value) for value in values] == [True, False, True, True, True]
        assert values[1] < 2e-6


def test_a_norm_without_its_projection_is_seen() -> None:
    block, watched, _ = built(CarelessRMSNorm())
    block(normal(6, 2, 16).requires_grad_()).square().sum().backward()
    assert sample([watched], 10)[SCALE][2][1] > 0.1


@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_that_is_watched_computes_the_same(make) -> None:
    """Bit for bit, although the residual connection's gradient is added to the norm's."""
    plain = Residual(make(16, eps=1e-5))
    block, _, _ = built(make(16, eps=1e-5))
    block.load_state_dict(plain.state_dict())
    x = [normal(64, 2, 16).requires_grad_() for _ in range(2)]
    out = [module(each) for module, each in zip((plain, block), x, strict=True)]
    for each in out:
        each.square().sum().backward()
    assert torch.equal(out[0], out[1]) and torch.equal(x[0].grad, x[1].grad)
    weights = zip(plain.parameters(), block.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in weights)


@pytest.mark.parametrize("case", ["not sampled", "evaluation", "no gradient"])
def test_what_does_not_count_is_not_told(case: str) -> None:
    block, watched, state = built(nn.RMSNorm(16, eps=1e-5))
    state.armed = case != "not sampled"
    block.train(case != "evaluation")
    with torch.set_grad_enabled(case != "no gradient"):
        out = block(normal(6, 2, 16).requires_grad_())
    if case != "no gradient":
        out.sum().backward()
    assert sample([watched], 10) == {}


def test_a_recomputed_norm_counts_once() -> None:
    readings = []
    for reentrant in (None, True, False):
        block, watched, _ = built(nn.RMSNorm(16, eps=1e-5))
        x = normal(6, 2, 16).requires_grad_()
        if reentrant is None:
            out = block(x)
        else:
            out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        out.square().sum().backward()
        readings.append(watched.sums_of(SCALE, reduced([watched], 10)))
    torch.testing.assert_close(readings[0][1], readings[1][1])
    torch.testing.assert_close(readings[0][1], readings[2][1])


def test_the_input_may_go_into_a_norm_by_many_ways_and_elsewhere_too() -> None:
    """The parts of the norm's gradient are added up, and nothing else is: leaf or not."""

    class LongRMSNorm(nn.Module):
        eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            square = (x * x).mean(-1, keepdim=True)
            return (x.double() / (square + self.eps).sqrt().double()).float()

    for leaf in (True, False):
        block, watched, _ = built(LongRMSNorm())
        x = normal(6, 2, 16).requires_grad_()
        block(x if leaf else x * 1).square().sum().backward()
        assert sample([watched], 10)[SCALE][2][1] < 1e-6


def test_what_waits_of_a_norm_keeps_no_activation_alive() -> None:
    """Not even where all that is kept is a few tokens of it."""
    block, watched, state = built(nn.RMSNorm(16, eps=1e-5), whole=False)
    state.iteration = 30  # the norm is due
    seen = []
    block.norm.register_forward_hook(
        lambda _, x, y: seen.extend(weakref.ref(t.untyped_storage()) for t in (*x, y))
    )
    gc.disable()  # what only a cycle keeps would stay
    try:
        block(normal(4 * TOKENS, 1, 16).requires_grad_() * 1).square().sum().backward()
        assert len(seen) == 2 and all(ref() is None for ref in seen)
    finally:
        gc.enable()
    assert 0 < sample([watched], 30)[SCALE][2][1] < 1e-6


def test_a_check_looks_at_every_token() -> None:
    block, watched, _ = built(CarelessRMSNorm())
    x = normal(4 * TOKENS, 1, 16).requires_grad_()
    before = block.norm(x * 1)
    before.square().sum().backward()
    every = watched.sums_of(SCALE, reduced([watched], 10))
    dx = 2 * before.detach() * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-5)
    assert every[1, 1, 1].item() > (x.detach() * dx).abs().sum().item()


def test_a_norm_that_hands_the_residual_on_is_left_alone() -> None:
    class TwoRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    norm, watched = TwoRMSNorm(16, eps=1e-5), monitor()
    tap = Tap(StepState(iteration=10, armed=True))
    tap.listeners.append(partial(watched.on_norm, 2, 0))
    observe_norm(norm, tap)
    out, residual = norm(normal(3, 16).requires_grad_())
    (out.sum() + residual.sum()).backward()
    assert sample([watched], 10) == {}


def test_forms_that_are_known() -> None:
    assert norm_form(nn.LayerNorm(4, eps=1e-6)) == (1e-6, True)
    assert norm_form(CarelessRMSNorm()) == (1e-5, False)
    assert "does not say its epsilon" in norm_form(nn.RMSNorm(4))
    assert "no norm that is known" in norm_form(nn.Linear(4, 4))
