"""Build small GPT models from layer specs, in this one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

LAYERS, HEADS, GROUPS, EXPERTS, SEQUENCE, BATCH, WORDS = 2, 4, 2, 4, 8, 2, 32


def config(experts: bool = False, **more: Any) -> TransformerConfig:
    """Settings of a model of two layers; ``more`` wins."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "ffn_hidden_size": 32,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
    }
    if experts:
        settings |= {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_token_dispatcher_type": "alltoall",
            "moe_aux_loss_coeff": 0.01,
            "moe_router_load_balancing_type": "aux_loss",
        }
    return TransformerConfig(**settings | more)


def gpt(spec: Any, settings: TransformerConfig) -> GPTModel:
    """The same weights for the same settings, whatever the spec's classes are called."""
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=WORDS,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )


def losses(model: GPTModel, batch: int = BATCH, seed: int = 2) -> torch.Tensor:
    """Forward: the loss of every token, [batch, SEQUENCE]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (batch, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(batch, -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])


def modules(model: GPTModel, kind: type) -> list[torch.nn.Module]:
    """The modules of a class, in the order of layers."""
    return [module for module in model.modules() if isinstance(module, kind)]
