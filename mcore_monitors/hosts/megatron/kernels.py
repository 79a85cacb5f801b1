"""Attention kernels that can stand in for the host's: the safe path and a drill's faulty one.

Both take what Megatron gives a core attention, query [S, B, H, d], key and value [S, B, G, d],
and return the context [S, B, H·d].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType

from ...errors import HostError
from ..safe_attention import safe_attention


def _scale(module: Any, query: torch.Tensor) -> float:
    scale = getattr(module, "softmax_scale", None) or query.shape[-1] ** -0.5
    if module.config.apply_query_key_layer_scaling:
        # Megatron divides the scale by the layer's number and multiplies again before the softmax
        scale *= module.layer_number
    return scale


def _causal(module: Any, attn_mask_type: AttnMaskType | None) -> bool:
    kind = attn_mask_type if attn_mask_type is not None else module.attn_mask_type
    return kind in (AttnMaskType.causal, AttnMaskType.padding_causal)


def why_not_safe(config: Any) -> str | None:
    """Why the safe path can't replace a model's attention, or None where it can."""
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        return f"softmax_type {config.softmax_type!r}"
    if config.context_parallel_size > 1:
        return f"context parallelism ({config.context_parallel_size})"
    if getattr(config, "window_size", None) is not None:
        return f"sliding-window attention (window_size {config.window_size})"
    if config.attention_dropout > 0:
        return f"attention dropout ({config.attention_dropout})"
    return None


def safe_kernel(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    attn_mask_type: AttnMaskType | None = None,
    attention_bias: torch.Tensor | None = None,
    packed_seq_params: Any = None,
    **_: Any,
) -> torch.Tensor:
    """The remedy for attention numerics: plain attention in fp32, for any core attention."""
    if packed_seq_params is not None or attention_bias is not None:
        raise HostError("the safe attention path takes neither packed sequences nor a bias.")
    out = safe_attention(
        query,
        key,
        value,
        scale=_scale(module, query),
        causal=_causal(module, attn_mask_type),
        mask=attention_mask,
    )
    return out.flatten(2)


def faulty_kernel(strength: float) -> Callable[..., torch.Tensor]:
    """A drill's kernel with a biased row term; imported only when a drill is configured."""
    from ...faults.attention import attention_row_term

    def kernel(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> torch.Tensor:
        out = attention_row_term(
            query,
            key,
            value,
            scale=_scale(module, query),
            strength=strength,
            causal=_causal(module, attn_mask_type),
            mask=attention_mask,
        )
        return out.flatten(2)

    return kernel
