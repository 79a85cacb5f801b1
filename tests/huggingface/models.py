"""Tiny models of the families that people train, and what a monitor would hear of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mcore_monitors.calls import AttentionCall
from mcore_monitors.hosts.deepspeed.describe import ModuleDescription, describe
from mcore_monitors.monitors.base import StepState
from mcore_monitors.views import Replica

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def model(kind: str, implementation: str = "sdpa", **settings: Any) -> nn.Module:
    """A model of a family, in training, with weights from seed 0."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | settings)
    built = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    return built.train()


def described(module: nn.Module, state: StepState | None = None) -> ModuleDescription:
    """A module in one process, its step sampled."""
    return describe(
        module,
        device=torch.device("cpu"),
        zero_stage=0,
        replica=Replica(),
        data=Replica(),
        state=state or StepState(iteration=1, armed=True),
    )


def attention_calls(found: ModuleDescription) -> list[tuple[int, AttentionCall]]:
    """A list that fills with (layer, call) as the module runs."""
    calls: list[tuple[int, AttentionCall]] = []
    for layer, module in found.attentions.items():
        module.mcore_monitors_tap.listeners.append(
            lambda call, layer=layer: calls.append((layer, call))
        )
    return calls


def router_logits(found: ModuleDescription) -> list[tuple[int, Tensor, Tensor | None]]:
    """A list that fills with (layer, logits, choice or None) as the module runs."""
    heard: list[tuple[int, Tensor, Tensor | None]] = []
    for layer, module in found.routers.items():
        module.mcore_monitors_tap.listeners.append(
            lambda logits, padding, routing_map=None, layer=layer: heard.append(
                (layer, logits, routing_map)
            )
        )
    return heard


def tokens(batch: int = 2, length: int = 16) -> Tensor:
    """Made-up tokens."""
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))
