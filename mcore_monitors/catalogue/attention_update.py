"""Attention-update signals: the spectra of what training did to the query and key weights."""

from __future__ import annotations

from .info import MDM, SignalInfo

SIGNALS = (
    SignalInfo(
        name="attention/delta2_effective_rank",
        family="weights",
        unit="head",
        healthy="stable",
        watch="low",
        formula="exp(−Σ p ln p), p_i = s_i²/Σ s_j² over the singular values s of "
        "ΔW_q W_kᵀ + W_q ΔW_kᵀ; Δ over W iterations (from 1 to 2 × head dimension)",
        source=f"{MDM}, first-order attention update",
    ),
)
