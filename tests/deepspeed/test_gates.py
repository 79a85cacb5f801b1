"""DeepSpeed's gate on its dense and sparse path, with jitter and noise, and its other router."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from mcore_monitors.hosts.deepspeed import gates
from mcore_monitors.signals.router import choose
from tests.huggingface.models import described, router_logits

TOKENS, EXPERTS, WIDTH = 24, 4, 8


def gate(**settings: object) -> TopKGate:
    torch.manual_seed(0)
    settings = {"min_capacity": 0, "drop_tokens": False} | settings
    return TopKGate(WIDTH, EXPERTS, **settings).train()


def chosen(output: tuple, sparse: bool) -> Tensor:
    """Map [T, E] of where the gate sends its tokens."""
    if not sparse:
        return output[2].any(dim=2)
    found = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    for experts in output[3].long():
        for token, expert in enumerate(experts.tolist()):
            if expert >= 0:
                found[token, expert] = True
    return found


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"k": 1},
        {"k": 1, "noisy_gate_policy": "RSample"},
        {"k": 1, "noisy_gate_policy": "Jitter"},
        {"k": 2, "top2_2nd_expert_sampling": False},
        {"k": 2, "top2_2nd_expert_sampling": True},
        {"k": 3},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_gate_hands_over_scores_and_choice(settings: dict, sparse: bool) -> None:
    layer = gate(**settings)
    block = nn.Module()
    block.gate, block.experts = layer, nn.ModuleList()
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    own = layer(x, sparse_routes=sparse)
    found = described(nn.Sequential(block))
    heard = router_logits(found)
    torch.manual_seed(7)
    output = layer(x, sparse_routes=sparse)
    for a, b in zip(own, output, strict=True):  # the training goes on as without us
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    ((_, logits, choice),) = heard
    clean = x @ layer.wg.weight.T
    jitter = settings.get("noisy_gate_policy") == "Jitter"
    assert torch.allclose(logits, clean, atol=1e-6) != jitter
    torch.testing.assert_close(logits, clean, rtol=0.1, atol=0.05)
    (view,) = found.view.routers
    assert view.rule.top_k == settings["k"]
    noisy = "RSample" in settings.values() or settings.get("top2_2nd_expert_sampling")
    assert view.rule.chooses_by == ("host" if noisy else "scores")
    assert logits.requires_grad != bool(noisy)
    assert bool(found.view.conserved["router/shift"].places) != bool(noisy)
    if noisy:
        assert torch.equal(choice, chosen(output, sparse))
    else:
        best = logits.topk(settings["k"], dim=1).indices.sort().values
        assert torch.equal(chosen(output, sparse).nonzero()[:, 1].view(TOKENS, -1), best)


def test_noise_is_seen_in_the_choice_before_capacity() -> None:
    layer = gate(k=2, drop_tokens=True, capacity_factor=0.5)
    heard = router_logits(described(layer))
    layer(torch.randn(TOKENS, WIDTH))
    ((_, _, choice),) = heard
    assert choice.sum(1).tolist() == [2] * TOKENS


def test_padding_and_evaluation() -> None:
    layer = gate(k=1)
    found = described(layer)
    told: list[Tensor | None] = []
    layer.mcore_monitors_tap.listeners.append(lambda logits, padding: told.append(padding))
    used = torch.arange(TOKENS) < 20
    layer(torch.randn(TOKENS, WIDTH), used.long())
    layer(torch.randn(TOKENS, WIDTH))
    layer.eval()
    layer(torch.randn(TOKENS, WIDTH))
    with torch.no_grad():
        layer.train()(torch.randn(TOKENS, WIDTH))
    assert found.routers == {1: layer}
    assert len(told) == 2 and torch.equal(told[0], ~used) and told[1] is None


def test_without_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpatched gate has no tap to call: its gating function is watched instead."""
    monkeypatch.delattr(TopKGate, "mcore_monitors_tap", raising=False)
    forward = TopKGate.forward
    for name in ("top1gating", "top2gating", "topkgating"):
        monkeypatch.setattr(sharded_moe, name, getattr(sharded_moe, name))
    gates._watch_gating.cache_clear()

    def unpatched(self: TopKGate, *args: object, **kwargs: object) -> object:
        tap = self.__dict__.pop("mcore_monitors_tap", None)
        self.__dict__["mcore_monitors_tap"] = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.__dict__["mcore_monitors_tap"] = tap

    monkeypatch.setattr(TopKGate, "forward", unpatched)
    layer, other = gate(k=2, top2_2nd_expert_sampling=False), gate(k=3)
    heard = router_logits(described(nn.Sequential(layer)))
    x = torch.randn(TOKENS, WIDTH)
    other(x)
    layer(x)
    ((_, logits, _),) = heard
    assert torch.allclose(logits, x @ layer.wg.weight.T, atol=1e-6)
    gates._watch_gating.cache_clear()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_token_choice_router(score: str) -> None:
    torch.manual_seed(0)
    router = TokenChoiceTopKRouter(WIDTH, 8, 4, 2, 2, score, True, 1.0, False)
    block = nn.Module()
    block.router, block.experts = router, nn.ModuleList()
    block.expert_bias = torch.linspace(0, 0.1, 8)
    found = described(nn.Sequential(block).train())
    heard = router_logits(found)
    (view,) = found.view.routers
    rule = view.rule
    assert (rule.score, rule.top_k, rule.groups, rule.top_groups) == (score, 2, 4, 2)
    assert torch.equal(view.bias(), block.expert_bias)
    x = torch.randn(TOKENS, WIDTH)
    _, experts, _ = router(x, block.expert_bias)
    ((_, logits, _),) = heard
    torch.testing.assert_close(logits, x @ router.gate.weight.T)
    p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expected = choose(
        p + view.bias(), 2, groups=rule.groups, top_groups=2, group_sum=rule.group_sum
    )[1][:, :2]
    assert torch.equal(expected.sort().values, experts.sort().values)
