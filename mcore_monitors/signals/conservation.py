"""Conservation residuals: exact identities of backpropagation that a wrong kernel breaks at once.

**Key shift: Σ_j dK_j = 0 for every sequence and key head.** Add one vector u to all keys. Each
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
number format sets (:func:`key_shift_limit`).

Shape names: ``S`` keys of a sequence, ``B`` sequences, ``G`` key heads, ``d`` head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What a healthy kernel leaves at 128 keys: PyTorch's fused attention on the CPU, random tensors.
#: TF32 has the significand of float16.
_FLOOR_128 = {torch.bfloat16: 5.0e-4, torch.float16: 6.4e-5}
#: Limit over floor: see :func:`key_shift_limit`.
_MARGIN = 5.0
_LIMIT_FLOAT32 = 1e-5
_LIMIT_FLOAT64 = 1e-12


@torch.no_grad()
def key_shift_terms(dk: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums of the key-shift residual over the keys at hand.

    Both add up over shards of a sequence (context parallelism), unlike the ratio.

    Args:
        dk: [S, B, G, d], gradient of the keys that enter QKᵀ (after rotary embedding). Packed
            sequences [T, G, d] go in as [T, 1, G, d]: each one's sum is zero, so is the total.

    Returns:
        (Σ_j dK_j [B, G, d], Σ_j ‖dK_j‖ [B, G]), float32, or float64 for a float64 input.

    Summed in float32 whatever the format of ``dk``: on 128 to 8192 keys of a healthy float32
    kernel (floor 3.5e-8 to 9e-9) this adds 7e-9 to 2e-9, the ratio grows by 3% at most, four
    orders of magnitude below the limit. float64 sums cost ten times as much on a CPU.
    """
    dtype = torch.promote_types(dk.dtype, torch.float32)
    norm = torch.linalg.vector_norm(dk, dim=-1, dtype=dtype)
    return dk.sum(0, dtype=dtype), norm.sum(0)


@torch.no_grad()
def key_shift_from_terms(vector: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of ‖Σ_j dK_j‖ / Σ_j ‖dK_j‖, and the number of sequences, per key head.

    Args:
        vector: [B, G, d] of :func:`key_shift_terms`, complete over each sequence.
        norm: [B, G] likewise.

    Returns:
        (sum of ratios [G], number of sequences [G]), each ratio from 0 to 1. A sequence whose
        gradient is zero throughout (all padding) says nothing and is not counted. A non-finite
        gradient is counted and makes the sum NaN.
    """
    counted = norm != 0  # true for NaN: a broken gradient must not pass as an empty one
    ratio = torch.linalg.vector_norm(vector, dim=-1) / torch.where(counted, norm, 1.0)
    return ratio.sum(0), counted.sum(0, dtype=norm.dtype)


def key_shift_limit(dtype: torch.dtype, sequence_length: int, *, tf32: bool = False) -> float:
    """The key-shift residual (mean over sequences) above which a kernel is not healthy.

    Args:
        dtype: number format of the attention, e.g. ``torch.bfloat16``.
        sequence_length: keys of a whole sequence, all context-parallel ranks together.
        tf32: float32 matrix products run as TF32.

    Returns:
        The limit, a plain number between 0 and 1.

    Raises:
        ValueError: no floor is known for the format, or the length is not positive.

    How the numbers were picked. **bfloat16 and float16**: five times the floor of a fused kernel
    on random tensors, which is 5.0e-4 / 3.2e-4 / 1.8e-4 (bfloat16) and 6.4e-5 / 4.2e-5 / 2.3e-5
    (float16) at 128 / 512 / 2048 keys, taken to fall as S^(−1/4), slower than it does (below 128
    keys as S^(−1/2)). Logits of a hundred and more leave three times that floor, values and
    gradients with a common part two to four times: both stay below the limit. What can cross it
    without a fault: nearly all attention on one key *and* a nearly constant output gradient (the
    true dK then almost vanishes, its rounding does not); on tensors built that way the floor was
    thirty times higher at 128 keys. **float32**: 1e-5 at every length. The floor is 1e-8 to 2e-7,
    and 3e-6 in the case just named; relative to its own past it can grow a hundredfold when
    logits grow, so only an absolute limit holds.

    What it catches: an error of size c in δ leaves about 1.6 c where queries have a common part,
    as in a trained model, and 0.1 c at 128 random ones. So in float32 every strength of
    :mod:`mcore_monitors.faults.attention` from .0003 on is over the limit at once, in bfloat16
    strengths from .002 on.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: {sequence_length!r} cannot be used; allowed: >= 1")
    if dtype == torch.float64:
        return _LIMIT_FLOAT64
    if dtype == torch.float32 and not tf32:
        return _LIMIT_FLOAT32
    floor = _FLOOR_128.get(torch.float16 if dtype == torch.float32 else dtype)
    if floor is None:
        raise ValueError(
            f"dtype: {dtype} has no known key-shift floor; allowed: torch.float64, torch.float32, "
            "torch.bfloat16, torch.float16"
        )
    return _MARGIN * floor * (sequence_length / 128) ** (-0.5 if sequence_length < 128 else -0.25)
