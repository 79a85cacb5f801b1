"""What a healthy kernel leaves of each residual, and the limit that follows from it.

Provisional numbers until benchmarks/conservation_floors.py has run.
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

#: Limit over floor.
MARGIN = 5.0
#: (floor at 128, exponent of length) of bfloat16; float16 is an eighth, see below.
_BF16 = {
    "key_shift": (5.0e-4, -0.25),
    "value_output": (1.5e-4, -0.25),
    "query_key": (3.0e-4, -0.25),
    "router_shift": (1.5e-3, 0.0),
    "vocabulary_shift": (1.5e-3, 0.0),
    "norm_scale": (5e-4, 0.0),
    "norm_shift": (5e-4, 0.0),
}
_FRACTION = {torch.bfloat16: 1.0, torch.float16: 2.0**-3}
_FLOAT32 = 2e-6
_FLOAT64 = 2e-13


def floor(residual: str, dtype: torch.dtype, sequence_length: int, head_dim: int) -> float:
    """What a healthy kernel leaves: a plain number between 0 and 1.

    Args:
        residual: one of :data:`RESIDUALS`.
        dtype: number format of the tensors at the module's border.
        sequence_length: keys of a whole sequence, all context-parallel ranks together.
        head_dim: channels summed over: head dimension, experts, vocabulary or hidden size.

    Raises:
        ValueError: no floor is known for the residual or format, or a size is not positive.
    """
    if residual not in _BF16:
        raise ValueError(f"residual: {residual!r} cannot be used; allowed: {', '.join(RESIDUALS)}")
    for name, size in (("sequence_length", sequence_length), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name}: {size!r} cannot be used; allowed: >= 1")
    if dtype == torch.float64:
        return _FLOAT64
    if dtype == torch.float32:
        return _FLOAT32
    fraction = _FRACTION.get(dtype)
    if fraction is None:
        raise ValueError(
            f"dtype: {dtype} has no known {residual} floor; allowed: torch.float64, "
            "torch.float32, torch.bfloat16, torch.float16"
        )
    at_128, power = _BF16[residual]
    if power and sequence_length < 128:
        power = -0.5
    return fraction * at_128 * (sequence_length / 128) ** power


def limit(
    residual: str,
    dtype: torch.dtype,
    sequence_length: int,
    head_dim: int,
    *,
    tf32: bool = False,
) -> float:
    """The residual (mean over sequences or pooled over tokens) above which a kernel is not healthy.

    ``tf32``: float32 matrix products run as TF32, which has float16's significand.
    """
    if tf32 and dtype == torch.float32:
        dtype = torch.float16
    return MARGIN * floor(residual, dtype, sequence_length, head_dim)


def key_shift_limit(dtype: torch.dtype, sequence_length: int, *, tf32: bool = False) -> float:
    """:func:`limit` of the key shift for heads of 64 channels."""
    return limit("key_shift", dtype, sequence_length, 64, tf32=tf32)
