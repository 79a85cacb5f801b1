"""Router signals: geometry of the expert rows, entropy, margin and load of the choice."""

from __future__ import annotations

from typing import Any

from .info import MDM, SignalInfo

_MEGATRON = (
    "Megatron-core: TP 2 with sequence parallelism, EP 2, TP 2 × EP 2, EP 2 × expert TP 2, "
    "PP 2 × EP 2, CP 2 × EP 2, data parallel, full and selective recompute, 4 micro-batches; "
    "softmax, sigmoid with expert bias, group-limited, padding mask"
)
_TESTED = (
    f"{_MEGATRON}. DeepSpeed: its own MoE under ZeRO 0 to 2 × EP 1 and 2, Hugging Face's under "
    "ZeRO 0 to 3 and with expert parallelism; gradient accumulation 1 and 4"
)


def _signal(name: str, *, family: str = "activations", **about: Any) -> SignalInfo:
    settings = {"unit": "layer", "watch": "record", "tested": _TESTED}
    return SignalInfo(name=f"router/{name}", family=family, **settings | about)


def _quantiles_of_entropy() -> list[SignalInfo]:
    """5%, 50% and 95% quantile over tokens, raw and over ln E."""
    bound = "from counts at fixed edges; error at value v of ln E at most √(1 − v)/32"
    told = {
        "q05": "The most decided tokens. Falls first when a part of the tokens collapses on few "
        "experts while the mean still looks fine.",
        "q50": "The typical token. Leaves the mean when the tokens split into decided and "
        "undecided ones.",
        "q95": "The least decided tokens. Falling says that no undecided token is left; at ln E "
        "with a falling mean, that some tokens are not touched by a collapse.",
    }
    return [
        _signal(
            f"routing_entropy{kind}_{suffix}",
            healthy="drifts",
            measure="1" if kind else "nats",
            formula=f"{int(suffix[1:])}% quantile over tokens of the routing entropy{over} "
            f"({unit}; {bound})",
            source="own; a distribution shows what a mean hides",
            meaning=meaning,
        )
        for kind, over, unit in (
            ("", "", "nats, from 0 to ln E"),
            ("_normalised", " divided by ln E", "from 0 to 1"),
        )
        for suffix, meaning in told.items()
    ]


SIGNALS = (
    _signal(
        "weight_similarity",
        family="weights",
        healthy="drifts",
        watch="both",
        formula="mean over expert pairs i ≠ j of cos(w_i, w_j), w the router's rows "
        "(from −1/(E − 1) to 1)",
        source=f"{MDM}, equation 7",
        meaning="Rising: the experts' rows turn into one direction, and the router can no longer "
        "tell tokens apart by it. Read it with centred_conditioning: softmax ignores what all rows "
        "share.",
    ),
    _signal(
        "centred_conditioning",
        family="weights",
        healthy="drifts",
        watch="both",
        formula="max_i ‖w_i − w̄‖ / ‖w̄‖; small means that the common mode dominates",
        source=MDM,
        meaning="Falling: what tells the experts apart is small beside what they share, so "
        "rounding and a common drift decide more.",
    ),
    _signal(
        "row_norm_spread",
        family="weights",
        healthy="drifts",
        formula="std_i ‖w_i‖ / mean_i ‖w_i‖ (from 0 to √(E − 1))",
        source="own",
        meaning="Rising: some experts win by the length of their row, for every token, and not by "
        "its direction.",
    ),
    _signal(
        "routing_entropy",
        healthy="drifts",
        measure="nats",
        watch="both",
        formula="mean over tokens of −Σ_e p_e ln p_e, p over all experts before top-k, without the "
        "expert bias; softmax, or σ(z)/Σσ(z) (nats, from 0 to ln E)",
        source=f"{MDM}, equation 8",
        meaning="Falling fast: stable winners reinforce themselves (learning rate too high, "
        "auxiliary loss off). At ln E: the router does not choose at all.",
    ),
    _signal(
        "routing_entropy_normalised",
        healthy="drifts",
        watch="both",
        formula="routing entropy divided by ln E (from 0 to 1)",
        source=f"{MDM}, equation 8",
        meaning="As routing_entropy, comparable between models with unlike numbers of experts.",
    ),
    *_quantiles_of_entropy(),
    _signal(
        "predicted_entropy",
        healthy="drifts",
        measure="nats",
        formula="ln E − tr(W_c M W_cᵀ)/(2E), W_c the centred rows, M = mean of x xᵀ; computed as "
        "the mean over tokens of ln E − ‖z − z̄‖²/(2E), z the logits (sigmoid: ln σ(z)), which is "
        "the same number (nats, without a lower bound)",
        source="own derivation, second order around uniform routing",
        meaning="What the size of the centred logits alone lets one expect. Falling with "
        "routing_entropy: the weights or the inputs grow.",
    ),
    _signal(
        "prediction_gap",
        healthy="drifts",
        measure="nats",
        formula="routing entropy − predicted entropy (nats)",
        source="own",
        meaning="Near zero: routing is close to uniform, and size tells all. Large: few experts "
        "stand out, or the logits have heavy tails; size alone does not explain the entropy.",
    ),
    _signal(
        "mixing_entropy",
        healthy="drifts",
        measure="nats",
        formula="mean over tokens of −Σ_c q_c ln q_c over the chosen experts, q_c = p_c/Σ p "
        "(nats, from 0 to ln k); expert bias and group limits enter by what is chosen",
        source="own",
        meaning="Falling to 0: one of the chosen experts does all the work, the others are paid "
        "for and not used.",
    ),
    _signal(
        "topk_margin",
        healthy="drifts",
        formula="mean over tokens of the k-th minus the (k+1)-th score among the experts that may "
        "be chosen; softmax: probabilities, sigmoid: σ(z) + bias",
        source="own",
        meaning="Falling: choices hang on small differences, so rounding and a small update send "
        "many tokens elsewhere.",
    ),
    _signal(
        "topk_margin_q05",
        healthy="drifts",
        formula="5% quantile over tokens of that margin (from counts at fixed edges; error at most "
        "23% of the value, 2e-6 below 1e-6)",
        source="own",
        meaning="The least certain choices: what a number format with this resolution would decide "
        "by its rounding.",
    ),
    _signal(
        "load_max_violation",
        healthy="drifts",
        formula="MaxVio = (largest load − mean load)/mean load (from 0 to E − 1); load: how often "
        "an expert was chosen, before tokens over a capacity are dropped; experts that tie exactly "
        "for a place share it",
        source="arXiv 2408.15664",
        meaning="Rising: one expert is overrun; under a capacity its tokens are dropped, without "
        "one its rank makes the others wait.",
    ),
    _signal(
        "effective_experts",
        healthy="drifts",
        measure="experts",
        formula="exp(−Σ_e f_e ln f_e), f the experts' shares of the load (from 1 to E)",
        source="own; exponential of the load's entropy",
        meaning="Falling: capacity of the model goes unused.",
    ),
    _signal(
        "dead_experts",
        healthy="low",
        formula="share of the experts with no token at all since the sample before",
        source="common",
        meaning="An expert without tokens gets no gradient and does not come back by itself.",
    ),
    _signal(
        "underused_experts",
        healthy="low",
        formula="share of the experts with less than a tenth of the mean load; dead ones count",
        source="own",
        meaning="Rising: experts are about to die.",
    ),
    _signal(
        "largest_share",
        healthy="drifts",
        formula="share of all choices that fell on the most loaded expert (from 1/E to 1)",
        source="own",
        meaning="Rising with largest_share_held: one expert takes over.",
    ),
    _signal(
        "largest_share_held",
        healthy="drifts",
        measure="samples",
        formula="samples with a load on end for which the same expert has had the largest (from 1; "
        "starts anew on resume)",
        source="own; a stable winner in the sense of " + MDM,
        meaning="Balanced routers change their most loaded expert now and then. Long runs with a "
        "rising largest_share are the reinforcement of a stable winner.",
    ),
    _signal(
        "z",
        healthy="drifts",
        measure="nats²",
        formula="mean over tokens of ln²(Σ_e exp z_e), z the logits",
        source="ST-MoE, arXiv 2202.08906, equation 5",
        meaning="Rising: logits grow, and their rounding errors with them; a z-loss holds it.",
    ),
    _signal(
        "bias_agreement",
        healthy="drifts",
        formula="share of the choices that the scores without the expert bias would have made, too "
        "(from 0 to 1); for other rules (Sinkhorn, quantile balancing, noise): share that the "
        "scores alone would have made",
        source="own",
        tested=_MEGATRON,
        meaning="Falling: balancing overrules the router ever more often; the scores say one thing "
        "and the choice another.",
    ),
)
