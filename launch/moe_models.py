"""Two small mixture-of-experts language models to train with DeepSpeed; both return a loss.

``--model hf``: a Hugging Face model built from a configuration (Qwen3's mixture of experts), as
most people train them. ``--model deepspeed``: a decoder of a few lines with DeepSpeed's own ``MoE``
layer, whose experts are spread over ranks (expert parallelism).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
WIDTH, LAYERS, HEADS, GROUPS = 128, 4, 4, 2
EXPERTS, CHOSEN, EXPERT_WIDTH = 8, 2, 256
#: weight of the loss that keeps the experts' load even
BALANCE = 0.01


class HuggingFaceModel(nn.Module):
    """A Hugging Face mixture of experts, with the loss taken out of its output."""

    def __init__(self, length: int) -> None:
        super().__init__()
        import transformers

        config = transformers.Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            head_dim=WIDTH // HEADS,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            moe_intermediate_size=EXPERT_WIDTH,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=BALANCE,
            max_position_embeddings=length,
            use_cache=False,
        )
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa"
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss in nats of tokens [B, S + 1]."""
        labels = tokens[:, 1:].contiguous()
        return self.model(tokens[:, :-1], labels=labels, shift_labels=labels).loss


class DeepSpeedModel(nn.Module):
    """A decoder with DeepSpeed's own ``MoE`` layer.

    Args:
        length: tokens of a sequence.
        expert_parallel: ranks that share the experts of a layer.
    """

    def __init__(self, length: int, expert_parallel: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer(expert_parallel) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss in nats of tokens [B, S + 1]."""
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        x = self.embedding(tokens[:, :-1]) + self.position(place)
        balance = x.new_zeros(())
        for layer in self.layers:
            x, uneven = layer(x)
            balance = balance + uneven
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss + BALANCE * balance / len(self.layers)


class Layer(nn.Module):
    """Attention and a mixture of experts, each behind a norm."""

    def __init__(self, expert_parallel: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.attention_norm, self.moe_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.moe = MoE(
            WIDTH,
            Expert(),
            num_experts=EXPERTS,
            ep_size=expert_parallel,
            k=CHOSEN,
            capacity_factor=1.5,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, S, D] and how uneven the experts' load is."""
        x = x + self.attention(self.attention_norm(x))
        out, uneven, _ = self.moe(self.moe_norm(x))
        return x + out, uneven


class Attention(nn.Module):
    """Causal attention with grouped queries, through PyTorch's own kernel."""

    num_heads, num_key_value_heads, head_dim = HEADS, GROUPS, WIDTH // HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, GROUPS * self.head_dim, bias=False)
        self.v_proj = nn.Linear(WIDTH, GROUPS * self.head_dim, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [B, S, D]."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERT_WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, EXPERT_WIDTH, bias=False)
        self.down = nn.Linear(EXPERT_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
