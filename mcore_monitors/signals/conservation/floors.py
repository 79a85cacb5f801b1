"""What a healthy kernel leaves of each residual, and the limit that follows from it.

**Model.** Rounding to a format with unit 2^−p in the last place leaves a relative error of
root mean square σ ≈ 0.2·2^−p: 1.6e-3 for bfloat16 (p = 7), 2.0e-4 for float16 (p = 10), 2.5e-8 for
float32 (p = 23). A residual is a sum of n rounded terms t_i over Σ|t_i|, so a healthy kernel leaves
about σ·√Σt_i² / Σ|t_i|: σ/√n where terms are alike, σ where one dominates.

* key shift: dK_j and dS_ij are rounded, and O before δ: σ·√2/√S for alike keys, 2.0e-4 at 128 in
  bfloat16 (measured: 2.0e-4). Sequences with unlike rows fall slower than 1/√S.
  Where all rows are alike (two or more sinks take nearly all attention, dO has a common part) O is
  rounded the same way in each and nothing averages out: σ·0.8 = 1.3e-3 at any length. The floor is
  that of ordinary heads; the limit covers these too.
* value–output: at least the d channels of one key (attention sinks): σ·1.5/√d = 3e-4 at 64;
  ordinary heads have a fifth of it.
* query–key: σ, because its scale is what rounding leaves. A kernel that adds dQ and dK up over
  blocks of keys in bfloat16, as PyTorch's fused one does on a CPU, rounds once a block: 1.8 σ at
  512 keys, 3 σ at 2,048, like the root of the number of blocks.
* norms: D channels, σ·1.5/√D, 2.1e-4 at 128 (measured: 2.4e-4, LayerNorm twice that: its
  statistics are stored in bfloat16).
* router and vocabulary: the largest entry (target, chosen expert) is about half of Σ|dz|, so the
  floor stays at about σ/2 whatever the number of entries.
* float32: logits of size |S| carry an error of |S|·2^−24 into P, which outgrows the rounding of the
  results; only an absolute limit holds. Cross-entropy sums V exponentials: it grows with V.

The constants are what ``benchmarks/conservation_floors.py`` found on the worst of nine kinds of
tensors (docs/conservation.md has the table), not the history of a run.
"""

from __future__ import annotations

import torch

RESIDUALS = (
    "key_shift",
    "value_output",
    "query_key",
    "router_shift",
    "vocabulary_shift",
    "norm_scale",
    "norm_shift",
)
_ATTENTION = RESIDUALS[:3]

#: Limit over floor. The floor is a mean; where the noise of a unit has one direction its size is
#: that of |N(0, 1)|, whose largest of 10⁵ independent draws is 5.5 times its mean. A mean over four
#: sequences stays below 3.
MARGIN = 5.0

#: bfloat16: (floor, size at which it is taken: sequence length for the key shift, else channels)
_BFLOAT16 = {
    "key_shift": (2.3e-4, 128),
    "value_output": (4.0e-4, 64),
    "query_key": (3.2e-3, None),
    "router_shift": (1.2e-3, None),
    "vocabulary_shift": (1.2e-3, None),
    "norm_scale": (7.0e-4, 128),
    "norm_shift": (1.5e-4, 128),
}
#: bfloat16: limits that are not MARGIN floors. Rows that round alike (below) leave 1.3e-3 at any
#: length, and 2.5e-3 is that plus five standard deviations of a mean over 16 sequences.
_LIMIT_BFLOAT16 = {"key_shift": 2.5e-3}
#: significand bits are 8 and 11
_OF_BFLOAT16 = {torch.bfloat16: 1.0, torch.float16: 2.0**-3}
_FLOAT32 = 2e-6
_FLOAT64 = 2e-13
#: query–key's floor over these: a product that is added up in its own format errs in units of its
#: terms, not of the result, and keys with a large part in common cancel in dQ = dS K
_CANCELS = 10.0


def floor(residual: str, dtype: torch.dtype, sequence_length: int, head_dim: int) -> float:
    """What a healthy kernel leaves on the worst ordinary tensors: a plain number.

    Args:
        residual: one of :data:`RESIDUALS`.
        dtype: number format of the tensors at the module's border.
        sequence_length: keys of a whole sequence, all context-parallel ranks together.
        head_dim: entries summed over: channels of a head, experts, vocabulary or hidden size.

    Raises:
        ValueError: no floor is known for the residual or format, or a size is not positive.
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual: {residual!r} cannot be used; allowed: {', '.join(RESIDUALS)}")
    for name, size in (("sequence_length", sequence_length), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name}: {size!r} cannot be used; allowed: >= 1")
    cancels = _CANCELS if residual == "query_key" else 1.0
    if dtype == torch.float64:
        return cancels * _FLOAT64
    if dtype == torch.float32:
        if residual == "vocabulary_shift":
            return max(_FLOAT32, 4e-6 * (head_dim / 8192) ** 0.75)
        return cancels * _FLOAT32
    if dtype not in _OF_BFLOAT16:
        raise ValueError(
            f"dtype: {dtype} has no known {residual} floor; allowed: torch.float64, "
            "torch.float32, torch.bfloat16, torch.float16"
        )
    value, at = _BFLOAT16[residual]
    if residual == "key_shift":
        value *= (sequence_length / at) ** (-0.15 if sequence_length > at else -0.25)
    elif residual == "query_key":
        value *= max(1.0, sequence_length / 512) ** 0.5
    elif at is not None:
        value *= (head_dim / at) ** -0.5
    return _OF_BFLOAT16[dtype] * value


def limit(
    residual: str,
    dtype: torch.dtype,
    sequence_length: int,
    head_dim: int,
    *,
    tf32: bool = False,
) -> float:
    """The residual, mean over sequences or pooled over tokens, above which a kernel isn't healthy.

    Five times :func:`floor` or more. ``tf32``: float32 matrix products run as TF32, which has
    float16's significand; it matters to attention only.
    """
    if tf32 and dtype == torch.float32 and residual in _ATTENTION:
        dtype = torch.float16
    found = MARGIN * floor(residual, dtype, sequence_length, head_dim)
    return max(found, _LIMIT_BFLOAT16.get(residual, 0.0) * _OF_BFLOAT16.get(dtype, 0.0))
