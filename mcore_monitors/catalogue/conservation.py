"""Conservation residuals: exact identities of the backward pass."""

from __future__ import annotations

from .info import SignalInfo

SIGNALS = (
    SignalInfo(
        name="attention/key_shift",
        family="conservation",
        unit="query group",
        healthy="low",
        watch="limit",
        formula="mean over sequences of ‖Σ_j dK_j‖ / Σ_j ‖dK_j‖ (no unit; exactly 0 in "
        "exact arithmetic, because softmax ignores one vector added to all keys)",
        source="own derivation from the softmax Jacobian; what breaks it: arXiv 2510.04212",
    ),
)
