"""What the tokens of a rank's routers add up to between two samples.

Every micro-batch counts once, as sums over its tokens; what comes from other micro-batches, steps
and ranks is added, so that means, quantiles and loads are those of all tokens together.

A hook costs one copy: logits wait until there are enough of them, of whatever layers and steps, and
are looked at together. For a small model, and on a card, the cost of looking is that of starting
some sixty operations, however many tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..signals import router as signals
from ..views import RouterView, RoutingRule
from .router_tokens import TERMS, TokenTerms

#: sums over tokens: of all tokens, of the number of experts once a token, of each term, and for
#: each term the number of tokens that have it
SUMS = ("tokens", "experts", *TERMS, *(f"{term}_tokens" for term in TERMS))
EDGES = {"entropy": signals.ENTROPY_EDGES, "margin": signals.MARGIN_EDGES}
#: bytes of logits that wait on a rank for each kind of router, or one micro-batch if that is more
WAITING_BYTES = 16 << 20


class Waiting:
    """Micro-batches of one kind of router and one size, which wait to be looked at together.

    Args:
        shape: tokens of a micro-batch, experts.
        padded, biased: whether they come with padding masks and with an expert bias.
    """

    def __init__(
        self,
        rule: RoutingRule,
        shape: tuple[int, int],
        *,
        padded: bool,
        biased: bool,
        device: torch.device,
    ) -> None:
        tokens, experts = shape
        self.rule, self.tokens = rule, tokens
        self.slots = max(1, WAITING_BYTES // (4 * tokens * experts))
        self._logits = torch.empty(self.slots, tokens, experts, device=device)
        self._padding = self._bias = None
        if padded:
            self._padding = torch.empty(self.slots, tokens, dtype=torch.bool, device=device)
        self._index = torch.empty(self.slots, dtype=torch.int64, device=device)
        if biased:  # of the moment: it changes from step to step
            self._bias = torch.empty(self.slots, experts, device=device)
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Device memory."""
        kept = (self._logits, self._index, self._padding, self._bias)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def put(self, row: int, logits: Tensor, padding: Tensor | None, bias: Tensor | None) -> bool:
        """Copy one micro-batch; returns whether no other fits in."""
        slot = self.filled
        self._logits[slot].copy_(logits)
        self._index[slot] = row
        if padding is not None:
            self._padding[slot].copy_(padding)
        if bias is not None:
            self._bias[slot].copy_(bias)
        self.filled += 1
        return self.filled == self.slots

    def take(self) -> list[Tensor | None]:
        """Rows [n], logits [n, T, E], padding [n, T] and bias [n, E] of what waited."""
        n, self.filled = self.filled, 0
        parts = (self._index, self._logits, self._padding, self._bias)
        return [None if t is None else t[:n] for t in parts]


class RouterSums:
    """Accumulators of all routers of a rank.

    Args:
        views: the rank's routers; their order is that of the rows below.
        experts: the most experts that any layer has.

    Attributes:
        sums: [routers, len(SUMS)] in the order of ``SUMS``.
        upto: [routers, 2, bins] tokens whose entropy over ln E, and whose margin, lies up to an
            edge, see :func:`mcore_monitors.signals.router.count_upto`.
        load: [routers, experts] how often an expert was chosen.
    """

    def __init__(self, views: Sequence[RouterView], experts: int, device: torch.device) -> None:
        self._views = {view.layer: (row, view) for row, view in enumerate(views)}
        n = len(views)
        self.sums = torch.zeros(n, len(SUMS), dtype=torch.float64, device=device)
        self.upto = torch.zeros(n, len(EDGES), signals.BINS, dtype=torch.float64, device=device)
        self.load = torch.zeros(n, experts, dtype=torch.float64, device=device)
        self._edges = torch.tensor(tuple(EDGES.values()), dtype=torch.float64).to(device)
        self._waiting: dict[tuple[RoutingRule, int, bool, bool], Waiting] = {}

    @property
    def accumulator_bytes(self) -> int:
        """Device memory of the accumulators."""
        return sum(t.numel() * t.element_size() for t in (self.sums, self.upto, self.load))

    @property
    def waiting_bytes(self) -> int:
        """Device memory of the logits that wait, shared by all routers of a kind."""
        return sum(waiting.nbytes for waiting in self._waiting.values())

    def clear(self) -> None:
        """Forget everything that was added."""
        for sums in (self.sums, self.upto, self.load):
            sums.zero_()
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
        with torch.no_grad():
            logits = logits.detach().flatten(0, -2)
            padding = None if padding is None else padding.flatten()
            bias = None if view.bias is None else view.bias()
            if routing_map is None:
                waiting = self._room(view.rule, logits, padding, bias)
                if waiting.tokens == logits.shape[0]:
                    if waiting.put(row, logits, padding, bias):
                        self._look(waiting)
                    return
            else:
                routing_map = routing_map.flatten(0, -2)
            parts = (logits, padding, bias, routing_map)
            index = torch.full((1,), row, device=logits.device)
            self._add(view.rule, index, *(None if t is None else t.unsqueeze(0) for t in parts))

    def look(self) -> None:
        """Look at all that waits."""
        with torch.no_grad():
            for waiting in self._waiting.values():
                self._look(waiting)

    def _room(
        self, rule: RoutingRule, logits: Tensor, padding: Tensor | None, bias: Tensor | None
    ) -> Waiting:
        kind = (rule, logits.shape[1], padding is not None, bias is not None)
        if kind not in self._waiting:
            self._waiting[kind] = Waiting(
                rule, tuple(logits.shape), padded=kind[2], biased=kind[3], device=logits.device
            )
        return self._waiting[kind]

    def _look(self, waiting: Waiting) -> None:
        if waiting.filled:
            self._add(waiting.rule, *waiting.take(), None)

    def _add(
        self,
        rule: RoutingRule,
        rows: Tensor,
        logits: Tensor,
        padding: Tensor | None,
        bias: Tensor | None,
        routing_map: Tensor | None,
    ) -> None:
        """Add micro-batches to ``rows`` [n]: logits [n, T, E], padding [n, T], bias [n, E]."""
        micro_batches, size, experts = logits.shape
        # a host may run its forward pass in autocast, which would count in half precision
        with torch.autocast(logits.device.type, enabled=False):
            bias = None if bias is None else bias.float().unsqueeze(1)
            tokens = TokenTerms(rule, logits.float(), bias, routing_map)
            nats = math.log(experts) if experts > 1 else 1.0
            entropy = tokens.terms["entropy"] / nats
            values = torch.stack([entropy, tokens.terms.get("margin", entropy)])
            terms = torch.stack(list(tokens.terms.values()))  # [terms, n, T]
            chosen = tokens.chosen
            if padding is None:
                counted = torch.full_like(rows, size)
                load = None if chosen is None else chosen.sum(1)
            else:
                # where, not a product: what stands at padded tokens may be NaN
                values = torch.where(padding, torch.inf, values)
                terms = torch.where(padding, 0.0, terms)
                kept = (~padding).float()
                counted = kept.sum(1)
                load = None if chosen is None else torch.bmm(kept.unsqueeze(1), chosen).squeeze(1)
            edges = self._edges.unsqueeze(1).expand(-1, micro_batches, -1).contiguous()
            upto = signals.count_upto(values, edges)  # [2, n, bins]
            sums = dict(zip(tokens.terms, terms.sum(-1, dtype=torch.float64), strict=True))
            sums |= dict.fromkeys([f"{term}_tokens" for term in tokens.terms], counted)
            sums |= {"tokens": counted, "experts": experts * counted}
            for name, total in sums.items():
                self.sums[:, SUMS.index(name)].index_add_(0, rows, total.double())
            self.upto.index_add_(0, rows, upto.transpose(0, 1))
            if load is not None:
                self.load[:, :experts].index_add_(0, rows, load.double())
