"""Views of Megatron's weights: who holds which heads and how the fused QKV rows are laid out."""

from __future__ import annotations

from typing import Any

import torch

from ...views import AttentionView, Replica, RouterView


def main_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 main weight where the optimizer keeps one of the same shape, else the parameter.

    The distributed optimizer keeps flat shards of the main weights that are not aligned to heads;
    there the model's own weight is read.
    """
    main = getattr(parameter, "main_param", None)
    if main is not None and main.shape == parameter.shape:
        return main.detach()
    return parameter.detach()


def split_qkv(
    weight: torch.Tensor, groups: int, heads_per_group: int, head_dim: int, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the query and key rows out of Megatron's fused QKV weight.

    Per query group the rows are [queries of the group | (their output gates) | key | value].

    Args:
        weight: [G * (q + k + v rows), D], local to a tensor-parallel rank, which holds whole groups.
        groups: local query groups ``G``.
        heads_per_group: query heads of one group.
        head_dim: rows of one head ``d``.
        gated: an attention output gate stands behind the queries.

    Returns:
        ``(W_q [G * heads_per_group, d, D], W_k [G, d, D])``, views on ``weight``.
    """
    per_group = weight.unflatten(0, (groups, -1, head_dim))  # [G, slots, d, D]
    queries = per_group[:, :heads_per_group].flatten(0, 1)
    key = per_group[:, heads_per_group * (2 if gated else 1)]
    return queries, key


def attention_view(attention: Any, layer: int, replica: Replica) -> AttentionView | str:
    """A view on a Megatron self-attention, or the reason why there is none."""
    name = type(attention).__name__
    fused = getattr(attention, "linear_qkv", None)
    if fused is None or getattr(fused, "weight", None) is None:
        return f"{name} has no fused QKV weight (linear_qkv)"
    config = attention.config
    tp_rank, tp_size = attention.pg_collection.tp.rank(), attention.pg_collection.tp.size()
    if config.num_query_groups < tp_size:
        return (
            f"there are more tensor-parallel ranks ({tp_size}) than query groups "
            f"({config.num_query_groups})"
        )
    groups = config.num_query_groups // tp_size
    heads_per_group = config.num_attention_heads // config.num_query_groups
    gated = bool(getattr(config, "attention_output_gate", False))

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        weight = main_weight(fused.weight)
        return split_qkv(weight, groups, heads_per_group, config.kv_channels, gated)

    return AttentionView(
        layer=layer,
        first_group=tp_rank * groups,
        groups=groups,
        heads_per_group=heads_per_group,
        read=read,
        replica=replica,
    )


def router_view(router: Any, layer: int, replica: Replica) -> RouterView:
    """A view on a Megatron router's weight [E, D]."""
    return RouterView(layer=layer, read=lambda: main_weight(router.weight), replica=replica)
