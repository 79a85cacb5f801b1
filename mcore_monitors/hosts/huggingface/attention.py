"""Attention found by its structure: which modules have query and key projections, how many heads.

What counts is what a module holds, not what its class is called: linear layers ``q_proj`` and
``k_proj`` (Llama, Qwen, Mixtral, Gemma, OLMo and most others), or one fused layer ``qkv_proj``,
``Wqkv`` or ``c_attn`` whose rows are [queries | keys | values].

Shape names: ``H`` query heads, ``G`` query groups, ``d`` head dimension, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: shape of a parameter as it is when no shard of it is elsewhere
ShapeOf = Callable[[nn.Parameter], torch.Size]

#: fused projections whose outputs are [queries | keys | values]
_FUSED = ("qkv_proj", "Wqkv", "c_attn")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_GROUPS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
_NORMS = {"q": ("q_norm", "q_layernorm", "query_norm"), "k": ("k_norm", "k_layernorm", "key_norm")}


@dataclass(frozen=True, kw_only=True)
class FoundAttention:
    """An attention module and where its query and key weights are."""

    path: str
    module: nn.Module
    heads: int
    groups: int
    head_dim: int
    #: the query and the key projection; one and the same where they are fused
    query: nn.Parameter
    key: nn.Parameter
    #: fused rows are [queries | keys | values]; ``transposed``: the weight is [D, rows]
    fused: bool = False
    transposed: bool = False
    #: norms of queries and keys whose learned scale is folded into the weights
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    def split(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Whole weights in, (W_q [H, d, D], W_k [G, d, D]) out; views."""
        if self.transposed:
            query, key = query.T, key.T
        if self.fused:
            rows = self.heads * self.head_dim
            query, key = query[:rows], key[rows : rows + self.groups * self.head_dim]
        d = self.head_dim
        return query.unflatten(0, (self.heads, d)), key.unflatten(0, (self.groups, d))


def find_attention(
    model: nn.Module, shape_of: ShapeOf
) -> tuple[list[FoundAttention], dict[str, list[str]]]:
    """All attention modules of a model, in its order.

    Returns:
        what can be read, and the rest: reason (one sentence) to the paths of what can't.
    """
    found, unknown = [], {}
    for path, module in model.named_modules():
        projections = _projections(module)
        if projections is None:
            reason = _unknown(module)
        else:
            reason = found_or_reason = _measure(path, module, *projections, shape_of)
            if isinstance(found_or_reason, FoundAttention):
                found.append(found_or_reason)
                continue
        if reason is not None:
            unknown.setdefault(reason, []).append(path)
    return found, unknown


def _projections(module: nn.Module) -> tuple[nn.Module, nn.Module, bool] | None:
    """(query layer, key layer, fused), or None where the module is no attention that we know."""
    children = dict(module.named_children())
    if "q_proj" in children and "k_proj" in children:
        return children["q_proj"], children["k_proj"], False
    for name in _FUSED:
        if name in children:
            return children[name], children[name], True
    return None


def _unknown(module: nn.Module) -> str | None:
    """A sentence on an attention that we can't read, or None where it is none."""
    name = type(module).__name__
    children = dict(module.named_children())
    if "kv_a_proj_with_mqa" in children or "kv_b_proj" in children:
        return f"{name} is latent attention, whose query and key weights are products"
    if isinstance(module, nn.MultiheadAttention) or (
        name.endswith("Attention") and any(isinstance(c, nn.Linear) for c in children.values())
    ):
        return f"{name} has neither q_proj and k_proj nor one of {', '.join(_FUSED)}"
    return None


def _measure(
    path: str,
    module: nn.Module,
    query: nn.Module,
    key: nn.Module,
    fused: bool,
    shape_of: ShapeOf,
) -> FoundAttention | str:
    name = type(module).__name__
    for layer in (query, key):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or len(shape_of(weight)) != 2:
            return f"{name} has a {type(layer).__name__} for a projection, without a weight matrix"
        if getattr(layer, "tp_world_size", 1) > 1:
            return f"{name} is split over tensor-parallel ranks"
    # GPT-2's Conv1D keeps [D, rows]
    transposed = type(query).__name__ == "Conv1D"
    rows = shape_of(query.weight)[1 if transposed else 0]
    hidden = shape_of(query.weight)[0 if transposed else 1]
    heads = _setting(module, _HEADS)
    head_dim = _setting(module, ("head_dim", "head_size"))
    if head_dim is None and heads is not None:
        head_dim = (hidden if fused else rows) // heads
    if head_dim is None:
        return f"{name} says neither head_dim nor {_HEADS[0]}"
    if fused:
        groups = _setting(module, _GROUPS) or heads
        if heads is None or rows != (heads + 2 * groups) * head_dim:
            return f"{name} has {rows} fused rows, not those of queries, keys and values"
    else:
        key_rows = shape_of(key.weight)[0]
        if heads is not None and rows != heads * head_dim:
            return f"{name} has {rows} query rows, not {heads} heads of {head_dim}"
        if rows % head_dim or key_rows % head_dim or rows % key_rows:
            return f"{name} has {rows} query and {key_rows} key rows, no whole heads of {head_dim}"
        heads, groups = rows // head_dim, key_rows // head_dim
    return FoundAttention(
        path=path,
        module=module,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        query=query.weight,
        key=key.weight,
        fused=fused,
        transposed=transposed,
        query_norm=_child(module, _NORMS["q"]),
        key_norm=_child(module, _NORMS["k"]),
    )


def _setting(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """A whole number that the module, or its configuration, holds under one of some names."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((c for n, c in module.named_children() if n in names), None)
