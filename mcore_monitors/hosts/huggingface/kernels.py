"""Kernels to stand in for a Hugging Face model's attention: the safe one and a drill's faulty one.

Both take what transformers gives an attention function, query [B, H, S, d], key and value
[B, G, T, d] and its mask, and return [B, S, H, d]. Masks come in three kinds: boolean [B, 1, S, T],
True = may attend (sdpa); additive [B, 1, S, T], 0 or a very negative number (eager); boolean or
0/1 [B, T], True = a real token (flash).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import HostError
from ..safe_attention import safe_attention
from ..taps import AttentionKernel

#: additive masks below this bar a key
_BARRED = -1e4


def why_not_safe(module: nn.Module) -> str | None:
    """Why another kernel can't replace this attention's, or None where it can."""
    name = type(module).__name__
    if isinstance(getattr(module, "sinks", None), Tensor):
        return f"the learned sinks of {name}"
    if _softcap(module) is not None:
        return f"the soft cap on the logits of {name}"
    if getattr(getattr(module, "config", None), "alibi", False):
        return f"the position bias of {name}"
    return None


def breaks_key_shift(module: nn.Module) -> str | None:
    """Why Σ_j dK_j = 0 does not hold for this attention, or None where it does.

    Value–output and query–key hold all the same: they don't ask how scores become probabilities.
    """
    if isinstance(getattr(module, "sinks", None), Tensor):
        return "its learned sinks take a share of each softmax that no key moves"
    if _softcap(module) is not None:
        return "the soft cap on its logits scales each gradient differently"
    return None


def logit_scale(module: nn.Module, head_dim: int) -> float:
    """Factor on the product of query and key."""
    scale = getattr(module, "scaling", None)
    return float(scale) if isinstance(scale, float | int) else head_dim**-0.5


def hides_logits(module: nn.Module) -> str | None:
    """Why query and key do not tell which logits a query sees, or None where they do."""
    if getattr(module, "is_causal", None) is not True:
        return "it does not say that it is causal (is_causal)"
    for owner in (module, getattr(module, "config", None)):
        if getattr(owner, "sliding_window", None) is not None:
            return "its queries see a sliding window of keys"
    return None


def why_not_faulty(module: nn.Module) -> str | None:
    """Why a drill's kernel can't replace this attention's, or None where it can."""
    reason = why_not_safe(module)
    if reason is not None:
        return reason
    for attribute in ("attention_dropout", "attn_dropout"):
        value = getattr(module, attribute, 0)
        if (value.p if isinstance(value, nn.Dropout) else value) > 0:
            return f"attention dropout ({attribute} of {type(module).__name__})"
    return None


def _softcap(module: nn.Module) -> Any:
    for owner in (module, getattr(module, "config", None)):
        for name in ("attn_logit_softcapping", "softcap"):
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return None


def safe_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> Tensor:
    """The remedy for attention numerics: plain attention in fp32, for any kernel of the host."""
    _refuse(others)
    causal, mask, window = _limits(module, query, key, attention_mask, is_causal, sliding_window)
    out = safe_attention(
        *(x.permute(2, 0, 1, 3) for x in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        mask=mask,
        window=window,
        dropout=dropout,
    )
    return out.transpose(0, 1)


def faulty_kernel(strength: float) -> AttentionKernel:
    """A drill's kernel with a biased row term; imported only when a drill is configured."""
    from ...faults.attention import attention_row_term

    def kernel(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> Tensor:
        _refuse(others)
        if dropout:
            raise HostError(f"the drill's attention takes no attention dropout ({dropout}).")
        causal, mask, window = _limits(
            module, query, key, attention_mask, is_causal, sliding_window
        )
        if window is not None:
            mask = _with_window(mask, query.shape[2], window[0], query.device)
        out = attention_row_term(
            *(x.permute(2, 0, 1, 3) for x in (query, key, value)),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            strength=strength,
            causal=causal,
            mask=mask,
        )
        return out.transpose(0, 1)

    return kernel


def _refuse(others: dict[str, Any]) -> None:
    """Raise where the call has something that our kernels do not follow.

    Raises:
        HostError: a sink, a soft cap, a position bias or packed sequences.
    """
    for name in ("s_aux", "softcap", "position_bias", "cu_seq_lens_q"):
        if others.get(name) is not None:
            raise HostError(f"the kernel that replaces the model's attention takes no {name}.")


def _limits(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[bool, Tensor | None, tuple[int, int] | None]:
    """(causal, mask with True = barred, window) for :func:`safe_attention`."""
    config = getattr(module, "config", None)
    kind = str(getattr(config, "_attn_implementation", None))
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if mask is not None and mask.dim() == 4:
        # complete: causality and windows are in it
        barred = ~mask if mask.dtype == torch.bool else mask < _BARRED
        return False, barred[..., : key.shape[2]], None
    if kind == "eager":
        return False, None, None  # transformers' eager kernels know their mask and nothing else
    causal = bool(causal) and query.shape[2] > 1
    window = None
    # the sdpa kernels have a window in their mask only
    if "flash" in kind and sliding_window is not None and key.shape[2] > sliding_window:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    if mask is not None:
        mask = (mask == 0)[:, None, None, :]
    return causal, mask, window


def _with_window(mask: Tensor | None, length: int, left: int, device: torch.device) -> Tensor:
    """A mask that also bars keys more than ``left`` before their query."""
    place = torch.arange(length, device=device)
    far = (place[:, None] - place) > left
    return far if mask is None else mask | far
