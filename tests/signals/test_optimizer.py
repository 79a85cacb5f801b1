"""Optimizer signals against torch's own AdamW, step by step, and against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mcore_monitors.signals import optimizer as signals
from mcore_monitors.signals.optimizer import SPIKE, AdamStep, StepSums, step_readings

BETAS, EPS = (0.9, 0.95), 1e-8


def step_sums(*what: Any) -> torch.Tensor:
    """Sums of one tensor: weight, gradient, m, v, step."""
    sums = StepSums(torch.device("cpu"))
    sums.add(0, *what)
    return sums.result(1)[0]


class Trained:
    """A weight under AdamW; remembers what the last step changed."""

    def __init__(self, size: int = 300, lr: float = 1e-2, decay: float = 0.1, **more: Any) -> None:
        self.lr, self.decay = lr, decay
        self.weight = torch.nn.Parameter(
            0.02 * torch.randn(size, generator=torch.Generator().manual_seed(1))
        )
        self.betas = more.get("betas", BETAS)
        self.adam = torch.optim.AdamW(
            [self.weight], lr=lr, betas=self.betas, eps=EPS, weight_decay=decay
        )
        self.steps = 0
        self.before = self.v_before = self.gradient = torch.zeros(size)

    def step(self, gradient: torch.Tensor) -> None:
        self.before = self.weight.detach().clone()
        state = self.adam.state.get(self.weight) or {}
        self.v_before = state.get("exp_avg_sq", torch.zeros_like(self.before)).clone()
        self.weight.grad = self.gradient = gradient
        self.adam.step()
        self.steps += 1

    @property
    def sums(self) -> torch.Tensor:
        state = self.adam.state[self.weight]
        made = AdamStep(
            lr=self.lr, beta1=self.betas[0], beta2=self.betas[1], eps=EPS,
            weight_decay=self.decay, step=self.steps,
        )  # fmt: skip
        return step_sums(
            self.weight.detach(), self.gradient, state["exp_avg"], state["exp_avg_sq"], made
        )


def noise(seed: int, size: int = 300, scale: float = 1e-3) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("decay", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_update_is_what_adamw_changed(steps: int, decay: float) -> None:
    run = Trained(decay=decay)
    for i in range(steps):
        run.step(noise(i))
    ratio, update, _ = step_readings(run.sums)
    changed = run.weight.detach() - run.before
    assert ratio.item() == pytest.approx(rms(changed) / rms(run.weight.detach()), rel=1e-4)
    # without decay the change is lr times the update that AdamW made
    alone = (changed.double() + run.lr * decay * run.before.double()) / run.lr
    assert update.item() == pytest.approx(rms(alone), rel=1e-4)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_spikes_are_those_against_the_moment_before(beta2: float) -> None:
    run = Trained(betas=(0.9, beta2))
    for i in range(30):
        run.step(noise(i))
    gradient = noise(99)
    gradient[:40] *= torch.linspace(20, 400, 40)  # on both sides of √5000 = 71 times
    run.step(gradient)
    corrected = run.v_before / (1 - beta2**30)
    expected = (gradient.square() > SPIKE * corrected).sum().item()
    assert 5 < expected < 40
    assert run.sums[4].item() == expected
    assert run.sums[5].item() == 300
    assert step_readings(run.sums)[2].item() == pytest.approx(expected / 300)


def test_no_spike_in_the_first_step() -> None:
    run = Trained()
    run.step(noise(1))
    assert run.sums[4:].tolist() == [0, 0]
    assert math.isnan(step_readings(run.sums)[2].item())


def test_weights_without_gradients_are_no_spikes() -> None:
    run = Trained(betas=(0.9, 0.999))
    for i in range(3):
        run.step(noise(i) * (torch.arange(300) < 150))
    assert step_readings(run.sums)[2].item() == 0


@pytest.mark.parametrize(("snr", "expected"), [(0.0, 0.2294), (1.0, 0.7255), (100.0, 0.9953)])
def test_update_rms_has_its_closed_form(snr: float, expected: float) -> None:
    """√((SNR + (1 − β1)/(1 + β1)) / (SNR + 1)), with v slow enough."""
    assert expected == pytest.approx(math.sqrt((snr + 0.1 / 1.9) / (snr + 1)), abs=1e-4)
    run = Trained(size=20_000, decay=0.0, betas=(0.9, 0.9999))
    generator = torch.Generator().manual_seed(3)
    for _ in range(120):
        run.step(1e-3 * (math.sqrt(snr) + torch.randn(20_000, generator=generator)))
    assert step_readings(run.sums)[1].item() == pytest.approx(expected, rel=0.02)


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained()
    for i in range(3):
        run.step(noise(i))
    whole = run.sums
    monkeypatch.setattr(signals, "_SMALL", 0)
    torch.testing.assert_close(run.sums, whole, rtol=1e-5, atol=1e-12)
    monkeypatch.setattr(signals, "_PIECE_ON_CPU", 7)
    torch.testing.assert_close(run.sums, whole, rtol=1e-5, atol=1e-12)


def test_tensors_of_unlike_steps_and_rows_at_once() -> None:
    """Small ones that are joined, large ones, without a gradient, of another step, of two rows."""
    generator = torch.Generator().manual_seed(5)
    made = AdamStep(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=5)
    tensors = []
    for size in (3, 8, 20_000, 1, 5):
        w, g, m = (torch.randn(size, generator=generator) for _ in range(3))
        v = torch.rand(size, generator=generator) * 1e-4
        tensors.append([w, g, m, v, made])
    tensors[1][1] = None
    tensors[3][4] = replace(made, step=1)
    tensors[4][4] = replace(made, lr=2e-2, weight_decay=0.0)
    rows = [0, 0, 0, 2, 2]
    sums = StepSums(torch.device("cpu"))
    for _ in range(2):  # the second time without anything of the first
        for row, tensor in zip(rows, tensors, strict=True):
            sums.add(row, *tensor)
        got = sums.result(3)
    apart = [step_sums(*tensor) for tensor in tensors]
    torch.testing.assert_close(got[0], apart[0] + apart[1] + apart[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2], apart[3] + apart[4], rtol=1e-6, atol=0)
    assert got[1].tolist() == [0] * 6
    assert got[0, 3:].tolist() == [20_011, apart[0][4] + apart[2][4], 20_003]
    assert got[0, 4] > 0
    assert not sums.result(3).any()


def test_an_empty_piece_and_a_lost_gradient() -> None:
    made = AdamStep(lr=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=5)
    empty = torch.zeros(0)
    assert step_sums(empty, empty, empty, empty, made).tolist() == [0] * 6
    ones = torch.ones(4)
    sums = step_sums(ones, None, ones, ones, made)
    assert sums[3:].tolist() == [4, 0, 0]
    assert math.isnan(step_readings(sums)[2].item())
