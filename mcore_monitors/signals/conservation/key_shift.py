"""Key shift: Σ_j dK_j = 0 for every sequence and key head.

Add one vector u to all keys. Each
logit S_ij = α q_i·k_j moves by α q_i·u, the same for all j, and softmax over j ignores that: the
output, hence the loss, does not depend on u, and its derivative Σ_j dK_j is zero. In formulas,
dS_ij = P_ij (dP_ij − δ_i) with δ_i = Σ_j P_ij dP_ij, so Σ_j dS_ij = δ_i − δ_i Σ_j P_ij = 0 and
Σ_j dK_j = α Σ_i (Σ_j dS_ij) q_i = 0. A kernel with a wrong δ_i leaves −α Σ_i err_i q_i: what it
costs is seen at its first step, long before training suffers. No paper; ours.

It needs Σ_j P_ij = 1 over the keys that are summed, and logits that move by a constant per query.

====================================  =======================================================
kept by                               because
====================================  =======================================================
causal, padding, block (packed) and   the constant is added to the allowed keys; the others
sliding-window masks                  stay at −inf
position biases (ALiBi, T5)           added to the logits, they don't depend on K
dropout on the probabilities          P itself doesn't move, and δ_i = Σ_j P_ij dP_ij with the
                                      dropped dP; the mask is the same in both directions
grouped queries                       holds for each query head, so for the sum over a group
QK-norm, latent attention             on the key that enters QKᵀ, all its channels together
rotary embedding                      on the key after the rotation; each position turns its
                                      gradient differently, so before it the sum is not zero
context parallelism                   when the vector sum runs over the ranks of a sequence
====================================  =======================================================

Broken by a **sink in the denominator**, learned or fixed (off-by-one softmax): its logit does not
move with K, P sums to 1 − P_sink and Σ_j dS_ij = δ_i P_i,sink. (A sink that is a token with a key
of its own keeps it.) Broken by a **soft cap** c·tanh(S/c), which does not carry a shift through.
Do not watch such layers.

The loss scale cancels in the ratio. Rounding does not: a healthy kernel leaves a floor that the
number format sets (:func:`mcore_monitors.signals.conservation.floors.limit`).

Shape names: ``S`` keys of a sequence, ``B`` sequences, ``G`` key heads, ``d`` head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import over_groups, ratio_sums, wide


def key_shift_terms(
    dk: Tensor,
    *,
    query: Tensor,
    output: Tensor,
    grad_output: Tensor,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The two sums of the key-shift residual over the keys and queries at hand.

    Both add up over shards of a sequence (context parallelism), unlike the ratio.

    Args:
        dk: [S, B, G, d], gradient of the keys that enter QKᵀ (after rotary embedding). Packed
            sequences [T, G, d] go in as [T, 1, G, d]: each one's sum is zero, so is the total.
        query: [S, B, H, d], H a multiple of G; head h uses key head h // (H / G).
        output, grad_output: [S, B, H, v].
        softmax_scale: factor α on the logits, 1/√d by default.

    Returns:
        (Σ_j dK_j [B, G, d], scale [B, G]), float32, or float64 for a float64 input, with

            scale = Σ_j ‖dK_j‖ + α Σ_i ‖q_i‖·‖dO_i∘O_i‖.

    Why the second part. It is the size of what the row term δ_i = Σ_v dO_iv O_iv puts into Σ_j
    dK_j, hence of its rounding. Where nearly all attention sits on one key the gradient of the keys
    vanishes and its rounding does not: Σ_j ‖dK_j‖ alone gave ratios up to 1 for right kernels in
    every format. With both parts they leave at most 3.3e-4 in bfloat16 (mean over heads and
    sequences) on each of nine kinds of tensors, and a fault stands out of the noise as before. On
    ordinary tensors the value is a half to a fifth of that without the second part.

    Summed in float32 whatever the format of ``dk``: on 128 to 8192 keys of a healthy float32
    kernel (floor 3.5e-8 to 9e-9) this adds 7e-9 to 2e-9, the ratio grows by 3% at most, four
    orders of magnitude below the limit. float64 sums cost ten times as much on a CPU.
    """
    return _terms(dk, wide(query), wide(output) * wide(grad_output), softmax_scale)


def _terms(
    dk: Tensor, query: Tensor, row: Tensor, softmax_scale: float | None
) -> tuple[Tensor, Tensor]:
    """The same from the wide query and dO∘O."""
    dtype = torch.promote_types(dk.dtype, torch.float32)
    alpha = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    keys = torch.linalg.vector_norm(dk, dim=-1, dtype=dtype).sum(0)
    rows = torch.linalg.vector_norm(row, dim=-1) * torch.linalg.vector_norm(query, dim=-1)
    rows = over_groups(rows.sum(0), dk.shape[2])
    return dk.sum(0, dtype=dtype), torch.add(keys, rows, alpha=alpha)


def key_shift_from_terms(signed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of ‖Σ_j dK_j‖ / scale, and the number of sequences, per key head.

    Args:
        signed: [B, G, d] of :func:`key_shift_terms`, complete over each sequence.
        scale: [B, G] likewise.

    Returns:
        (sum of ratios [G], number of sequences [G]), each ratio from 0 to 1. A sequence whose
        gradient is zero throughout (all padding) says nothing and is not counted. A non-finite
        gradient is counted and makes the sum NaN.
    """
    return ratio_sums(torch.linalg.vector_norm(signed, dim=-1), scale)


def key_shift_directions(query: Tensor, output: Tensor, grad_output: Tensor, groups: int) -> Tensor:
    """Where a wrong row term pushes Σ_j dK_j: Σ_i q_i and Σ_i δ_i q_i, per key head.

    An error err_i in δ_i leaves Σ_j dK_j = −α Σ_i err_i q_i. One that is alike for all rows (an
    offset) points along −Σ q_i; one that is a share of δ_i (a biased rounding of O) along
    −Σ δ_i q_i. Rounding noise is spread over more directions than these two, so the residual along
    them tells a bias from noise with fewer samples, and it is a number instead of a vector.

    Args:
        query: [S, B, H, d], output and grad_output: [S, B, H, v]; groups: G.

    Returns:
        [2, B, G, d], sums over the queries at hand: they add up over shards of a sequence.
    """
    return _directions(wide(query), wide(output) * wide(grad_output), groups)


def _directions(query: Tensor, row: Tensor, groups: int) -> Tensor:
    """The same from the wide query and dO∘O."""
    both = torch.stack([query.sum(0), (row.sum(-1, keepdim=True) * query).sum(0)])  # [2, B, H, d]
    return both if query.shape[2] == groups else both.unflatten(2, (groups, -1)).sum(3)


def key_shift_all_terms(
    dk: Tensor, query: Tensor, output: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`key_shift_terms` and, [2, B, G, d], :func:`key_shift_directions` in one pass."""
    query, row = wide(query), wide(output) * wide(grad_output)
    return *_terms(dk, query, row, None), _directions(query, row, dk.shape[2])


def key_shift_along(signed: Tensor, directions: Tensor) -> Tensor:
    """−Σ_j dK_j along each direction of unit length: positive where δ is too large.

    Args:
        signed: [..., B, G, d] of :func:`key_shift_terms`; directions: [2, ..., B, G, d] of
            :func:`key_shift_directions`; both complete over each sequence.

    Returns:
        [2, ..., B, G], in the units of ``signed``: divide by the scale, or hand both to
        :func:`mcore_monitors.signals.conservation.direction_terms`.
    """
    length = torch.linalg.vector_norm(directions, dim=-1)
    least = torch.finfo(length.dtype).tiny
    return -(signed * directions).sum(-1) / length.clamp(least)
