"""Conservation residuals: exact identities of the backward pass."""

from __future__ import annotations

from .info import SignalInfo

#: the residuals of an attention kernel
ATTENTION_RESIDUALS = ("attention/key_shift", "attention/value_output", "attention/query_key")
#: evidence over several samples, in nats: not a size, so it has a limit of its own
EVIDENCE = ("attention/key_shift_bias", "attention/query_key_spread")
#: directions of a biased key shift in the order of their values: an error of the row term that is
#: alike for all rows, or one that is a share of the row term itself
BIASES = ("offset", "share")
#: norms of a layer in the order of their values; the final one counts to the last layer
NORMS = ("input", "pre-MLP", "query", "key", "final")

_OURS = "own derivation (docs/conservation.md)"
_ATTENTION = (
    "Megatron-core: tensor, sequence, pipeline and data parallelism, grouped queries, recompute, "
    "micro-batches; context parallelism below the host; DeepSpeed: Hugging Face attention"
)
_MEGATRON = (
    "Megatron-core: tensor, sequence, pipeline and data parallelism, recompute, micro-batches; "
    "DeepSpeed: Hugging Face models"
)
_BIAS = (
    "−ln p (nats): p bounds the probability that rounding alone gives the key shifts of the "
    "layer's heads along a direction, added up over the last 1, 3 or 10 samples; 0 where no head's "
    "mean reaches a quarter of the format's floor"
)


def _residual(
    name: str,
    unit: str,
    formula: str,
    meaning: str,
    tested: str,
    source: str = _OURS,
    measure: str = "1",
) -> SignalInfo:
    return SignalInfo(
        name=name,
        family="conservation",
        unit=unit,
        healthy="low",
        watch="limit",
        formula=formula,
        source=source,
        meaning=meaning,
        measure=measure,
        tested=tested,
    )


SIGNALS = (
    _residual(
        "attention/key_shift",
        "query group",
        "mean over sequences of ‖Σ_j dK_j‖ / (Σ_j ‖dK_j‖ + α Σ_i ‖q_i‖·‖dO_i∘O_i‖) (no unit; "
        "exactly 0, because softmax ignores one vector added to all keys)",
        "Over its limit: the softmax backward is wrong, as a rule its row term rowsum(dO∘O), or a "
        "part of dK is missing.",
        _ATTENTION,
        "own derivation from the softmax Jacobian; what breaks it: arXiv 2510.04212",
    ),
    _residual(
        "attention/value_output",
        "query group",
        "mean over sequences of |⟨V, dV⟩ − ⟨O, dO⟩| / ½(Σ|V∘dV| + Σ|O∘dO|) (no unit; exactly 0, "
        "because O = P V)",
        "Over its limit: O is stored or rounded with a bias, or backward uses other probabilities "
        "than forward.",
        _ATTENTION,
    ),
    _residual(
        "attention/query_key",
        "query group",
        "mean over sequences of |⟨Q, dQ⟩ − ⟨K, dK⟩| / √(Σ(Q∘dQ)² + Σ(K∘dK)²) (no unit; exactly 0, "
        "because the loss sees Q and K through Q Kᵀ only)",
        "Over its limit: dQ and dK were not made from the same dS: a lost block, a ring or "
        "tensor-parallel error, a scale applied once.",
        _ATTENTION,
    ),
    _residual(
        "attention/key_shift_bias",
        "direction",
        _BIAS,
        "Over its limit: the key shift points the same way sample after sample. Rounding does "
        "not; a biased kernel does, even where each single sample is within its limit. Direction "
        "0: the row term is off by an offset; 1: by a share of itself, as of an O rounded one way.",
        _ATTENTION,
        "own derivation; bound after Pinelis, Ann. Probab. 22 (1994) 1679",
    ),
    _residual(
        "attention/query_key_spread",
        "query group",
        "−ln p (nats): p bounds the probability that rounding alone makes the squares of the "
        "group's query–key residuals, added up over the last 1, 3 or 10 samples, as large as they "
        "are; 0 where their root mean square is within 1.25 of the format's floors",
        "Over its limit: dQ and dK differ by more than their rounding, sequence after sequence, "
        "even where the mean of a sample is within its limit: they were made from slightly "
        "different dS.",
        _ATTENTION,
        "own derivation; Chernoff's bound for χ²",
    ),
    _residual(
        "router/shift",
        "layer",
        "Σ_t |Σ_e dz_te| / Σ_t Σ_e |dz_te| over tokens t (no unit; exactly 0, because softmax "
        "ignores one number added to all logits)",
        "Over its limit: the backward of the router's softmax is wrong, or a part of its gradient "
        "is missing.",
        _MEGATRON + ", expert parallelism",
    ),
    _residual(
        "output/vocabulary_shift",
        "layer",
        "Σ_t |Σ_v dlogit_tv| / Σ_t Σ_v |dlogit_tv| over tokens t (no unit; exactly 0, because "
        "cross-entropy ignores one number added to all logits)",
        "Over its limit: the cross-entropy kernel is wrong, or a reduction over shards of the "
        "vocabulary.",
        _MEGATRON,
    ),
    _residual(
        "norm/scale",
        "norm",
        "Σ_t |⟨x_t, dx_t⟩ − ⟨y_t − β, dy_t⟩·ε/(m_t + ε)| / Σ_t (Σ_c |x_tc dx_tc| + "
        "|⟨y_t − β, dy_t⟩|) over tokens t (no unit; exactly 0, because a norm ignores the length "
        "of its input)",
        "Over its limit: the backward of the norm lacks (part of) its projection, or uses other "
        "statistics than forward.",
        _MEGATRON,
    ),
    _residual(
        "norm/shift",
        "norm",
        "Σ_t |Σ_c dx_tc| / Σ_t Σ_c |dx_tc| over tokens t (no unit; exactly 0, because LayerNorm "
        "ignores one number added to all channels)",
        "Over its limit: the backward of LayerNorm does not take the mean off.",
        _MEGATRON,
    ),
)
