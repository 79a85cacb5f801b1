"""Query and key rows of Megatron's fused QKV weight: MHA, GQA, MQA, with or without output gate.

Per query group the rows of ``linear_qkv.weight`` are
``[queries of the group | (their output gates) | key | value]``; tensor parallelism cuts the rows
into equal pieces. With at least as many groups as tensor-parallel ranks each rank holds whole
groups. With fewer, a piece holds part of a group, and Megatron gathers the activations: each rank
then works on ``heads / ranks`` of its group's heads. The view gathers the weights in the same way,
and shows the heads that this rank works on, so that each head is there once; the group's key is
seen by each of the ranks that share it.
"""

from __future__ import annotations

from typing import Any

import torch

from ...parallel import GroupSum
from ...views import AttentionView, Replica
from .main_weights import MainWeights


def split_qkv(
    weight: torch.Tensor, groups: int, heads_per_group: int, head_dim: int, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the query and key rows out of Megatron's fused QKV weight.

    Args:
        weight: [G * (q + k + v rows), D], whole groups.
        groups: query groups ``G`` in it.
        heads_per_group: query heads of one group.
        head_dim: rows of one head ``d``.
        gated: an attention output gate stands behind the queries.

    Returns:
        ``(W_q [G * heads_per_group, d, D], W_k [G, d, D])``, views on ``weight``.
    """
    per_group = weight.view(groups, -1, head_dim, weight.shape[-1])  # [G, slots, d, D]
    key = per_group.select(1, heads_per_group * (2 if gated else 1))
    if heads_per_group == 1:
        return per_group.select(1, 0), key
    return per_group.narrow(1, 0, heads_per_group).flatten(0, 1), key


def learned_scale(config: Any, weight: torch.Tensor) -> torch.Tensor:
    """A norm's learned scale per channel, fp32; Megatron may train what it adds to one."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight + 1 if config.layernorm_zero_centered_gamma else weight


def gathered_rows(piece: torch.Tensor, rank: int, size: int, total: GroupSum) -> torch.Tensor:
    """Rows that are cut over tensor-parallel ranks, [rows * size, D]; all call it together."""
    whole = piece.new_zeros(size, *piece.shape)
    whole[rank] = piece
    return total(whole).flatten(0, 1)


def fused_view(
    attention: Any, layer: int, replica: Replica, main: MainWeights
) -> AttentionView | str:
    """A view on a self-attention with a fused QKV weight, or the reason why there is none."""
    fused, config = attention.linear_qkv, attention.config
    tp = attention.pg_collection.tp
    rank, size = tp.rank(), tp.size()
    head_dim, all_groups = attention.hidden_size_per_attention_head, config.num_query_groups
    heads_per_group = config.num_attention_heads // all_groups
    gated = bool(getattr(config, "attention_output_gate", False))
    scales = [getattr(n, "weight", None) for n in (attention.q_layernorm, attention.k_layernorm)]
    if any(s is not None and s.numel() != head_dim for s in scales):
        return "its QK-norm has not one scale per head channel"
    parameters = [fused.weight, *(s for s in scales if s is not None)]
    split = all_groups < size  # a rank's rows are part of a group
    ranks_per_group = size // all_groups if split else 1
    groups = 1 if split else all_groups // size
    total = GroupSum(tp)

    def scaled(rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return rows if scale is None else rows * learned_scale(config, scale)[:, None]

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        weight, *rest = main(parameters)
        if split:
            weight = gathered_rows(weight, rank, size, total)
            group = rank // ranks_per_group
            weight = weight.unflatten(0, (all_groups, -1))[group]
        query, key = split_qkv(weight, groups, heads_per_group, head_dim, gated)
        if split:
            mine = heads_per_group // ranks_per_group
            query = query[rank % ranks_per_group * mine :][:mine]
        if not rest:
            return query, key
        found = iter(rest)
        q_scale, k_scale = (None if s is None else next(found) for s in scales)
        return scaled(query, q_scale), scaled(key, k_scale)

    heads = config.num_attention_heads // size
    return AttentionView(
        layer=layer,
        first_group=rank // ranks_per_group if split else rank * groups,
        groups=groups,
        heads_per_group=heads // groups,
        first_head=rank * heads,
        read=read,
        collective=split or main.gathers(parameters),
        replica=replica,
    )
