"""The residual stream of a Megatron model: its layers, and which tokens of it are on this rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from ...parallel import GroupReduce
from ...views import ModelView, ResidualStream


def find_layers(chunks: list[torch.nn.Module]) -> dict[int, torch.nn.Module]:
    """Global layer number to each transformer layer of this rank, virtual stages included.

    Layers of multi-token-prediction blocks are no part of the stream.
    """
    return {
        layer.layer_number: layer
        for chunk in chunks
        for block in chunk.modules()
        if isinstance(block, TransformerBlock)
        for layer in block.layers
        if hasattr(layer, "layer_number")
    }


def take_stream(
    view: ModelView, layers: dict[int, Any], config: Any, groups: Any, args: Any
) -> None:
    """Enter the stream, or say why its layers can't be seen.

    Args:
        layers: of :func:`find_layers`.
        groups: Megatron's process groups of this model.
        args: Megatron's arguments: sizes of batch and sequence.
    """
    reason = _hidden(config)
    if reason is not None:
        view.left_out.append(f"residual stream: {reason}")
        layers = {}
    pieces, of = _pieces(config, groups)
    everyone = groups.tp_dp_cp
    view.residual = ResidualStream(
        width=config.hidden_size,
        sequences=args.global_batch_size,
        micro_batch=args.micro_batch_size,
        replica=view.data,
        layers=tuple(sorted(layers)),
        pieces=pieces,
        pieces_of=of,
        length=args.seq_length,
        onto=GroupReduce(everyone if everyone.size() > 1 else None),
    )


def _hidden(config: Any) -> str | None:
    if getattr(config, "cuda_graph_impl", "none") != "none":
        return "CUDA graphs take the place of the layers' calls, and no hook runs in their replay"
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        return "with --overlap-moe-expert-parallel-comm layers are run in parts, without a hook"
    return None


def _pieces(config: Any, groups: Any) -> tuple[tuple[int, ...], int]:
    """Which pieces of each sequence pass through this rank, and how many there are.

    Context parallelism gives rank r of n the chunks r and 2n − 1 − r of 2n, so that causal work is
    even; sequence parallelism cuts what a context rank has into consecutive parts.
    """
    tp, cp = groups.tp, groups.cp
    chunks = [0] if cp.size() == 1 else [cp.rank(), 2 * cp.size() - 1 - cp.rank()]
    total = 1 if cp.size() == 1 else 2 * cp.size()
    if not config.sequence_parallel:
        # all tensor-parallel ranks hold the same tokens
        return (tuple(chunks) if tp.rank() == 0 else ()), total
    fine = [chunk * tp.size() + part for chunk in chunks for part in range(tp.size())]
    own = len(fine) // tp.size()
    return tuple(fine[tp.rank() * own : (tp.rank() + 1) * own]), total * tp.size()
