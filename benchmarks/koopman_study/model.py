"""A GPT-2 style transformer with six ways to normalise, small enough to train hundreds of times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .task import LENGTH, VOCABULARY

ARCHITECTURES = ("pre_ln", "post_ln", "rms_norm", "no_norm", "deep_norm", "sub_ln")
#: those whose residual stream is not normalised after a layer, but before the head
HAVE_FINAL_NORM = ("pre_ln", "rms_norm", "sub_ln")
#: Standard deviation of weights and embeddings, as in GPT-2.
STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model is made of; ``init_scale`` multiplies the initial standard deviation.

    ``final_norm``: whether the stream of the architectures that leave it bare (Pre-LN, RMSNorm,
    SubLN) is normalised before the head, as in GPT-2. It bounds the logits, whatever the layers do.
    """

    architecture: str
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    init_scale: float = 1.0
    final_norm: bool = True


class Attention(nn.Module):
    """Causal self-attention; with SubLN, a norm before the output projection."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.inner = _inner_norm(sizes, sizes.hidden)
        self.out = nn.Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.inner(mixed.transpose(1, 2).flatten(2)))


class Feedforward(nn.Module):
    """Two linear layers around a GELU, four times as wide; with SubLN, a norm between."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.hidden, 4 * sizes.hidden)
        self.inner = _inner_norm(sizes, 4 * sizes.hidden)
        self.out = nn.Linear(4 * sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(F.gelu(self.up(x), approximate="tanh")))


def _inner_norm(sizes: Sizes, width: int) -> nn.Module:
    return nn.LayerNorm(width) if sizes.architecture == "sub_ln" else nn.Identity()


class Block(nn.Module):
    """One transformer layer: h + branch(h) with the norm where the architecture has it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        make = {"rms_norm": nn.RMSNorm, "no_norm": lambda _: nn.Identity()}.get(
            sizes.architecture, nn.LayerNorm
        )
        self.norms = nn.ModuleList([make(sizes.hidden), make(sizes.hidden)])
        self.branches = nn.ModuleList([Attention(sizes), Feedforward(sizes)])
        self.after = sizes.architecture in ("post_ln", "deep_norm")
        #: DeepNorm (arXiv 2203.00555), decoder only: α = (2L)^¼ on the residual stream
        self.alpha = (2 * sizes.layers) ** 0.25 if sizes.architecture == "deep_norm" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = norm(self.alpha * x + branch(x)) if self.after else x + branch(norm(x))
        return x


class Model(nn.Module):
    """Tokens [B, T] to the logits of the last place [B, V]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, sizes.hidden)
        self.position = nn.Embedding(LENGTH, sizes.hidden)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        norm = nn.RMSNorm if sizes.architecture == "rms_norm" else nn.LayerNorm
        normed = sizes.final_norm and sizes.architecture in HAVE_FINAL_NORM
        self.final = norm(sizes.hidden) if normed else nn.Identity()
        self.head = nn.Linear(sizes.hidden, VOCABULARY, bias=False)
        self._initialise(sizes)

    def _initialise(self, sizes: Sizes) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=STD * sizes.init_scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        gain = {
            # DeepNorm: β = (8L)^(−¼) on values, output projection and feed-forward
            "deep_norm": (8 * sizes.layers) ** -0.25,
            # SubLN (Magneto, arXiv 2210.06423), decoder only: γ = √(ln 2L) on the same
            "sub_ln": math.sqrt(math.log(2 * sizes.layers)),
        }.get(sizes.architecture, 1.0)
        for block in self.blocks:
            attention, feedforward = block.branches
            values = attention.qkv.weight[2 * sizes.hidden :]
            for weight in (values, attention.out.weight, feedforward.up.weight,
                           feedforward.out.weight):  # fmt: skip
                weight.data.mul_(gain)

    def stream(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream [B, T, D] before each layer and after the last."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x[:, -1]))
