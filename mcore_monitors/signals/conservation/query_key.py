"""Query–key: ⟨Q, dQ⟩ = ⟨K, dK⟩ for every sequence and key head (summed over its query heads).

The loss sees Q and K only through S = α Q Kᵀ. Scale Q by 1 + s or K by 1 + s: S moves alike. In
formulas, dQ = α dS K and dK = α dSᵀ Q, so both sides are Σ_ij dS_ij S_ij. No paper; ours.

It holds for *any* dS, right or wrong, as long as dQ and dK are made from the same one: it is blind
to the row term δ and to the softmax, and speaks when the two backward kernels disagree (a block of
keys lost in one of them, ring or tensor-parallel errors, a scale applied once).

Kept by masks, position biases, soft cap, sinks, dropout, grouped queries (the group's query heads
are summed), packed sequences, latent attention and rotary embedding when taken on the Q and K that
enter Q Kᵀ, context parallelism when both sums run over all ranks of a sequence. With QK-norm take Q
and K *behind* the norm (in front of it both sides are zero but for ε). Broken where Q or K is used
a second time inside the tap (a key that is also a value, as in latent attention's compressed form:
then dK has a second part). Under fp8 there is no floor for it here.

The scale is Σ|K∘dK| and Σ|Q∘dQ|, halved: ⟨K, dK⟩ itself passes through zero, and either sum alone
may almost vanish where attention sits on one key.

Shape names as in :mod:`.value_output`, ``d`` channels of a query or key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import paired_terms, ratio_sums


@torch.no_grad()
def query_key_terms(
    query: Tensor, grad_query: Tensor, key: Tensor, grad_key: Tensor
) -> tuple[Tensor, Tensor]:
    """The two sums of the query–key residual over the queries and keys at hand.

    Both add up over shards of a sequence.

    Args:
        query, grad_query: [S, B, H, d], H a multiple of G; head h uses key head h // (H / G).
        key, grad_key: [S, B, G, d].

    Returns:
        (⟨Q, dQ⟩ − ⟨K, dK⟩ [B, G], (Σ|K∘dK| + Σ|Q∘dQ|)/2 [B, G]), float32, or float64 for
        float64 inputs.
    """
    return paired_terms(query, grad_query, key, grad_key)


@torch.no_grad()
def query_key_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of |⟨Q, dQ⟩ − ⟨K, dK⟩| / scale, and their number, per key head.

    Args:
        signed, scale: [B, G] of :func:`query_key_terms`, complete over each sequence.

    Returns:
        (sum of ratios [G], number of sequences [G]). A sequence without gradient is not counted.
    """
    return ratio_sums(signed.abs(), scale)
