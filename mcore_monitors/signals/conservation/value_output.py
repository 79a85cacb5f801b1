"""Value–output: ⟨V, dV⟩ = ⟨O, dO⟩ for every sequence and key head (summed over its query heads).

O = P V is linear in V. Scale V by 1 + s: O scales alike, P does not move, and the derivative of the
loss with respect to s is ⟨V, dV⟩ seen from the values and ⟨O, dO⟩ seen from the output. In
formulas, dV = Pᵀ dO, so Σ_j V_j·dV_j = Σ_ij P_ij V_j·dO_i = Σ_i O_i·dO_i. No paper; ours.

It needs nothing but the same P in forward and backward; P need not sum to 1.

====================================  =======================================================
kept by                               because
====================================  =======================================================
any mask, packed sequences            P is zero there in both directions
position biases, soft cap, QK-norm,   they only shape P
rotary embedding, softmax scale
learned or fixed sink in the          P sums to less than 1, O = P V all the same; a sink that
denominator                           carries a value of its own must be counted with V
dropout on the probabilities          the same dropped P in both directions
grouped queries                       the sum of the group's query heads stands on the right
latent attention                      on the V that enters P V (up-projected)
context parallelism                   both sums run over all ranks of a sequence: V on one rank
                                      meets O on another
====================================  =======================================================

Broken by an output that is changed before it is seen: a gate, a norm or a dropout applied to O
inside the tap. Under fp8 attention V, P and O are quantised with scales of their own and the
identity only holds at the coarse level of that format: there is no floor for it here.

Shape names: ``S`` keys or queries, ``B`` sequences, ``H`` query heads, ``G`` key heads, ``v``
channels of a value.
"""

from __future__ import annotations

from torch import Tensor

from .terms import paired_terms, ratio_sums


def value_output_terms(
    value: Tensor, grad_value: Tensor, output: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    """The two sums of the value–output residual over the keys and queries at hand.

    Both add up over shards of a sequence.

    Args:
        value, grad_value: [S, B, G, v].
        output, grad_output: [S, B, H, v], H a multiple of G; head h uses key head h // (H / G).

    Returns:
        (⟨O, dO⟩ − ⟨V, dV⟩ [B, G], (Σ|V∘dV| + Σ|O∘dO|)/2 [B, G]), float32, or float64 for
        float64 inputs.
    """
    signed, scale = paired_terms(output, grad_output, value, grad_value)
    return signed, 0.5 * scale


def value_output_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of |⟨O, dO⟩ − ⟨V, dV⟩| / scale, and their number, per key head.

    Args:
        signed, scale: [B, G] of :func:`value_output_terms`, complete over each sequence.

    Returns:
        (sum of ratios [G], number of sequences [G]). A sequence without gradient is not counted.
    """
    return ratio_sums(signed.abs(), scale)
