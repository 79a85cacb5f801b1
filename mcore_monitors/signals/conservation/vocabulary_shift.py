"""Vocabulary shift: Σ_v dlogit_v = 0 for every token.

Cross-entropy is −log softmax(logits)[target]; one number added to all logits of a token cancels.
In formulas dlogit = g·(p − y) with Σ p = Σ y = 1. No paper; ours.

Kept by **label smoothing** (the smoothed target also sums to 1), loss masks and token weights (g),
logit scaling (a factor), and **vocabulary parallelism** when both sums run over all shards of the
vocabulary, padded columns too (in Megatron they take part in the softmax). A tied embedding changes
nothing. Broken by **z-loss** (Σ_v dlogit_v = 2λ·logsumexp), by a **soft
cap** on logits unless dlogit is taken behind the cap, and by losses that are no function of a
softmax.

It holds for the gradient at the logits: the kernel under test is the cross-entropy with its
reductions. Fused linear-cross-entropy kernels never write dlogit and cannot be watched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import pooled_ratio


def vocabulary_shift_terms(grad_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v dlogit_v and Σ_v |dlogit_v| of each token over the vocabulary entries at hand.

    Both add up over shards of the vocabulary.

    Args:
        grad_logits: [..., V], gradient of the logits.

    Returns:
        (Σ_v dlogit_v [...], Σ_v |dlogit_v| [...]), float32, or float64 for a float64 input.
    """
    # no widened copy: [tokens, V] is the largest tensor of many models
    dtype = torch.promote_types(grad_logits.dtype, torch.float32)
    return (
        grad_logits.sum(-1, dtype=dtype),
        torch.linalg.vector_norm(grad_logits, 1, dim=-1, dtype=dtype),
    )


def vocabulary_shift_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t |Σ_v dlogit_v| / Σ_t Σ_v |dlogit_v| over the tokens of a call, and 1.

    Args:
        signed, scale: [...] of :func:`vocabulary_shift_terms`, complete over the vocabulary.

    Returns:
        (ratio [1], 1 [1]); (0, 0) where no token has a gradient; NaN for a non-finite one.
    """
    return pooled_ratio(signed, scale)
