"""Router signals: the geometry of the expert rows, the entropy of the choice, margin and load.

Shape names: ``E`` experts, ``D`` hidden size, ``T`` tokens, ``k`` chosen experts. The router weight
is W_R [E, D] with rows w_i, the logits of a token x are z = W_R x, its scores p.
"""

from .choice import best_values, bias_agreement, choice_shares, limit_groups, mixing_entropy
from .entropy import (
    Weighed,
    log_scores,
    predicted_entropy,
    routing_entropy,
    scores,
    squared_logsumexp,
    weigh,
)
from .geometry import (
    centred_conditioning,
    row_norm_spread,
    weight_signals,
    weight_similarity,
)
from .load import (
    dead_experts,
    effective_experts,
    largest_share,
    max_violation,
    underused_experts,
)
from .quantiles import (
    BINS,
    ENTROPY_EDGES,
    MARGIN_EDGES,
    QuantileCounts,
    entropy_bins,
    margin_bins,
    quantile,
)
from .topk import choice_map, choose

__all__ = [
    "BINS",
    "ENTROPY_EDGES",
    "MARGIN_EDGES",
    "QuantileCounts",
    "Weighed",
    "best_values",
    "bias_agreement",
    "centred_conditioning",
    "choice_map",
    "choice_shares",
    "choose",
    "dead_experts",
    "effective_experts",
    "entropy_bins",
    "largest_share",
    "limit_groups",
    "log_scores",
    "margin_bins",
    "max_violation",
    "mixing_entropy",
    "predicted_entropy",
    "quantile",
    "routing_entropy",
    "row_norm_spread",
    "scores",
    "squared_logsumexp",
    "underused_experts",
    "weigh",
    "weight_signals",
    "weight_similarity",
]
