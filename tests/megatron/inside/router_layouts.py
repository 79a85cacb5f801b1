"""Router signals of one model under one layout: built, trained for two steps, read back.

Every layout gets the same weights, made up by name and sliced, and the same sixteen sequences a
step. A step is Megatron's own schedule with four micro-batches, forward and backward.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe.router import Router

from mcore_monitors.config import MonitorsConfig, from_dict
from mcore_monitors.hosts.attach import Progress, attach
from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.hosts.megatron.setup import _tap
from mcore_monitors.sinks.history import HistoryReader

EXPERTS, HIDDEN, SEQUENCE, WORDS = 8, 32, 8, 64
SEQUENCES, MICRO_BATCHES, STEPS = 16, 4, 2

Signals = dict[str, dict[int, list[float]]]


def run(layout: dict[str, int], variants: dict[str, dict[str, Any]]) -> dict[str, Signals]:
    """The sample of each variant under a layout; empty but on rank 0.

    Args:
        layout: sizes for ``parallel_state.initialize_model_parallel``.
        variants: name to settings of ``TransformerConfig``; besides ``padding`` (of sequences) and
            ``attention`` (False: layers without), which are this file's own.
    """
    parallel_state.initialize_model_parallel(**layout)
    result = {name: _sample(layout, dict(settings)) for name, settings in variants.items()}
    parallel_state.destroy_model_parallel()
    return result


def _sample(layout: dict[str, int], settings: dict[str, Any]) -> Signals:
    padding, attention = settings.pop("padding", False), settings.pop("attention", True)
    model = _model(_config(layout, settings), attention)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    config = from_dict(
        {
            "run_dir": str(Path(folder[0]) / "run"),
            "interval": STEPS,
            "monitors": {f.name: {"enabled": f.name == "router"} for f in fields(MonitorsConfig)},
            "console": False,
            "wandb": {"enabled": False},
        }
    )
    described = MegatronModel([model])
    progress = Progress(iteration=0, attempt=0, reports_loss=False)
    runtime = attach(
        config, described.view, described.context, progress, host="megatron-core", versions={}
    )
    _tap(runtime, described)
    for step in range(1, STEPS + 1):
        _train(model, step, padding)
        runtime.on_step(
            step, loss=None, grad_norm=None, learning_rate=None, consumed_samples=SEQUENCES * step
        )
    runtime.close()
    if dist.get_rank() != 0:
        return {}
    (sample,) = HistoryReader(Path(folder[0]) / "run").read()
    return sample.signals


def _config(layout: dict[str, int], settings: dict[str, Any]) -> TransformerConfig:
    sizes = {k: v for k, v in layout.items() if k != "context_parallel_size"}
    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 32,
            "use_cpu_initialization": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "add_bias_linear": False,
            "gradient_accumulation_fusion": False,
            "pipeline_dtype": torch.float32,
            "sequence_parallel": layout.get("tensor_model_parallel_size", 1) > 1,
            "context_parallel_size": layout.get("context_parallel_size", 1),
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 32,
            "moe_token_dispatcher_type": "alltoall",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_load_balancing_type": "none",
            **sizes,
            **settings,
        }
    )


def _model(config: TransformerConfig, attention: bool) -> GPTModel:
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS)
    if not attention:
        spec.submodules.self_attention = IdentityOp
        spec.submodules.self_attn_bda = IdentityFuncOp
        spec.submodules.input_layernorm = IdentityOp
    model_parallel_cuda_manual_seed(1)
    model = GPTModel(
        config=config,
        transformer_layer_spec=register(spec),
        vocab_size=WORDS,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope" if attention else "none",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(model, name, parameter)
        for router in (m for m in model.modules() if isinstance(m, Router)):
            if router.expert_bias is not None:
                router.expert_bias.copy_(0.2 * _normal(f"bias {router.layer_number}", (EXPERTS,)))
    model.train()
    return model


def _fill(model: GPTModel, name: str, parameter: torch.nn.Parameter) -> None:
    """This rank's slice of the weight that goes by a name in the whole model."""
    words = name.split(".")
    is_expert = "local_experts" in words
    if "layers" in words:
        place = words.index("layers") + 1
        words[place] = str(model.decoder.layers[int(words[place])].layer_number)
    if is_expert:
        place = words.index("local_experts") + 1
        rank, size = (
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        words[place] = str(int(words[place]) + rank * EXPERTS // size)
    shape = list(parameter.shape)
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    cut = getattr(parameter, "partition_dim", -1)
    cut = cut if getattr(parameter, "tensor_model_parallel", False) or is_expert else -1
    if cut >= 0:
        shape[cut] *= group.size()
    whole = _normal(".".join(words), tuple(shape))
    if "layernorm" in name:
        whole = 1 + 0.1 * whole
    elif "embedding" not in name:
        whole = 0.3 * whole
    parameter.copy_(whole if cut < 0 else whole.chunk(group.size(), dim=cut)[group.rank()])


def _normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))


def _train(model: GPTModel, step: int, padding: bool) -> None:
    """Forward and backward of this rank's share of a step's sequences."""
    data_rank, data_size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, (SEQUENCES, SEQUENCE + 1), generator=generator)
    lengths = torch.randint(2, SEQUENCE + 1, (SEQUENCES, 1), generator=generator)
    padded = torch.arange(SEQUENCE) >= lengths if padding else None
    mine = slice(
        data_rank * SEQUENCES // data_size, (data_rank + 1) * SEQUENCES // data_size
    )
    part = SEQUENCE // parallel_state.get_context_parallel_world_size()
    first = parallel_state.get_context_parallel_rank() * part
    here = slice(first, first + part)
    batches = zip(
        tokens[mine, :-1][:, here].chunk(MICRO_BATCHES),
        tokens[mine, 1:][:, here].chunk(MICRO_BATCHES),
        [None] * MICRO_BATCHES if padded is None else padded[mine][:, here].chunk(MICRO_BATCHES),
        strict=True,
    )

    def forward_step(batches: Any, model: GPTModel) -> Any:
        inputs, labels, mask = next(batches)
        positions = torch.arange(part).expand(len(inputs), -1)
        losses = model(inputs, positions, None, labels=labels, padding_mask=mask)
        return losses, partial(_mean)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=SEQUENCES // data_size // MICRO_BATCHES,
        forward_only=False,
    )


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    return losses.mean(), {}
