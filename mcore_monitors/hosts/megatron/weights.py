"""Views of Megatron's weights, whatever kind of attention a layer has."""

from __future__ import annotations

from typing import Any

from ...views import AttentionView, Replica
from .main_weights import MainWeights
from .weights_fused import fused_view
from .weights_latent import latent_views


def attention_views(
    attention: Any, layer: int, replica: Replica, main: MainWeights
) -> list[AttentionView] | str:
    """Views on a Megatron self-attention: one, or one for each part; or why there is none."""
    if hasattr(attention, "linear_kv_up_proj"):
        return latent_views(attention, layer, replica, main)
    fused = getattr(attention, "linear_qkv", None)
    if fused is None or getattr(fused, "weight", None) is None:
        return f"{type(attention).__name__} has no fused QKV weight (linear_qkv)"
    view = fused_view(attention, layer, replica, main)
    return view if isinstance(view, str) else [view]
