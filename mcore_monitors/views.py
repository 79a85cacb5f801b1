"""What a host shows of its model: views on weights that monitors may read.

Monitors see views, never hosts. A host fills these in once, when the model is built; every later
read goes to the live parameters.

Shape names: ``H`` local query heads, ``G`` local query groups (key-value heads), ``d`` head
dimension, ``D`` hidden size, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Where this rank stands among the ranks that hold the same weights.

    Work on replicated weights is shared out: piece ``i`` belongs to the rank with
    ``rank == i % size``, so that no two ranks compute the same thing.
    """

    rank: int = 0
    size: int = 1

    def owns(self, piece: int) -> bool:
        """Whether piece number ``piece`` of the shared work falls to this rank."""
        return piece % self.size == self.rank


@dataclass(frozen=True, kw_only=True)
class AttentionView:
    """One layer's query and key projections as they live on this rank."""

    #: global layer number, counted from 1 as Megatron does
    layer: int
    #: global number of the first local query group; its heads follow from ``heads_per_group``
    first_group: int
    groups: int
    heads_per_group: int
    #: returns ``(W_q [G * heads_per_group, d, D], W_k [G, d, D])``, rows are head channels
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    replica: Replica = field(default_factory=Replica)


@dataclass(frozen=True, kw_only=True)
class RouterView:
    """One layer's router weight ``W_R`` [E, D]."""

    layer: int
    #: returns ``W_R`` [E, D]; None where no rank holds it whole
    read: Callable[[], torch.Tensor] | None
    replica: Replica = field(default_factory=Replica)


@dataclass(kw_only=True)
class ModelView:
    """All that the monitors learn of a model on this rank.

    The totals are those of the whole model, the same on every rank: they fix the shape of the
    packed collective, so that a pipeline stage without a single attention layer still takes part.
    """

    layers: int
    heads: int
    groups: int
    experts: int
    #: ``softmax`` or ``sigmoid``
    router_score: str
    device: torch.device
    #: number format of the activations, which sets the floor of conservation residuals
    activation_dtype: torch.dtype
    sequence_length: int
    attention: list[AttentionView] = field(default_factory=list)
    routers: list[RouterView] = field(default_factory=list)
    #: layers whose attention keeps the key-shift identity, with (first local group, groups)
    key_shift: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: one sentence for each thing that was found but can't be watched
    left_out: list[str] = field(default_factory=list)
