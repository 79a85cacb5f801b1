"""Megatron's core attention with a place for a tap and a choice of kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...calls import AttentionCall
from ..taps import AttentionTap
from .observed import named


@cache
def observed_attention(parent: type) -> type:
    """Subclass of a Megatron core-attention class that tells a tap what crosses its border."""

    class Observed(parent):
        mcore_monitors_tap: AttentionTap | None = None

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            tap = self.mcore_monitors_tap
            if tap is None:
                return super().forward(query, key, value, *args, **kwargs)
            kernel = tap.kernel()
            if kernel is None:
                output = super().forward(query, key, value, *args, **kwargs)
            else:
                output = kernel(self, query, key, value, *args, **kwargs)
            if self.training and tap.watches():
                tap.tell(
                    AttentionCall(
                        query=query,
                        key=key,
                        value=value,
                        output=output,
                        heads=query.shape[-2],
                        groups=key.shape[-2],
                        layout="sbhd" if query.dim() == 4 else "thd",
                        packed=kwargs.get("packed_seq_params"),
                    )
                )
            return output

    return named(Observed, parent)
