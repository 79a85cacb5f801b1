"""What crosses the border of an observed module in one micro-batch, as a tap hands it over.

Shape names: ``S`` tokens of a sequence, ``B`` sequences, ``T`` packed tokens, ``d`` head dimension,
``D`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of an attention kernel as its border shows it: what goes in and what comes out.

    The tensors are those of the graph, in the host's own layout: hook *them* to get gradients, and
    bring tensors and gradients alike to [S, B, heads, channels] with :meth:`arranged`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    #: query heads ``H`` and query groups ``G`` of this rank
    heads: int
    groups: int
    #: order of the dimensions; heads and channels may be merged. ``thd`` is packed: [T, heads, d]
    layout: Literal["sbhd", "bhsd", "bshd", "thd"]
    #: the host's description of packed sequences, or None
    packed: Any = None

    @property
    def sequences(self) -> int:
        """Number of sequences; packed ones count as one."""
        return 1 if self.layout == "thd" else self.query.shape[self.layout.index("b")]

    def arranged(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """A tensor of this call, or its gradient, as [S, B, heads, channels]; a view.

        Args:
            x: query, key, value, output or a gradient of one of them.
            heads: ``self.heads`` for query and output, ``self.groups`` for key and value.
        """
        return arranged(x, heads, self.layout)


def arranged(x: torch.Tensor, heads: int, layout: str) -> torch.Tensor:
    """A tensor of an :class:`AttentionCall` as [S, B, heads, channels]; a view."""
    if layout == "bhsd":
        return x.permute(2, 0, 1, 3)
    merged = 2 if layout == "thd" else 3
    if x.dim() == merged:
        x = x.unflatten(-1, (heads, -1))
    if layout == "thd":
        return x.unsqueeze(1)
    return x.transpose(0, 1) if layout == "bshd" else x


@dataclass(frozen=True, kw_only=True)
class NormCall:
    """One call of a normalisation: input and output, tensors of the graph."""

    x: torch.Tensor
    y: torch.Tensor
    eps: float
    #: True for LayerNorm, False for RMSNorm and L2 norms
    centred: bool
    #: [D], what is added to the scaled result, or None
    bias: torch.Tensor | None = None
