"""What is known of each token from its router logits, by the router's own rule.

Shape names: ``E`` experts, ``k`` chosen experts; ``...`` are tokens in any arrangement. Nothing
here reads a value back.
"""

from __future__ import annotations

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
        logits: [..., E] float32.
        bias: what is added to the scores for the choice, to be broadcast to [..., E], or None.
        routing_map: [..., E] the host's choice, where the rule can't tell it.

    Attributes:
        terms: name out of ``TERMS`` to [...] float32; what the rule doesn't give is not there.
        chosen: [..., E] float32, 1 at chosen experts; None where the choice isn't known.
    """

    def __init__(
        self,
        rule: RoutingRule,
        logits: Tensor,
        bias: Tensor | None,
        routing_map: Tensor | None,
    ) -> None:
        self._rule = rule
        log_scores = signals.log_scores(logits, rule.score)
        log_p = signals.log_probabilities(log_scores)
        self.terms: dict[str, Tensor] = {
            "entropy": signals.routing_entropy(log_p),
            "predicted_entropy": signals.predicted_entropy(log_scores),
            "squared_logsumexp": signals.squared_logsumexp(logits),
        }
        self.chosen: Tensor | None = None
        if routing_map is not None:
            self._take_choice(routing_map.float(), logits, log_p)
        elif rule.top_k is not None and rule.chooses_by != "host":
            self._choose(logits, log_p, bias)

    def _choose(self, logits: Tensor, log_p: Tensor, bias: Tensor | None) -> None:
        """Choose as the host does."""
        k = self._rule.top_k
        bare = self._bare_scores(logits, log_p)
        best, experts = self._best(bare if bias is None else bare + bias)
        self.chosen = signals.choice_map(experts[..., :k], logits.shape[-1])
        self.terms["mixing_entropy"] = signals.mixing_entropy(log_p.gather(-1, experts[..., :k]))
        if best.shape[-1] > k:
            if self._rule.chooses_by == "logits":  # compared by logits, told in probability
                best = log_p.gather(-1, experts).exp()
            self.terms["margin"] = signals.topk_margin(best, k)
        if bias is not None:
            self._compare(bare)

    def _take_choice(self, chosen: Tensor, logits: Tensor, log_p: Tensor) -> None:
        """Take a choice that the host made by more than scores."""
        self.chosen = chosen
        self.terms["mixing_entropy"] = signals.mixing_entropy(log_p, chosen)
        if self._rule.top_k is not None:
            self._compare(self._bare_scores(logits, log_p))

    def _compare(self, bare: Tensor) -> None:
        """How much of the choice the bare scores alone would have made."""
        free = self._best(bare)[1][..., : self._rule.top_k]
        self.terms["agreement"] = signals.bias_agreement(self.chosen, free)

    def _bare_scores(self, logits: Tensor, log_p: Tensor) -> Tensor:
        """What experts are compared by before the expert bias, [..., E]."""
        if self._rule.chooses_by == "logits":
            return logits
        if self._rule.score == "softmax":
            return log_p.exp()
        return signals.scores(logits, self._rule.score)

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        rule = self._rule
        return signals.choose(
            scores,
            rule.top_k,
            groups=rule.groups,
            top_groups=rule.top_groups,
            group_sum=rule.group_sum,
        )
