"""Attention activity: logits and entropy of the attention itself."""

from __future__ import annotations

from .info import SignalInfo

_TESTED = (
    "Megatron-core: TP 2 with sequence parallelism, EP 2, PP 2, DP 2, recompute, micro-batches; "
    "grouped queries; latent attention"
)

SIGNALS = (
    SignalInfo(
        name="attention/max_logit",
        family="activations",
        unit="head",
        healthy="drifts",
        watch="record",
        formula="mean over sequences of the largest scale · q·k of a sequence, over sampled "
        "queries and all keys they may attend to",
        source="arXiv 2309.14322; Kimi K2 clips at 100",
        meaning="Grows without bound where queries and keys feed on each other: beyond 100 others "
        "clip it, and runs beyond 1e4 diverged.",
        tested=_TESTED,
    ),
    SignalInfo(
        name="attention/entropy",
        family="activations",
        unit="head",
        healthy="drifts",
        watch="record",
        measure="nats",
        formula="mean over sequences and sampled queries of −Σ_j A_j ln A_j "
        "(nats, from 0 to ln of the keys)",
        source="arXiv 2303.06296",
        meaning="A sharp drop means that the head looks at one key only, whatever the input; "
        "training then tends to diverge.",
        tested=_TESTED,
    ),
)
