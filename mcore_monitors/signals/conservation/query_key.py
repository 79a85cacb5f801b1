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

The scale is what rounding leaves, in units of its relative error. Whatever dS a kernel has, rounded
or not, dQ and dK are made from the same one: only what happens to dQ and dK behind the product
stays, their own rounding. With independent relative errors of root mean square σ on both it is
Σ_ic q_ic dq_ic err_ic − Σ_jc k_jc dk_jc err_jc, of size σ·√(Σ (q∘dq)² + Σ (k∘dk)²): so the residual
is over that root, and a right kernel leaves about σ, whatever the length, the number of channels
and the tensors. (A sum of absolute values would hide a fault of one hundredth in bfloat16.) Two
roundings in a row, as of a gradient that is added up over blocks of keys in its own format, leave
about twice as much.

Shape names as in :mod:`.value_output`, ``d`` channels of a query or key.
"""

from __future__ import annotations

from torch import Tensor

from .terms import paired_terms, ratios


def query_key_terms(
    query: Tensor, grad_query: Tensor, key: Tensor, grad_key: Tensor
) -> tuple[Tensor, Tensor]:
    """The two sums of the query–key residual over the queries and keys at hand.

    Both add up over shards of a sequence.

    Args:
        query, grad_query: [S, B, H, d], H a multiple of G; head h uses key head h // (H / G).
        key, grad_key: [S, B, G, d].

    Returns:
        (⟨Q, dQ⟩ − ⟨K, dK⟩ [B, G], float32, or float64 for float64 inputs; Σ (k∘dk)² + Σ (q∘dq)²
        [B, G], float64).
    """
    return paired_terms(query, grad_query, key, grad_key, power=2)


def query_key_from_terms(signed: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of |⟨Q, dQ⟩ − ⟨K, dK⟩| / √squares, and their number, per key head.

    Args:
        signed, squares: [B, G] of :func:`query_key_terms`, complete over each sequence.

    Returns:
        (sum of ratios [G], number of sequences [G]). A sequence without gradient is not counted.
    """
    return query_key_sums(signed, squares)[:2]


def query_key_sums(signed: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`query_key_from_terms`, and the sum of the ratios' squares [G].

    For the squares see :func:`spread_log_p`.
    """
    ratio, counted = ratios(signed.abs(), squares.sqrt())
    return ratio.sum(-2), counted.sum(-2, dtype=ratio.dtype), ratio.square().sum(-2)
