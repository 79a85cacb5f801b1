"""Optimizer signals: sizes of the updates and spikes of the gradients, from Adam's state."""

from __future__ import annotations

from .info import SignalInfo

_TESTED = (
    "Megatron-core: TP 2 with sequence parallelism, EP 2, PP 2, DP 2 with and without the "
    "distributed optimizer, fp32 and bf16, recompute, micro-batches. DeepSpeed: ZeRO 0 to 3 in "
    "fp32, bf16 and fp16, expert parallelism, gradient accumulation"
)

SIGNALS = (
    SignalInfo(
        name="optimizer/update_weight_ratio",
        family="weights",
        unit="layer",
        healthy="drifts",
        watch="record",
        formula="RMS(θ_t − θ_{t−1}) / RMS(θ_t) over all parameters of the layer, one step",
        source="common; about 1e-3 in healthy runs",
        meaning="A step far larger than usual for the size of the weights: the learning rate is "
        "too high, or a gradient broke through.",
        tested=_TESTED,
    ),
    SignalInfo(
        name="optimizer/adam_update_rms",
        family="weights",
        unit="layer",
        healthy="stable",
        watch="record",
        formula="RMS(m̂ / (√v̂ + ε)) over all parameters of the layer, bias-corrected; "
        "√((1 − β1)/(1 + β1)) = 0.229 for pure noise at β1 = 0.9, 1 for pure signal",
        source="kexue.fm 11267",
        meaning="Rises when gradients point the same way step after step, as a biased kernel's do, "
        "or when they suddenly grow over their history.",
        tested=_TESTED,
    ),
    SignalInfo(
        name="optimizer/gradient_spike_share",
        family="weights",
        unit="layer",
        healthy="low",
        watch="record",
        formula="share of elements with g² > 5000 v̂ of the step before (from 0 to 1)",
        source="SPAM, arXiv 2501.06842",
        meaning="Gradients a thousand times over their history: they move m for many steps after.",
        tested=_TESTED,
    ),
)
