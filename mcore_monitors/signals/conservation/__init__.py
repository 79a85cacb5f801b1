"""Conservation residuals: exact identities of backpropagation that a wrong kernel breaks at once.

One module a residual; each has ``<name>_terms``, sums that add up over shards of a sequence (or
of the vocabulary), and ``<name>_from_terms``, ratios made of complete sums. They need no baseline,
only the floor of the number format (:mod:`.floors`). Whoever hands tensors in detaches them:
dozens of small calls are made a sample, and each would pay for switching gradients off.
"""

from .accumulate import (
    SampleWindow,
    direction_bias,
    direction_coherence,
    direction_energy,
    direction_energy_limit,
    direction_layer_log_p,
    direction_log_p,
    direction_terms,
    spread_log_p,
)
from .floors import RESIDUALS, floor, limit
from .key_shift import (
    key_shift_all_terms,
    key_shift_along,
    key_shift_directions,
    key_shift_from_terms,
    key_shift_terms,
)
from .norm_scale import (
    norm_scale_from_terms,
    norm_scale_terms,
    norm_shift_from_terms,
    norm_shift_terms,
)
from .query_key import query_key_from_terms, query_key_sums, query_key_terms
from .router_shift import router_shift_from_terms, router_shift_terms
from .value_output import value_output_from_terms, value_output_terms
from .vocabulary_shift import vocabulary_shift_from_terms, vocabulary_shift_terms

__all__ = [
    "RESIDUALS",
    "SampleWindow",
    "direction_bias",
    "direction_coherence",
    "direction_energy",
    "direction_energy_limit",
    "direction_layer_log_p",
    "direction_log_p",
    "direction_terms",
    "floor",
    "key_shift_all_terms",
    "key_shift_along",
    "key_shift_directions",
    "key_shift_from_terms",
    "key_shift_terms",
    "limit",
    "norm_scale_from_terms",
    "norm_scale_terms",
    "norm_shift_from_terms",
    "norm_shift_terms",
    "query_key_from_terms",
    "query_key_sums",
    "query_key_terms",
    "router_shift_from_terms",
    "router_shift_terms",
    "spread_log_p",
    "value_output_from_terms",
    "value_output_terms",
    "vocabulary_shift_from_terms",
    "vocabulary_shift_terms",
]
