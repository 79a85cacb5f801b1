"""Rounding as faulty kernels do it: towards zero, and with the low bits cleared.

For float32 tensors on any device; a float64 tensor is rounded to float32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clear_low_bits(x: Tensor, bits: int) -> Tensor:
    """Clear the low ``bits`` (0 to 23) bits of each float32: rounds towards zero.

    The mean relative error is about −2^(bits − 24)·ln 2; sixteen bits leave bfloat16's format.

    Raises:
        ValueError: ``bits`` is not a number of bits of a significand.
    """
    if not 0 <= bits <= 23:
        raise ValueError(f"bits: {bits!r} cannot be used; allowed: 0 to 23")
    return (x.float().contiguous().view(torch.int32) & -(1 << bits)).view(torch.float32)


def towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor in ``dtype``, rounded towards zero instead of to the nearest.

    For ``torch.float32`` the thirteen lowest bits go (what is left has float16's significand, as
    TF32 has), because a float32 tensor has nothing of its own to round.
    """
    lost = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 13}[dtype]
    return clear_low_bits(x, lost).to(dtype)
