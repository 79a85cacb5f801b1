"""What the tokens of one layer's router add up to between two samples.

Every micro-batch goes in once, as sums over its tokens; what comes in from other micro-batches,
steps and ranks is added to it, so that means, quantiles and loads are those of all tokens together.
Nothing here reads a value back.
"""

from __future__ import annotations

import math

import torch

from ..signals import router as signals
from ..views import RouterView

#: sums over tokens; ``*_tokens`` are the counts of what not every layer has, and ``experts`` is the
#: number of experts once a token
SUMS = (
    "tokens",
    "experts",
    "entropy",
    "predicted_entropy",
    "squared_logsumexp",
    "choice_tokens",
    "mixing_entropy",
    "margin_tokens",
    "margin",
    "agreement_tokens",
    "agreement",
)
EDGES = {"entropy": signals.ENTROPY_EDGES, "margin": signals.MARGIN_EDGES}


class TokenSums:
    """Accumulators of one layer, allocated once.

    Args:
        view: the layer's router, with the rule by which it chooses.
        experts: the most experts that any layer has.
        edges: [2, bins + 1] float64 edges of the bins, in the order of ``EDGES``.

    Attributes:
        sums: [len(SUMS)] in the order of ``SUMS``.
        upto: [2, bins] tokens whose entropy over ln E, and whose margin, lies up to an edge.
        load: [experts] how often an expert was chosen.
    """

    def __init__(self, view: RouterView, experts: int, edges: torch.Tensor) -> None:
        self._rule, self._bias, self._edges = view.rule, view.bias, edges
        device = edges.device
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.upto = torch.zeros(len(EDGES), signals.BINS, dtype=torch.float64, device=device)
        self.load = torch.zeros(experts, dtype=torch.float64, device=device)

    @property
    def nbytes(self) -> int:
        """Device memory that is kept between hooks."""
        return sum(t.numel() * t.element_size() for t in (self.sums, self.upto, self.load))

    def clear(self) -> None:
        """Forget everything that was added."""
        for sums in (self.sums, self.upto, self.load):
            sums.zero_()

    def add(
        self,
        logits: torch.Tensor,
        padding: torch.Tensor | None,
        routing_map: torch.Tensor | None,
    ) -> None:
        """Take one micro-batch in.

        Args:
            logits: [..., E].
            padding: [...] bool, True at tokens that don't count, whatever stands there.
            routing_map: [..., E] bool, the host's choice, where the rule can't tell it.
        """
        # a host may run its forward pass in autocast, which would count in half precision
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            self._add(logits.detach().flatten(0, -2), padding, routing_map)

    def _add(
        self,
        logits: torch.Tensor,
        padding: torch.Tensor | None,
        routing_map: torch.Tensor | None,
    ) -> None:
        tokens, experts = logits.shape
        log_scores = signals.log_scores(logits, self._rule.score)
        log_p = signals.log_probabilities(log_scores)
        one = torch.ones(tokens, device=logits.device)
        none = torch.zeros_like(one)
        row = dict.fromkeys(SUMS, none) | {
            "tokens": one,
            "experts": torch.full_like(one, experts),
            "entropy": signals.routing_entropy(log_p),
            "predicted_entropy": signals.predicted_entropy(log_scores),
            "squared_logsumexp": signals.squared_logsumexp(logits),
        }
        if routing_map is not None:
            chosen = routing_map.detach().flatten(0, -2).float()
            self._take_choice(row, chosen, logits, log_p)
        elif self._rule.top_k is not None and self._rule.chooses_by != "host":
            chosen = self._choose(row, logits, log_p)
        else:
            chosen = None
        nats = math.log(experts) if experts > 1 else 1.0
        values = torch.stack([row["entropy"] / nats, row["margin"]])
        stacked = torch.stack([row[name] for name in SUMS])
        if padding is not None:
            # where, not a product: what stands at padded tokens may be NaN
            padded = padding.flatten()
            values = torch.where(padded, torch.inf, values)
            stacked = torch.where(padded, 0.0, stacked)
        self.sums += stacked.sum(1, dtype=torch.float64)
        self.upto += signals.count_upto(values, self._edges)
        if chosen is not None:
            counted = stacked[SUMS.index("tokens")]
            self.load[:experts] += counted @ chosen  # whole numbers, exact up to 2²⁴ tokens

    def _choose(
        self, row: dict[str, torch.Tensor], logits: torch.Tensor, log_p: torch.Tensor
    ) -> torch.Tensor:
        """Choose as the host does and fill in ``row``; returns the choice [T, E]."""
        k, one = self._rule.top_k, row["tokens"]
        bare = self._bare_scores(logits, log_p)
        bias = None if self._bias is None else self._bias()
        best, experts = self._best(bare if bias is None else bare + bias.float())
        chosen = signals.choice_map(experts[:, :k], logits.shape[1])
        row["choice_tokens"] = one
        row["mixing_entropy"] = signals.mixing_entropy(log_p.gather(1, experts[:, :k]))
        if best.shape[1] > k:
            if self._rule.chooses_by == "logits":  # compared by logits, told in probability
                best = log_p.gather(1, experts).exp()
            row["margin_tokens"], row["margin"] = one, signals.topk_margin(best, k)
        if bias is not None:
            self._compare(row, chosen, bare)
        return chosen

    def _take_choice(
        self,
        row: dict[str, torch.Tensor],
        chosen: torch.Tensor,
        logits: torch.Tensor,
        log_p: torch.Tensor,
    ) -> None:
        """Fill in ``row`` from a choice [T, E] that the host made by more than scores."""
        row["choice_tokens"] = row["tokens"]
        row["mixing_entropy"] = signals.mixing_entropy(log_p, chosen)
        if self._rule.top_k is not None:
            self._compare(row, chosen, self._bare_scores(logits, log_p))

    def _compare(
        self, row: dict[str, torch.Tensor], chosen: torch.Tensor, bare: torch.Tensor
    ) -> None:
        """Fill in how much of the choice the bare scores alone would have made."""
        free = self._best(bare)[1][:, : self._rule.top_k]
        row["agreement_tokens"] = row["tokens"]
        row["agreement"] = signals.bias_agreement(chosen, free)

    def _bare_scores(self, logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """What experts are compared by before the expert bias, [T, E] float32."""
        if self._rule.chooses_by == "logits":
            return logits.float()
        if self._rule.score == "softmax":
            return log_p.exp()
        return signals.scores(logits, self._rule.score)

    def _best(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rule = self._rule
        return signals.choose(
            scores,
            rule.top_k,
            groups=rule.groups,
            top_groups=rule.top_groups,
            group_sum=rule.group_sum,
        )
