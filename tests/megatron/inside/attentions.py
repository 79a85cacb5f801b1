"""Attention layers of every layout, and what they do to a hidden state, written down densely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.hosts.safe_attention import safe_attention

from .build import gpt

HEADS, HIDDEN, HEAD = 4, 24, 6
NOPE, ROPE = 6, 4


class Scale(torch.nn.Module):
    """A norm without its data-dependent part: only the learned scale of each channel."""

    def __init__(self, hidden_size: int, config: Any, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self._config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = 1.0 if self._config.layernorm_zero_centered_gamma else 0.0
        return x * (self.weight + added)


class WideKeys(torch.nn.Module):
    """A core attention that takes keys and values of unlike width, as latent attention needs."""

    def __init__(self, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        return safe_attention(query, key, value, scale=scale, causal=True).flatten(2)


@dataclass
class Layout:
    """One kind of attention.

    Attributes:
        settings: of the transformer, beyond the common ones.
        norm: put in the place of the norms of queries and keys, or of the latents.
        zero_centred: the norms train what they add to one.
        fused_down: one down-projection for queries and keys (latent attention).
    """

    settings: dict[str, Any] = field(default_factory=dict)
    norm: type | None = None
    zero_centred: bool = False
    fused_down: bool = False

    @property
    def latent(self) -> bool:
        return "kv_lora_rank" in self.settings


_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 12, "v_head_dim": 6}
LAYOUTS = {
    "MHA": Layout({"num_query_groups": 4}),
    "GQA": Layout({"num_query_groups": 2}),
    "MQA": Layout({"num_query_groups": 1}),
    "QKV bias": Layout({"num_query_groups": 2, "add_qkv_bias": True}),
    "output gate": Layout({"num_query_groups": 2, "attention_output_gate": True}),
    "output gate, MQA": Layout({"num_query_groups": 1, "attention_output_gate": True}),
    "QK-norm": Layout({"num_query_groups": 2, "qk_layernorm": True}, norm=Scale),
    "QK-norm, zero-centred": Layout(
        {"num_query_groups": 1, "qk_layernorm": True}, norm=Scale, zero_centred=True
    ),
    "latent": Layout(_LATENT),
    "latent, normed": Layout(_LATENT | {"qk_layernorm": True}, norm=Scale),
    "latent, no query latent": Layout(_LATENT | {"q_lora_rank": None}),
    "latent, fused down": Layout(_LATENT, fused_down=True),
}


def build(layout: Layout, dtype: torch.dtype) -> torch.nn.Module:
    """A GPT of one layer with this attention, observed."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    common = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": HIDDEN,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "params_dtype": dtype,
        "tensor_model_parallel_size": tensor_parallel,
    }
    normed = layout.settings.get("qk_layernorm", False)
    spec = get_gpt_layer_local_spec(qk_layernorm=normed, multi_latent_attention=layout.latent)
    attention, parts = spec.submodules.self_attention, spec.submodules.self_attention.submodules
    if layout.norm is not None:
        parts.q_layernorm = layout.norm
        setattr(parts, "kv_layernorm" if layout.latent else "k_layernorm", layout.norm)
    if layout.latent:
        parts.core_attention = WideKeys
        if layout.fused_down:
            attention.module = FusedMLASelfAttention
            parts.linear_qkv_down_proj = parts.linear_kv_down_proj
        settings = MLATransformerConfig(
            **common | layout.settings,
            qk_head_dim=NOPE,
            qk_pos_emb_head_dim=ROPE,
            multi_latent_attention=True,
            rope_type="rope",
        )
    else:
        settings = TransformerConfig(**common | layout.settings, kv_channels=HEAD)
    model = gpt(register(spec), settings)
    # not earlier: Megatron's plain norms, elsewhere in the model, refuse it
    model.config.layernorm_zero_centered_gamma = layout.zero_centred
    return model


def start(tensor_parallel: int) -> None:
    """(Re)start Megatron's process groups; all other ranks are data replicas."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    model_parallel_cuda_manual_seed(1)


@torch.no_grad()
def move(attention: torch.nn.Module, size: float, seed: int) -> None:
    """Change every parameter as an optimizer would: alike where ranks hold the same one."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for number, (_, parameter) in enumerate(sorted(attention.named_parameters())):
        sharded = getattr(parameter, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(1000 * seed + 10 * number + sharded * (rank + 1))
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += (size * noise).to(parameter.dtype)


@torch.no_grad()
def dense(attention: torch.nn.Module) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What the layer itself makes of unit vectors: (W_q [d, D], W_k [d, D]) of each of all heads.

    The forward of the real multi-rank layer is asked, not its weights: one token a sequence, each
    at position 0 where a rotary embedding turns by nothing. Biases are taken off again. A latent
    attention gives two pairs, without position and rotary.
    """
    latent = hasattr(attention, "linear_kv_up_proj")
    dtype = attention.config.params_dtype
    gate = {"output_gate": True} if attention.config.attention_output_gate else {}
    # [S = 1, B = 1 + D, D]: zero, then the unit vectors
    inputs = torch.cat([torch.zeros(1, HIDDEN), torch.eye(HIDDEN)]).to(dtype).unsqueeze(0)
    query, key, *_ = attention.get_query_key_value_tensors(inputs, **gate)
    rank = parallel_state.get_tensor_model_parallel_rank()
    heads, groups = query.shape[2], key.shape[2]
    mine = {}
    for head in range(heads):
        q, k = (
            (x[0, 1:, i] - x[0, :1, i]).T
            for x, i in ((query, head), (key, head // (heads // groups)))
        )
        cuts = [slice(0, NOPE), slice(NOPE, None)] if latent else [slice(None)]
        mine[rank * heads + head] = [(q[c].double(), k[c].double()) for c in cuts]
    everyone: list[Any] = [None] * parallel_state.get_tensor_model_parallel_world_size()
    dist.all_gather_object(everyone, mine, group=parallel_state.get_tensor_model_parallel_group())
    return {head: pairs for part in everyone for head, pairs in part.items()}


def effective_rank(matrix: torch.Tensor) -> float:
    """Of a dense matrix [D, D], by its singular values in float64."""
    p = torch.linalg.svdvals(matrix).square()
    p = p / p.sum()
    return torch.special.entr(p).sum().exp().item()


def dense_delta2(
    old: list[tuple[torch.Tensor, torch.Tensor]], new: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """Δ2 [D, D] of each part of a head."""
    return [
        (q_new - q).T @ k + q.T @ (k_new - k)
        for (q, k), (q_new, k_new) in zip(old, new, strict=True)
    ]


