"""What is known of each token from its router logits, by the router's own rule.

Shape names: ``E`` experts, ``k`` chosen experts; ``...`` are tokens in any arrangement. Nothing
here reads a value back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..signals import router as signals
from ..views import RoutingRule

#: what a token may have
TERMS = (
    "entropy",
    "predicted_entropy",
    "squared_logsumexp",
    "mixing_entropy",
    "margin",
    "agreement",
)


class TokenTerms:
    """The numbers of each token, and its choice.

    Args:
        rule: how the router chooses.
        logits: [E, ...] float32; may be overwritten.
        bias: what is added to the scores for the choice, to be broadcast to [E, ...], or None.
        routing_map: [E, ...] float32, the host's choice, where the rule can't tell it.
        whole: everything that the rule gives, not the entropy only.

    Attributes:
        terms: name out of ``TERMS`` to [...] float32; what the rule doesn't give is not there.
        chosen: [E, ...] float32, 1 at chosen experts; None where the choice isn't known.
    """

    def __init__(
        self,
        rule: RoutingRule,
        logits: Tensor,
        bias: Tensor | None,
        routing_map: Tensor | None,
        *,
        whole: bool = True,
    ) -> None:
        self._rule, self._logits = rule, logits
        log = signals.log_scores(logits, rule.score)
        spent = log is not logits or not whole
        self._weighed = signals.weigh(log, out=log if spent else None)
        spare = None if whole else self._weighed.weight
        self.terms: dict[str, Tensor] = {"entropy": signals.routing_entropy(self._weighed, spare)}
        self.chosen: Tensor | None = None
        if whole:
            self._add_sizes()
            self._add_choice(bias, routing_map)

    def _add_sizes(self) -> None:
        raw = self._weighed if self._rule.score == "softmax" else signals.weigh(self._logits)
        self.terms["predicted_entropy"] = signals.predicted_entropy(self._weighed)
        self.terms["squared_logsumexp"] = signals.squared_logsumexp(raw)

    def _add_choice(self, bias: Tensor | None, routing_map: Tensor | None) -> None:
        rule = self._rule
        if routing_map is not None:
            self._take_choice(routing_map)
        elif rule.top_k is not None and rule.chooses_by != "host":
            if bias is None and rule.groups is None:
                self._choose_by_rank()
            else:
                self._choose(bias)

    def _choose_by_rank(self) -> None:
        """Choose where a score's rank is all that matters: that of its logarithm, too."""
        k, (log, _, best, total) = self._rule.top_k, self._weighed
        log_top = signals.best_values(log, k + 1)
        top = log_top.exp()
        self.chosen = signals.choice_shares(log, log_top, k)
        mixed = signals.Weighed(log_top[:k], top[:k], best, top[:k].sum(0))
        self.terms["mixing_entropy"] = signals.routing_entropy(mixed)
        if len(top) > k:
            normalised = self._rule.score == "softmax" or self._rule.chooses_by == "logits"
            gap = top[k - 1] - top[k]
            self.terms["margin"] = gap / total if normalised else gap * best.exp()

    def _choose(self, bias: Tensor | None) -> None:
        """Choose as the host does, by scores and bias and within groups; and without the bias."""
        rule, k = self._rule, self._rule.top_k
        compared = self._bare_scores().unsqueeze(1)
        if bias is not None:
            compared = compared + torch.stack([bias, torch.zeros_like(bias)], 1)
        best, chosen = self._choices(compared, k + 1)
        self.chosen = chosen[:, 0]
        self.terms["mixing_entropy"] = signals.mixing_entropy(self._weighed.log, self.chosen)
        if len(best) > k:
            last = best[k - 1 : k + 1, 0]
            if rule.chooses_by == "logits":  # compared by logits, told in scores
                last = signals.log_scores(last, rule.score) - self._weighed.best
                last = last.exp_() / self._weighed.total
            self.terms["margin"] = last[0] - last[1]
        if bias is not None:
            self.terms["agreement"] = signals.bias_agreement(*chosen.unbind(1), k)

    def _take_choice(self, chosen: Tensor) -> None:
        """Take a choice that the host made by more than scores."""
        k = self._rule.top_k
        self.chosen = chosen
        self.terms["mixing_entropy"] = signals.mixing_entropy(self._weighed.log, chosen)
        if k is not None:
            _, free = self._choices(self._bare_scores(), k)
            self.terms["agreement"] = signals.bias_agreement(chosen, free, k)

    def _choices(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The best ``count`` of scores [E, ...] within groups, as far as there are, and a map."""
        rule, allowed = self._rule, scores.shape[0]
        if rule.groups and rule.top_groups and rule.top_groups < rule.groups:
            scores = signals.limit_groups(scores, rule.groups, rule.top_groups, rule.group_sum)
            allowed = rule.top_groups * allowed // rule.groups
        best = signals.best_values(scores, min(count, allowed))
        return best, signals.choice_shares(scores, best, rule.top_k)

    def _bare_scores(self) -> Tensor:
        """What experts are compared by before the expert bias, [E, ...]."""
        if self._rule.chooses_by == "logits":
            return self._logits
        return signals.scores(self._logits, self._weighed, self._rule.score)
