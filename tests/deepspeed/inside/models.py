"""Tiny mixture-of-experts language models whose initial weights don't depend on the layout."""

from __future__ import annotations

import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

WIDTH, EXPERTS, VOCABULARY, LENGTH, LAYERS = 16, 4, 32, 8, 2


class Attention(nn.Module):
    """Grouped-query attention that calls PyTorch's kernel itself."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 4 * self.head_dim, bias=False)
        self.k_proj = nn.Linear(WIDTH, 2 * self.head_dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, 2 * self.head_dim, bias=False)
        self.o_proj = nn.Linear(4 * self.head_dim, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and DeepSpeed's own mixture of experts."""

    def __init__(self, ep_size: int, moe: bool) -> None:
        super().__init__()
        self.attention = Attention()
        expert = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.mlp = (
            MoE(
                WIDTH,
                expert,
                num_experts=EXPERTS,
                ep_size=ep_size,
                k=2,
                min_capacity=0,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )
            if moe
            else expert
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out = self.mlp(x)
        return x + (out[0] if isinstance(out, tuple) else out)


class DeepSpeedModel(nn.Module):
    """A language model of :class:`Block`."""

    def __init__(self, ep_size: int, moe: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(ep_size, moe) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def huggingface_model(implementation: str = "sdpa", head_dim: int = 4) -> nn.Module:
    """Qwen3's mixture of experts: grouped queries, QK-norm, transformers' attention interface."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=VOCABULARY,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=LENGTH,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss of a model, or of an engine around one."""
    if isinstance(getattr(model, "module", model), DeepSpeedModel):
        return model(tokens)
    return model(tokens, labels=tokens).loss


def initialise(model: nn.Module, ep_rank: int, ep_size: int) -> None:
    """The same weights in every layout: each expert is drawn from a seed of its own."""
    local = EXPERTS // ep_size
    for number, (name, parameter) in enumerate(model.named_parameters()):
        seed = number
        if "deepspeed_experts." in name:
            before, after = name.split("deepspeed_experts.")
            expert, rest = after.split(".", 1)
            expert = ep_rank * local + int(expert)
            seed = sum(f"{before}{expert}.{rest}".encode()) * 1009 + 100_000 * expert
        else:
            seed = sum(i * c for i, c in enumerate(name.encode(), start=1))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "norm" in name:  # scales unlike one another
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


def batch(step: int, size: int) -> Tensor:
    """Tokens [size, LENGTH] of a step, the same in every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
