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
WIDTH, LAYERS, HEADS = 128, 4, 4
#: groups of keys that the Hugging Face model's queries share
GROUPS = 2
EXPERTS, CHOSEN, EXPERT_WIDTH = 8, 2, 256
#: weight of the loss that keeps the experts' load even
BALANCE = 0.01
#: standard deviation of the weights at the start
DEVIATION = 0.02
NORM_EPSILON = 1e-5


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
    """A decoder with DeepSpeed's own ``MoE`` layer: the Megatron demo's, as far as the hosts allow.

    The same sizes, rotary positions, norms, dropless top-2 routing, weight of the balance loss in
    every layer, and initialisation: what writes to the residual stream begins smaller by
    √(2 × layers), so that the stream grows with depth as little as it does there.

    Args:
        length: tokens of a sequence.
        expert_parallel: ranks that share the experts of a layer.
    """

    def __init__(self, length: int, expert_parallel: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(expert_parallel) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for cosine_or_sine, values in zip(("cosine", "sine"), rotary(length), strict=True):
            self.register_buffer(cosine_or_sine, values, persistent=False)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith((".o_proj", ".down"))
                nn.init.normal_(module.weight, std=DEVIATION / (2 * LAYERS) ** (0.5 * writes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss in nats of tokens [B, S + 1].

        Its value is that of the text alone, its gradient has that of the balance loss in it.
        """
        x = self.embedding(tokens[:, :-1])
        places = self.cosine[: x.shape[1]], self.sine[: x.shape[1]]
        balance = x.new_zeros(())
        for layer in self.layers:
            x, uneven = layer(x, places)
            balance = balance + BALANCE * uneven
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss + (balance - balance.detach())


def rotary(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head size] of rotary positions, base 10,000."""
    size = WIDTH // HEADS
    speed = 10_000.0 ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(length).float(), speed).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [B, heads, S, head size] by the angles of its positions."""
    cosine, sine = places
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


class Layer(nn.Module):
    """Attention and a mixture of experts, each behind a norm."""

    def __init__(self, expert_parallel: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.attention_norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.moe_norm = nn.RMSNorm(WIDTH, eps=NORM_EPSILON)
        self.attention = Attention()
        self.moe = MoE(
            WIDTH,
            Expert(),
            num_experts=EXPERTS,
            ep_size=expert_parallel,
            k=CHOSEN,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the output [B, S, D] and how uneven the experts' load is."""
        x = x + self.attention(self.attention_norm(x), places)
        out, uneven, _ = self.moe(self.moe_norm(x))
        return x + out, uneven


class Attention(nn.Module):
    """Causal attention with rotary positions, through PyTorch's own kernel."""

    num_heads, head_dim = HEADS, WIDTH // HEADS
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """Return the output [B, S, D]."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, places), rotate(key, places)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
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
