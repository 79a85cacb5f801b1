"""Which conservation identities a Megatron model keeps, where its norms and output layers are.

What does not hold, or can't be seen, is said once at the start (``ModelView.left_out``) and is not
watched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import unwrap_model

from ...catalogue.conservation import NORMS
from ...views import Conserved, ModelView
from ..observed_norm import norm_form

_NO_FLOOR = "8-bit attention has no known round-off floor"
_ROUTER_FORMATS = {"fp32": torch.float32, "fp64": torch.float64}


def head_dim(config: Any) -> int:
    """Channels of the query and key that enter QKᵀ."""
    if getattr(config, "multi_latent_attention", False):
        return config.qk_head_dim + config.qk_pos_emb_head_dim
    return config.kv_channels


def add_identities(view: ModelView, config: Any, vocabulary: int) -> None:
    """Lay out the residuals of norms, routers and the output, the same on every rank.

    Args:
        vocabulary: entries of the output layer, padding included.
    """
    view.conserved["router/shift"].dtype = _ROUTER_FORMATS.get(
        config.moe_router_dtype, config.params_dtype
    )
    # the fewest channels of all norms: the floor is theirs
    channels = min(config.hidden_size, head_dim(config) if config.qk_layernorm else math.inf)
    norms = {"units": len(NORMS), "dtype": config.params_dtype, "channels": channels}
    view.conserved["norm/scale"] = Conserved(**norms)
    if config.normalization == "LayerNorm":
        view.conserved["norm/shift"] = Conserved(**norms)
    view.conserved["output/vocabulary_shift"] = Conserved(
        units=1, dtype=config.params_dtype, channels=vocabulary
    )


def take_attention(view: ModelView, attention: Any) -> None:
    """Enter the identities that a Megatron attention keeps."""
    config, layer = attention.config, attention.layer_number
    but: tuple[str, ...] = ()
    if config.fp8_dot_product_attention or config.fp8_multi_head_attention:
        view.left_out.append(f"residuals of the attention of layer {layer}: {_NO_FLOOR}")
        return
    softmax = getattr(config, "softmax_type", "vanilla")
    if softmax != "vanilla":
        view.left_out.append(
            f"key shift of layer {layer}: softmax_type {softmax!r} adds a term that no key moves"
        )
        but = ("attention/key_shift",)
    groups, tp = config.num_query_groups, attention.pg_collection.tp
    if getattr(config, "multi_latent_attention", False):
        if groups != config.num_attention_heads:
            view.left_out.append(
                f"residuals of the attention of layer {layer}: latent attention has a key for each "
                f"head, but num_query_groups is {groups}"
            )
            return
    local = max(1, groups // tp.size())
    view.conserves_attention(layer, tp.rank() * groups // tp.size(), local, but=but)


def take_router(view: ModelView, router: Any) -> None:
    """Enter the router shift where it holds."""
    reason = _breaks_router_shift(router.config)
    if reason is None:
        view.conserved["router/shift"].places[router.layer_number] = (0, 1)
    else:
        view.left_out.append(f"router shift: {reason}")


def _breaks_router_shift(config: Any) -> str | None:
    balancing = config.moe_router_load_balancing_type
    kinds = balancing if isinstance(balancing, list | tuple) else [balancing]
    if config.moe_router_score_function != "softmax":
        return f"{config.moe_router_score_function} scores are moved by a common shift"
    if config.moe_z_loss_coeff is not None:
        return "the z-loss is moved by a common shift"
    if "sinkhorn" in kinds:
        return "sinkhorn routing is no softmax of the logits"
    return None


def find_norms(chunks: list[Any], view: ModelView) -> dict[tuple[int, int], torch.nn.Module]:
    """(layer, place in NORMS) to each norm of this rank whose identity is known.

    Enters them into ``view``; the final norm of a block counts to the model's last layer.
    """
    found = {}
    for chunk in chunks:
        for block in chunk.modules():
            if not isinstance(block, TransformerBlock):
                continue
            for layer in block.layers:
                for unit, norm in enumerate(_norms_of(layer)):
                    found[getattr(layer, "layer_number", 0), unit] = norm
            found[view.layers, NORMS.index("final")] = getattr(block, "final_layernorm", None)
    return {
        place: norm
        for place, norm in found.items()
        if norm is not None and _holds(view, place, norm)
    }


def _norms_of(layer: Any) -> list[Any]:
    attention = getattr(layer, "self_attention", None)
    mlp = getattr(layer, "mlp", None)
    # Transformer Engine's specs fuse a norm into the linear layer behind it
    fused = (getattr(attention, "linear_qkv", None), getattr(mlp, "linear_fc1", None))
    norms = [
        getattr(layer, "input_layernorm", None),
        getattr(layer, "pre_mlp_layernorm", None),
        getattr(attention, "q_layernorm", None),
        getattr(attention, "k_layernorm", None),
    ]
    for i, linear in enumerate(fused):
        if isinstance(norms[i], IdentityOp) and hasattr(linear, "layer_norm_weight"):
            norms[i] = linear
    return norms


def _holds(view: ModelView, place: tuple[int, int], norm: Any) -> bool:
    layer, unit = place
    if isinstance(norm, IdentityOp):
        return False
    if hasattr(norm, "layer_norm_weight"):
        reason = f"{type(norm).__name__} doesn't show what the norm inside it gives out"
    elif isinstance(form := norm_form(norm), str):
        reason = form
    else:
        for signal in ("norm/scale", "norm/shift") if form[1] else ("norm/scale",):
            if signal in view.conserved:
                view.conserved[signal].places[layer] = (0, len(NORMS))
        return True
    view.left_out.append(f"{NORMS[unit]} norms: {reason}")
    return False


def find_outputs(chunks: list[Any], view: ModelView) -> dict[int, torch.nn.Module]:
    """The output layers of this rank that show their logits, under the model's last layer."""
    for chunk in chunks:
        model = unwrap_model(chunk)
        layer = getattr(model, "output_layer", None)
        if layer is None or not getattr(model, "post_process", True):
            continue
        if not isinstance(layer, ColumnParallelLinear) and not hasattr(layer, "weight"):
            view.left_out.append(f"vocabulary shift: {type(layer).__name__} does not give logits")
            continue
        view.conserved["output/vocabulary_shift"].places[view.layers] = (0, 1)
        return {view.layers: layer}
    return {}


def vocabulary_group(chunks: list[Any], groups: Any) -> Any:
    """The process group over which logits are spread, or None. The same answer on every rank.

    An output layer that gathers its shards shows whole logits, and needs no sum over ranks.
    """
    whole = not getattr(unwrap_model(chunks[0]), "parallel_output", True)
    return None if whole or groups.tp.size() == 1 else groups.tp


