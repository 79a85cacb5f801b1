"""Attention and routers are found by what they hold, and the rest is named."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from mcore_monitors.hosts.huggingface.layers import number_layers
from mcore_monitors.hosts.huggingface.stub import norm_scale
from mcore_monitors.views import RoutingRule

from .models import EXPERTS, described, model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2", "qwen3", "olmo2"])
def test_separate_projections(kind: str) -> None:
    # transformers refuses sdpa where it would lose a soft cap
    found = described(model(kind, "eager" if kind == "gemma2" else "sdpa"))
    reasons = {
        "gemma2": ("key shift", "attention activity", "vocabulary shift"),
        "mistral": ("attention activity",),
    }
    assert [x.split(" of ")[0].split(": ")[0] for x in found.view.left_out] == list(reasons.get(kind, ()))
    attentions = [x for x in found.view.left_out if not x.startswith("vocabulary shift")]
    assert all("of model.layers.0.self_attn and 1 like it: " in x for x in attentions)
    assert found.view.activity.keys() == (set() if kind in reasons else {1, 2})
    assert (found.view.layers, found.view.heads, found.view.groups) == (2, 4, 2)
    for view in found.view.attention:
        assert (view.groups, view.heads_per_group, view.collective) == (2, 2, False)
        query, key = view.read()
        assert query.shape == (4, 8, 32) and key.shape == (2, 8, 32)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "olmo2"])
def test_norm_scales_are_folded_in(kind: str) -> None:
    built = model(kind)
    layer = built.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator))
    query, key = described(built).view.attention[1].read()
    shift = 1 if kind == "gemma3_text" else 0  # Gemma learns what it adds to one
    for rows, linear, norm in (
        (query, layer.q_proj, layer.q_norm),
        (key, layer.k_proj, layer.k_norm),
    ):
        scale = (norm.weight + shift).repeat(linear.out_features // norm.weight.numel())
        expected = (linear.weight * scale[:, None]).unflatten(0, (-1, 8))
        torch.testing.assert_close(rows, expected.detach(), rtol=1e-5, atol=1e-8)  # the ε


def test_fused_rows() -> None:
    built = model("phi3")
    query, key = described(built).view.attention[0].read()
    weight = built.model.layers[0].self_attn.qkv_proj.weight.detach()
    torch.testing.assert_close(query.flatten(0, 1), weight[:32], rtol=0, atol=0)
    torch.testing.assert_close(key.flatten(0, 1), weight[32:48], rtol=0, atol=0)


def test_gpt2_keeps_its_weight_the_other_way_round() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16)
    built = transformers.GPT2LMHeadModel(config)
    query, key = described(built).view.attention[0].read()
    weight = built.transformer.h[0].attn.c_attn.weight.detach()
    torch.testing.assert_close(query.flatten(0, 1), weight[:, :32].T, rtol=0, atol=0)
    torch.testing.assert_close(key.flatten(0, 1), weight[:, 32:64].T, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt_neox", "GPTNeoXAttention has neither q_proj and k_proj nor one of"),
        ("deepseek_v3", "DeepseekV3Attention is latent attention"),
    ],
)
def test_an_unknown_attention_is_named_once(kind: str, reason: str) -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "first_k_dense_replace": 2}
    latent |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    found = described(model(kind, **latent if kind == "deepseek_v3" else {}))
    (sentence,) = found.view.left_out
    assert reason in sentence and "and 1 like it" in sentence
    assert found.view.attention == [] and found.attentions == {}


GROUPED = RoutingRule(score="sigmoid", top_k=2, groups=4, top_groups=2, group_sum=2)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("mixtral", RoutingRule(top_k=2)),
        ("qwen3_moe", RoutingRule(top_k=2)),
        ("glm4_moe", GROUPED),
    ],
)
def test_a_router_and_its_rule(kind: str, rule: RoutingRule) -> None:
    grouped = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
    before = torch.get_rng_state()
    built = model(kind, **EXPERTS, **grouped if kind == "glm4_moe" else {})
    after = torch.get_rng_state()
    found = described(built)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)
    assert found.view.experts == 8
    for view in found.view.routers:
        assert view.rule == rule
        module = found.routers[view.layer]
        assert view.read().data_ptr() == module.weight.data_ptr()
        assert (view.bias is not None) == (kind == "glm4_moe")
        holds = view.layer in found.view.conserved["router/shift"].places
        assert holds == (rule.score == "softmax")


def test_a_router_that_hides_its_logits_is_named() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight.T).softmax(-1)

    block = nn.Module()
    block.gate, block.experts = Hiding(), nn.ModuleList()
    (sentence,) = described(nn.Sequential(block)).view.left_out
    assert "Hiding: none of its outputs are the logits" in sentence


@pytest.mark.parametrize("norm", [nn.RMSNorm(6, eps=1e-8), nn.LayerNorm(6, eps=1e-8)])
def test_scale_of_any_norm(norm: nn.Module) -> None:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    torch.testing.assert_close(norm_scale(norm, lambda p: p.detach()), norm.weight.detach())
    assert norm_scale(nn.RMSNorm(6, elementwise_affine=False), lambda p: p) is None


def test_numbers_of_layers() -> None:
    def paths(*numbers: int, end: str) -> list[str]:
        return [f"model.layers.{n}.{end}" for n in numbers]

    numbers, layers = number_layers(paths(0, 1, 2, end="attn"), paths(1, 2, end="mlp.gate"))
    assert numbers["model.layers.1.attn"] == numbers["model.layers.1.mlp.gate"] == 2
    assert layers == 3
    # an encoder and a decoder, each counting from 0
    numbers, layers = number_layers(["encoder.0.attn", "decoder.0.attn"], ["decoder.0.gate"])
    assert numbers == {"encoder.0.attn": 1, "decoder.0.attn": 2, "decoder.0.gate": 2}
    assert layers == 2
    assert number_layers([], ["a.gate", "b.gate"]) == ({"a.gate": 1, "b.gate": 2}, 2)
