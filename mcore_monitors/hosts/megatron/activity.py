"""Which Megatron attentions' logits can be made again from their query and key."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType

from ...views import ActivityView


def activity_view(attention: Any) -> ActivityView | str:
    """How the logits of a Megatron self-attention are made, or why they can't be made again."""
    reason = _why_not(attention)
    if reason is not None:
        return reason
    config, tp, core = attention.config, attention.pg_collection.tp, attention.core_attention
    channels = getattr(attention, "q_head_dim", None) or attention.hidden_size_per_attention_head
    scale = getattr(core, "softmax_scale", None) or getattr(attention, "softmax_scale", None)
    scale = scale or channels**-0.5
    if config.apply_query_key_layer_scaling and getattr(core, "softmax_scale", None):
        # Megatron divides the scale by the layer's number and multiplies again before the softmax
        scale *= attention.layer_number
    heads = config.num_attention_heads // tp.size()
    return ActivityView(first_head=tp.rank() * heads, heads=heads, scale=scale)


def _why_not(attention: Any) -> str | None:
    config = attention.config
    if config.context_parallel_size > 1:
        return "with context parallelism no rank has all keys of a sequence"
    if getattr(config, "window_size", None) is not None:
        return "a sliding window bars keys that it would count"
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        return f"softmax_type {config.softmax_type!r} adds a term to the softmax"
    if attention.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        return f"its mask is {attention.attn_mask_type.name}, and only the causal one is known"
    return None
