"""Attention-update signals: the spectra of what training did to the query and key weights."""

from __future__ import annotations

from .info import MDM, SignalInfo

_TESTED = (
    "Megatron-core under tensor, sequence, pipeline, data and expert parallelism, grouped queries "
    "and recompute; against dense matrices and thin QR"
)

#: matrix → (formula, unit, most directions, what it is)
_MATRICES = {
    "delta2": (
        "ΔW_q W_kᵀ + W_q ΔW_kᵀ",
        "head",
        "2 × head dimension",
        "the first-order update of the query-key product",
    ),
    "delta3": (
        "ΔW_q ΔW_kᵀ",
        "head",
        "head dimension",
        "the second-order update of the query-key product",
    ),
    "query_update": ("ΔW_q", "head", "head dimension", "the update of a head's query weights"),
    "key_update": ("ΔW_k", "query group", "head dimension", "the update of a group's key weights"),
}

#: measure → (formula, what it means when it moves)
_MEASURES = {
    "effective_rank": (
        "exp(−Σ p ln p), p_i = s_i²/Σ s_j² over the singular values s of {matrix}; Δ over W "
        "iterations (from 1 to {most})",
        "In how many directions {what} goes. It falls when updates turn coherent, step after step "
        "in the same few directions: a kernel with a biased error, or a learning rate too large.",
    ),
    "spectral_entropy": (
        "−Σ p ln p, p_i = s_i²/Σ s_j² over the singular values s of {matrix}; Δ over W iterations "
        "(nats, from 0 to ln({most}))",
        "The logarithm of the effective rank of {what}.",
    ),
    "frobenius": (
        "‖{matrix}‖_F = √Σ s²; Δ over W iterations (in the unit of the weights)",
        "The size of {what}. It grows like W where steps agree, like √W where they don't.",
    ),
    "stable_rank": (
        "‖{matrix}‖_F²/‖{matrix}‖₂²; Δ over W iterations (from 1 to {most})",
        "How much {what} is more than its strongest direction; moves later than the effective "
        "rank.",
    ),
}


def _measure(matrix: str, measure: str) -> SignalInfo:
    formula, unit, most, what = _MATRICES[matrix]
    definition, meaning = _MEASURES[measure]
    judged = (matrix, measure) == ("delta2", "effective_rank")
    return SignalInfo(
        name=f"attention/{matrix}_{measure}",
        family="weights",
        unit=unit,
        healthy="drifts" if measure == "frobenius" else "stable",
        watch="low" if judged else "record",
        formula=definition.format(matrix=formula, most=most),
        source=f"{MDM}, {'first-order attention update' if matrix == 'delta2' else 'companion'}",
        meaning=meaning.format(what=what),
        measure={"spectral_entropy": "nats", "frobenius": "weight"}.get(measure, "1"),
        tested=_TESTED,
    )


def _spike(matrix: str) -> tuple[SignalInfo, SignalInfo]:
    formula, unit, _, what = _MATRICES[matrix]
    common = {"family": "weights", "unit": unit, "watch": "record", "tested": _TESTED}
    return (
        SignalInfo(
            name=f"attention/{matrix}_spike_strength",
            healthy="drifts",
            formula=f"‖C‖_F/‖N‖_F for the leading direction of {formula} = C + N, N white noise "
            "with the median of the spectrum; 0 where no singular value is outlying",
            source="Baik, Ben Arous, Péché 2005; Benaych-Georges, Nadakuditi 2012",
            meaning=f"How strong the coherent part of {what} is against its noise. The effective "
            "rank starts to fall near 0.3. Real noise is not white, so healthy runs have spikes "
            "too: what tells is a rise over the run's own level.",
            **common,
        ),
        SignalInfo(
            name=f"attention/{matrix}_outliers",
            healthy="drifts",
            formula=f"number of singular values of {formula} beyond the edge of white noise "
            "(exceeded by one healthy white matrix in a thousand)",
            source="Johnstone 2001, Tracy–Widom edge",
            meaning=f"In how many directions {what} stands out of its noise.",
            **common,
        ),
    )


SIGNALS = (
    *(_measure(matrix, measure) for matrix in _MATRICES for measure in _MEASURES),
    *_spike("query_update"),
    *_spike("key_update"),
    SignalInfo(
        name="attention/delta2_direction_overlap",
        family="weights",
        unit="head",
        healthy="drifts",
        watch="record",
        formula="|cos| of the planes of the two leading singular vectors of ΔW_q W_kᵀ + W_q ΔW_kᵀ "
        "now and one window or more ago, no step in common; the smaller of the left and the right "
        "side (from 0 to 1; about 1.5/√hidden for random directions)",
        source="own; a biased fault pushes the same way each time, arXiv 2510.04212",
        meaning="Whether the update keeps its direction. A biased fault's does; an update of low "
        "rank need not, but what a healthy run learns for long has a lasting direction too.",
        tested=_TESTED,
    ),
    SignalInfo(
        name="attention/persistent_spike",
        family="weights",
        unit="head",
        healthy="drifts",
        watch="record",
        formula="number of comparisons in a row, without a step in common, in which ΔW_q has an "
        "outlying singular value and the direction of Δ2 overlaps with the last by 0.5 or more",
        source="own; see attention/query_update_outliers and attention/delta2_direction_overlap",
        meaning="A coherent part that stays. In white noise that is the onset of a biased fault; "
        "a small healthy training had it in nearly all heads (docs/attention_update.md), so it "
        "counts for evidence beside others and never alone.",
        tested=_TESTED,
    ),
)
