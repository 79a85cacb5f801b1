"""What a host shows of its model: views on weights that monitors may read.

Monitors see views, never hosts. A host fills these in once, when the model is built; every later
read goes to the live parameters.

Shape names: ``H`` local query heads, ``G`` local query groups (key-value heads), ``d`` head
dimension, ``D`` hidden size, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch

from .catalogue.conservation import ATTENTION_RESIDUALS
from .parallel import GroupReduce
from .signals.optimizer import AdamStep


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
    """One layer's query and key projections as they live on this rank.

    ``docs/layouts.md`` says what the rows are for each kind of attention. Query and key biases are
    left out: they move a logit by what one token alone gives, not by a product of two.
    """

    #: global layer number, counted from 1 as Megatron does
    layer: int
    #: global number of the first local query group; its heads follow from ``heads_per_group``
    first_group: int
    groups: int
    heads_per_group: int
    #: returns ``(W_q [G * heads_per_group, d, D], W_k [G, d, D])``, rows are head channels
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    #: ``read`` gathers a shard from every rank: all ranks call it together, in the same order
    collective: bool = False
    replica: Replica = field(default_factory=Replica)
    #: global number of the first local query head where it does not follow from ``first_group``:
    #: more tensor-parallel ranks than groups, each with some heads of a group; a shared rotary key
    first_head: int | None = None
    #: the same as ``read`` for some local groups only, where each costs work (latent attention)
    read_groups: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]] | None = None
    #: part of the head's channels: empty for all of them; latent attention has a ``nope`` and a
    #: ``rope`` view a layer. It enters the signal's name before the window
    #: (``catalogue.part_name``): ``attention/delta2_effective_rank/rope@50``
    part: str = ""

    def head(self, group: int) -> int:
        """Global number of the first query head of a local group."""
        if self.first_head is not None:
            return self.first_head + group * self.heads_per_group
        return (self.first_group + group) * self.heads_per_group

    def take(self, groups: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(W_q [len(groups) * heads_per_group, d, D], W_k [len(groups), d, D])`` of some groups.

        On a collective view every rank calls it, also one that wants no group.
        """
        if self.read_groups is not None:
            return self.read_groups(groups)
        query, key = self.read()
        query = query.unflatten(0, (self.groups, self.heads_per_group))
        # slices: a list as an index would sync a GPU
        rows = [query[g : g + 1] for g in groups] or [query[:0]]
        keys = [key[g : g + 1] for g in groups] or [key[:0]]
        return torch.cat(rows).flatten(0, 1), torch.cat(keys)


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a router turns a token's logits into its choice of experts."""

    #: score of an expert: a softmax over all experts, σ(z), or √softplus(z)
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    #: experts that a token goes to; None where the host doesn't say: signals of the choice are
    #: missing then
    top_k: int | None = None
    #: what the best ``top_k`` are taken of: the scores (plus the expert bias, where there is one)
    #: or the logits. The same order, but group-limited routing adds them up. ``host``: by
    #: something else, so the host hands its choice over with the logits
    chooses_by: Literal["scores", "logits", "host"] = "scores"
    #: group-limited routing: the experts stand in ``groups`` equal groups, a token may go to the
    #: ``top_groups`` best of them; a group counts as the sum of its best ``group_sum`` experts
    groups: int | None = None
    top_groups: int | None = None
    group_sum: int = 1


@dataclass(frozen=True, kw_only=True)
class RouterView:
    """One layer's router: its weight ``W_R`` [E, D] and its rule."""

    layer: int
    #: returns ``W_R`` [E, D]; None where no rank holds it whole
    read: Callable[[], torch.Tensor] | None
    rule: RoutingRule = RoutingRule()
    #: returns what is added to the scores [E] for the choice only, now; None where nothing is
    bias: Callable[[], torch.Tensor | None] | None = None
    #: ``read`` gathers a shard from every rank: all ranks call it together, in the same order
    collective: bool = False
    replica: Replica = field(default_factory=Replica)


@dataclass(frozen=True, kw_only=True)
class ActivityView:
    """How the logits of one layer's attention are made, for heads of this rank."""

    #: global number of the first local query head
    first_head: int
    #: local query heads
    heads: int
    #: factor on the product of query and key
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """The optimizer's state of one parameter, or of this rank's piece of it, after a step."""

    weight: torch.Tensor
    #: as the optimizer took it; None where it is gone
    gradient: torch.Tensor | None
    m: torch.Tensor
    v: torch.Tensor
    made: AdamStep


@dataclass(frozen=True, kw_only=True)
class OptimizerView:
    """One parameter of a layer that this rank is to count; each counts on one rank only."""

    layer: int
    #: None before the first step
    read: Callable[[], AdamState | None]


@dataclass(kw_only=True)
class Conserved:
    """One conservation residual: where it holds, and what sets its floor.

    Everything but ``places`` is the same on every rank.
    """

    #: values of one layer of the whole model
    units: int
    #: number format of the tensors that are looked at
    dtype: torch.dtype
    #: channels summed over: head dimension, experts, vocabulary or hidden size; 0 where unknown
    channels: int
    #: layers of this rank in which it holds, with (first unit here, number of units here)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ResidualStream:
    """The residual stream between layers, and which of its tokens pass through this rank.

    All but ``layers``, ``pieces`` and the replica's rank is the same on every rank.
    """

    #: channels of a token
    width: int
    #: sequences of one step, on all ranks together
    sequences: int
    #: sequences of one micro-batch of this rank; it takes them in turn with the other replicas
    micro_batch: int
    replica: Replica = field(default_factory=Replica)
    #: layers whose stream can be read here, by global number
    layers: tuple[int, ...] = ()
    #: a sequence is cut into ``pieces_of`` equal pieces, of which this rank holds these, in order;
    #: none where another rank already shows all that this one holds
    pieces: tuple[int, ...] = (0,)
    pieces_of: int = 1
    #: tokens of a sequence where that is fixed
    length: int | None = None
    #: adds up onto one of the ranks that run the same layers
    onto: GroupReduce = field(default_factory=lambda: GroupReduce(None))


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
    device: torch.device
    #: number format of the activations, which sets the floor of conservation residuals
    activation_dtype: torch.dtype
    sequence_length: int
    #: this rank among those that train the same weights on other sequences; the same place for all
    #: ranks that share a sequence
    data: Replica = field(default_factory=Replica)
    attention: list[AttentionView] = field(default_factory=list)
    routers: list[RouterView] = field(default_factory=list)
    #: channels of a query or key, 0 where unknown
    head_dim: int = 0
    #: conservation residuals by name, the same names on every rank: those of attention and routers
    #: are there from the start, a host adds those of norms and of the output
    conserved: dict[str, Conserved] = field(default_factory=dict)
    #: layers whose attention logits can be made again from query and key
    activity: dict[int, ActivityView] = field(default_factory=dict)
    #: parameters with Adam's state, those of this rank's share
    optimizer: list[OptimizerView] = field(default_factory=list)
    #: the stream between layers; None where the model shows none
    residual: ResidualStream | None = None
    #: one sentence for each thing that was found but can't be watched
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtype = self.activation_dtype
        known = {
            name: Conserved(units=self.groups, dtype=dtype, channels=self.head_dim)
            for name in ATTENTION_RESIDUALS
        }
        known["router/shift"] = Conserved(units=1, dtype=dtype, channels=self.experts)
        # what a view was made from (``dataclasses.replace``) keeps its own
        self.conserved = known | self.conserved

    def conserves_attention(
        self, layer: int, first: int, groups: int, *, but: Collection[str] = ()
    ) -> None:
        """Say that a layer's attention keeps its identities.

        Args:
            layer: global layer number, from 1.
            first, groups: number of the first query group on this rank, and how many there are.
            but: names out of :data:`ATTENTION_RESIDUALS` that do not hold here.
        """
        for name in ATTENTION_RESIDUALS:
            if name not in but:
                self.conserved[name].places[layer] = (first, groups)

    @property
    def conserves(self) -> bool:
        """Whether any residual can be watched on this rank."""
        return any(residual.places for residual in self.conserved.values())
