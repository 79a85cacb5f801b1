"""What the tokens of a rank's routers add up to between two samples.

Every micro-batch counts once, as sums over its tokens; what comes from other micro-batches, steps
and ranks is added, so that means, quantiles and loads are those of all tokens together.

A hook costs one copy: logits wait until there are enough of them, of whatever layers and steps, and
are looked at together. For a small model, and on a card, the cost of looking is that of starting
a hundred operations, however many tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..signals import router as signals
from ..views import RouterView, RoutingRule
from .router_tokens import TERMS, TokenTerms

#: what only the samples have at which all is told
SELDOM_TERMS = TERMS[1:]
#: sums over tokens: of all tokens, of the number of experts once a token, of each term, and for
#: each term but the entropy, which all tokens have, the number of tokens that have it
SUMS = ("tokens", "experts", *TERMS, *(f"{term}_tokens" for term in SELDOM_TERMS))
#: the first so many of which every sample has
ALWAYS = 3
#: what quantiles are taken of, and the edges of the bins that it is counted in
EDGES = {"entropy": signals.ENTROPY_EDGES, "margin": signals.MARGIN_EDGES}
#: bytes of logits that wait on a rank for each kind of router, or one micro-batch if that is more
WAITING_BYTES = 16 << 20

#: shape of the logits, and what comes with them: padding, expert bias, the host's choice
_Kind = tuple[torch.Size, bool, bool, bool]


class Waiting:
    """Micro-batches of one kind of router and one shape, which wait to be looked at together.

    Args:
        shape: of a micro-batch's logits, [..., E].
        padded, biased, chosen: whether they come with padding masks, with an expert bias and with
            the host's choice.
    """

    def __init__(
        self,
        rule: RoutingRule,
        shape: torch.Size,
        padded: bool,
        biased: bool,
        chosen: bool,
        device: torch.device,
    ) -> None:
        tokens, experts = shape[:-1].numel(), shape[-1]
        self.rule, self.shape, self.comes = rule, shape, (padded, biased, chosen)
        self.slots = max(1, WAITING_BYTES // (4 * tokens * experts))
        self._logits = torch.empty(self.slots, tokens, experts, device=device)
        self._padding = self._bias = self._chosen = None
        if padded:
            self._padding = torch.empty(self.slots, tokens, dtype=torch.bool, device=device)
        if biased:  # of the moment: it changes from step to step
            self._bias = torch.empty(self.slots, experts, device=device)
        if chosen:
            self._chosen = torch.empty_like(self._logits, dtype=torch.bool)
        # views made once: a hook is to do nothing but copy
        self._slots = self._logits.view(self.slots, *shape).unbind(0)
        self._index = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self._rows = [0] * self.slots  # what is in the index: it is written where it changes only
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Device memory."""
        kept = (self._logits, self._index, self._padding, self._bias, self._chosen)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def put(
        self,
        row: int,
        logits: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        chosen: Tensor | None,
    ) -> bool:
        """Copy one micro-batch, as the hook got it; returns whether no other fits in."""
        slot = self.filled
        self._slots[slot].copy_(logits.data)  # in half the time of ``detach``
        if padding is not None:
            self._padding[slot].copy_(padding.flatten())
        if bias is not None:
            self._bias[slot].copy_(bias.detach())
        if chosen is not None:
            self._chosen[slot].copy_(chosen.flatten(0, -2))
        if self._rows[slot] != row:
            self._index[slot] = self._rows[slot] = row
        self.filled = slot = slot + 1
        return slot == self.slots

    def take(self) -> list[Tensor | None]:
        """What waited, each [n, ...]: rows, logits, padding, bias, chosen."""
        n, self.filled = self.filled, 0
        parts = (self._index, self._logits, self._padding, self._bias, self._chosen)
        return [None if t is None else t[:n] for t in parts]


class RouterSums:
    """Accumulators of all routers of a rank.

    Args:
        views: the rank's routers; their order is that of the rows below.
        experts: the most experts that any layer has.

    Attributes:
        whole: whether all is added up, or the entropies' sums only; to be changed after ``clear``.
        sums: [routers, len(SUMS)] in the order of ``SUMS``.
        counts: of the entropy over ln E and of the margin, for quantiles.
        load: [routers, experts] how often an expert was chosen.
    """

    def __init__(self, views: Sequence[RouterView], experts: int, device: torch.device) -> None:
        self._views = {view.layer: (row, view) for row, view in enumerate(views)}
        self.whole = True
        n = len(views)
        self.sums = torch.zeros(n, len(SUMS), dtype=torch.float64, device=device)
        self.load = torch.zeros(n, experts, dtype=torch.float64, device=device)
        self.counts = signals.QuantileCounts(n, len(EDGES), device)
        self._waiting: dict[tuple[RoutingRule, int, bool, bool, bool], Waiting] = {}
        #: of each layer: where micro-batches as its last one wait, if they do
        self._last: dict[int, Waiting | None] = dict.fromkeys(self._views)

    @property
    def accumulator_bytes(self) -> int:
        """Device memory of the accumulators."""
        return self.counts.nbytes + sum(
            t.numel() * t.element_size() for t in (self.sums, self.load)
        )

    @property
    def waiting_bytes(self) -> int:
        """Device memory of the logits that wait, shared by all routers of a kind."""
        return sum(waiting.nbytes for waiting in self._waiting.values())

    def clear(self) -> None:
        """Forget everything that was added."""
        self.sums.zero_()
        if self.whole:
            self.load.zero_()
            self.counts.zero()
        for waiting in self._waiting.values():
            waiting.filled = 0

    def put(
        self, layer: int, logits: Tensor, padding: Tensor | None, routing_map: Tensor | None
    ) -> None:
        """Take one micro-batch in.

        Args:
            logits: [..., E].
            padding: [...] bool, True at tokens that don't count, whatever stands there.
            routing_map: [..., E] the host's choice, where the rule can't tell it.
        """
        row, view = self._views[layer]
        bias = None if view.bias is None else view.bias()
        waiting, shape = self._last[layer], logits.shape
        comes = (padding is not None, bias is not None, routing_map is not None)
        if waiting is None or shape != waiting.shape or comes != waiting.comes:
            waiting = self._last[layer] = self._room(view.rule, (shape, *comes), logits.device)
        if waiting is not None:
            if waiting.put(row, logits, padding, bias, routing_map):
                self._look(waiting)
        else:
            index = torch.full((1,), row, device=logits.device)
            parts = (
                logits.flatten(0, -2),
                None if padding is None else padding.flatten(),
                bias,
                None if routing_map is None else routing_map.flatten(0, -2),
            )
            self._add(view.rule, index, *(None if t is None else t.unsqueeze(0) for t in parts))

    def look(self) -> None:
        """Look at all that waits."""
        for waiting in self._waiting.values():
            self._look(waiting)

    def _room(self, rule: RoutingRule, kind: _Kind, device: torch.device) -> Waiting | None:
        """Where micro-batches of a kind wait; None where those of another shape do."""
        shape, *comes = kind
        key = (rule, shape[-1], *comes)
        if key not in self._waiting:
            self._waiting[key] = Waiting(rule, *kind, device)
        waiting = self._waiting[key]
        return waiting if waiting.shape == shape else None

    def _look(self, waiting: Waiting) -> None:
        if waiting.filled:
            self._add(waiting.rule, *waiting.take())

    @torch.no_grad()
    def _add(
        self,
        rule: RoutingRule,
        rows: Tensor,
        logits: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        routing_map: Tensor | None,
    ) -> None:
        """Add micro-batches to ``rows`` [n], as :meth:`Waiting.take` gives them."""
        _, size, experts = logits.shape
        device = logits.device.type
        # a host may run its forward pass in autocast, which would count in half precision
        cast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            logits = _experts_first(logits.float())
            if padding is not None:  # what stands at padded tokens may be NaN
                logits = logits.masked_fill(padding, 0.0)
            if routing_map is not None and self.whole:
                routing_map = _experts_first(routing_map.float())
            if bias is not None:
                bias = bias.float().t().unsqueeze(-1)
            tokens = TokenTerms(rule, logits, bias, routing_map, whole=self.whole)
            kept = None if padding is None else (~padding).float()
            self._add_sums(rows, tokens.terms, experts, size, kept)
            if not self.whole:
                return
            bins, parts = self._bins(tokens.terms, experts)
            if padding is not None:
                bins.masked_fill_(padding, torch.nan)
            self.counts.add(rows, bins, parts)
            if tokens.chosen is not None:
                chosen = tokens.chosen if kept is None else tokens.chosen * kept
                self.load[:, :experts].index_add_(0, rows, chosen.sum(-1).t().double())

    def _add_sums(
        self, rows: Tensor, terms: dict[str, Tensor], experts: int, size: int, kept: Tensor | None
    ) -> None:
        """Add the sums over tokens of terms [n, T], of those that are ``kept`` [n, T]."""
        tokens = None if kept is None else kept.sum(-1, dtype=torch.float64)
        if tokens is None:
            tokens = torch.full_like(rows, size, dtype=torch.float64)
        values = torch.stack(list(terms.values())) if self.whole else terms["entropy"][None]
        if kept is not None:
            values = values * kept
        found = [*values.sum(-1, dtype=torch.float64), tokens, experts * tokens]
        if self.whole:
            found.append(torch.zeros_like(tokens))
        at = {name: i for i, name in enumerate((*terms, "tokens", "experts"))}
        at |= {f"{name}_tokens": len(terms) for name in terms}
        names = SUMS if self.whole else SUMS[:ALWAYS]
        table = torch.stack([found[at.get(name, -1)] for name in names], 1)
        self.sums[:, : len(names)].index_add_(0, rows, table)

    @staticmethod
    def _bins(terms: dict[str, Tensor], experts: int) -> tuple[Tensor, Tensor]:
        """Where values lie, [kinds, n, T] each, in the order of ``EDGES``, as far as there are."""
        nats = math.log(experts) if experts > 1 else 1.0
        found = [signals.entropy_bins(terms["entropy"] / nats)]
        if "margin" in terms:
            found.append(signals.margin_bins(terms["margin"]))
        bins, parts = zip(*found, strict=True)
        return torch.stack(bins), torch.stack(parts)


def _experts_first(x: Tensor) -> Tensor:
    """A copy of [n, T, E] that is [E, n, T], in memory too."""
    return x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
