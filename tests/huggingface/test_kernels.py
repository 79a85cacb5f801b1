"""What crosses the border of a Hugging Face attention, and kernels that take its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcore_monitors.errors import HostError
from mcore_monitors.hosts.huggingface.kernels import (
    faulty_kernel,
    safe_kernel,
    why_not_faulty,
    why_not_safe,
)
from mcore_monitors.monitors.base import StepState

from .models import EXPERTS, attention_calls, described, model, router_logits, tokens

MASK = torch.ones(2, 16, dtype=torch.long)
MASK[1, 12:] = 0


class Plain(nn.Module):
    """Attention that calls PyTorch's kernel itself; may repeat its keys for that."""

    head_dim = 8

    def __init__(self, repeats: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.repeats = repeats
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(32, rows, bias=False) for rows in (32, 16, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.repeats:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=not self.repeats
        )
        return out.transpose(1, 2).flatten(2)


def gradients(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step."""
    module.zero_grad()
    value = loss()
    value.backward()
    return float(value.detach()), [p.grad.clone() for p in module.parameters()]


def same(a: tuple[float, list[Tensor]], b: tuple[float, list[Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["kept", "reentrant", "recomputed"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_micro_batch_is_told_once_and_nothing_changes(
    implementation: str, checkpointing: dict[str, Any] | None
) -> None:
    built = model("qwen3_moe", implementation, **EXPERTS)
    if checkpointing is not None:
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)

    def loss() -> Tensor:
        return built(tokens(), labels=tokens()).loss

    without = gradients(built, loss)
    found = described(built)
    calls, logits = attention_calls(found), router_logits(found)
    seen: list[tuple[int, str]] = []
    for module in found.attentions.values():
        module.mcore_monitors_tap.listeners.append(
            lambda call: [
                getattr(call, name).register_hook(lambda g, n=name: seen.append((g.dim(), n)))
                for name in ("query", "key", "value", "output")
            ]
            and None
        )
    assert same(gradients(built, loss), without)
    assert sorted(layer for layer, _ in calls) == [1, 2]
    assert sorted(layer for layer, _, _ in logits) == [1, 2]
    for _, call in calls:
        assert (call.heads, call.groups, call.layout) == (4, 2, "bhsd")
        assert call.arranged(call.query, 4).shape == (16, 2, 4, 8)
        assert call.arranged(call.output, 4).shape == (16, 2, 4, 8)
        assert call.arranged(call.key, 2).shape == (16, 2, 2, 8)
    assert sorted(n for _, n in seen) == sorted(["query", "key", "value", "output"] * 2)
    assert all(chosen is None and z.shape == (32, 8) for _, z, chosen in logits)


def test_neither_evaluation_nor_other_steps_are_told() -> None:
    built = model("llama")
    state = StepState(iteration=1, armed=False)
    found = described(built, state)
    calls = attention_calls(found)
    built(tokens(), labels=tokens()).loss.backward()
    state.armed = True
    built.eval()
    built(tokens())
    assert calls == []
    built.train()
    built(tokens())
    assert len(calls) == 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_safe_kernel_computes_the_same(
    implementation: str, mask: Tensor | None, window: int | None
) -> None:
    settings = {"sliding_window": window} if window else {}
    built = model("mistral", implementation, **settings)

    def loss() -> Tensor:
        labels = tokens() if mask is None else tokens().masked_fill(mask == 0, -100)
        return built(tokens(), attention_mask=mask, labels=labels).loss

    own = gradients(built, loss)
    found = described(built)
    for kernel in (safe_kernel, faulty_kernel(0.0)):
        for module in found.attentions.values():
            assert why_not_safe(module) is None and why_not_faulty(module) is None
            module.mcore_monitors_tap.safe = kernel
        value, grads = gradients(built, loss)
        assert value == pytest.approx(own[0], rel=1e-6)
        for grad, expected in zip(grads, own[1], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)


def test_a_drill_begins_at_its_step_and_biases_the_gradient() -> None:
    built = model("llama")
    state = StepState(iteration=4, armed=True)
    found = described(built, state)

    def loss() -> Tensor:
        return built(tokens(), labels=tokens()).loss

    healthy = gradients(built, loss)
    for module in found.attentions.values():
        module.mcore_monitors_tap.faulty = faulty_kernel(0.5)
        module.mcore_monitors_tap.faulty_from = 5
    assert same(gradients(built, loss), healthy)
    state.iteration = 5
    value, grads = gradients(built, loss)
    assert value == pytest.approx(healthy[0], rel=1e-6)  # the output is right
    names = [n for n, _ in built.named_parameters()]
    place = names.index("model.layers.1.self_attn.q_proj.weight")
    assert (grads[place] - healthy[1][place]).norm() > 0.01 * healthy[1][place].norm()


def test_a_module_that_calls_the_kernel_itself() -> None:
    plain = Plain()
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return plain(x).square().sum()

    own = gradients(plain, loss)
    state = StepState(iteration=1, armed=True)
    found = described(plain, state)
    assert same(gradients(plain, loss), own)  # a tap without a listener
    calls = attention_calls(found)
    assert same(gradients(plain, loss), own)
    ((layer, call),) = calls
    assert (layer, call.heads, call.groups) == (1, 4, 2)
    state.armed = False
    plain.mcore_monitors_tap.safe = safe_kernel
    value, grads = gradients(plain, loss)
    assert len(calls) == 1 and value == pytest.approx(own[0], rel=1e-6)
    for grad, expected in zip(grads, own[1], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError):  # a failing forward leaves no mode behind
        plain(torch.randn(2, 16, 5))
    assert not torch.overrides._get_current_function_mode_stack()


def test_repeated_keys_are_not_taken_for_keys(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Plain(repeats=True)
    calls = attention_calls(described(plain))
    plain(torch.randn(2, 16, 32)).sum().backward()
    plain(torch.randn(2, 16, 32)).sum().backward()
    assert calls == []
    assert capsys.readouterr().err.count("repeats the keys of 2 groups for 4 heads") == 1


def test_what_no_other_kernel_can_follow_is_refused() -> None:
    built = model("gpt_oss", "eager", **EXPERTS)
    found = described(built)
    attention = found.attentions[1]
    assert "learned sinks" in why_not_safe(attention)
    assert 1 not in found.view.conserved["attention/key_shift"].places
    assert 1 in found.view.conserved["attention/value_output"].places
    attention.mcore_monitors_tap.safe = safe_kernel
    with pytest.raises(HostError, match="s_aux"):
        built(tokens())
    dropping = described(model("llama", attention_dropout=0.1)).attentions[1]
    assert why_not_safe(dropping) is None
    assert "attention_dropout" in why_not_faulty(dropping)


def test_a_compiled_module_is_left_out() -> None:
    plain = Plain()
    plain.compile(backend="eager")
    found = described(plain)
    assert found.attentions == {} and len(found.view.attention) == 1
    assert "compiled" in found.view.left_out[0]
