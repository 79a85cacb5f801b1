"""Router signals: the geometry of the expert rows, the entropy of the choice, margin and load.

Shape names: ``E`` experts, ``D`` hidden size, ``T`` tokens, ``k`` chosen experts. The router weight
is W_R [E, D] with rows w_i, the logits of a token x are z = W_R x, its scores p.
"""

from .choice import bias_agreement, choice_map, choose, mixing_entropy, topk_margin
from .entropy import (
    log_probabilities,
    log_scores,
    predicted_entropy,
    routing_entropy,
    scores,
    squared_logsumexp,
)
from .geometry import centred_conditioning, row_norm_spread, weight_similarity
from .load import (
    dead_experts,
    effective_experts,
    largest_share,
    max_violation,
    underused_experts,
)
from .quantiles import BINS, ENTROPY_EDGES, MARGIN_EDGES, count_upto, quantile

__all__ = [
    "BINS",
    "ENTROPY_EDGES",
    "MARGIN_EDGES",
    "bias_agreement",
    "centred_conditioning",
    "choice_map",
    "choose",
    "count_upto",
    "dead_experts",
    "effective_experts",
    "largest_share",
    "log_probabilities",
    "log_scores",
    "max_violation",
    "mixing_entropy",
    "predicted_entropy",
    "quantile",
    "routing_entropy",
    "row_norm_spread",
    "scores",
    "squared_logsumexp",
    "topk_margin",
    "underused_experts",
    "weight_similarity",
]
