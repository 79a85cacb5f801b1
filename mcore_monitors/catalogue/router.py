"""Router signals: geometry of the expert rows, entropy and load of the choice."""

from __future__ import annotations

from .info import MDM, SignalInfo

SIGNALS = (
    SignalInfo(
        name="router/weight_similarity",
        family="weights",
        unit="layer",
        healthy="drifts",
        watch="both",
        formula="mean over expert pairs i ≠ j of cos(w_i, w_j), w the router's rows "
        "(from −1/(E − 1) to 1)",
        source=f"{MDM}, equation 7",
    ),
    SignalInfo(
        name="router/centred_conditioning",
        family="weights",
        unit="layer",
        healthy="drifts",
        watch="both",
        formula="max_i ‖w_i − w̄‖ / ‖w̄‖; small means that the common mode dominates",
        source=MDM,
    ),
    SignalInfo(
        name="router/routing_entropy",
        family="activations",
        unit="layer",
        healthy="drifts",
        watch="both",
        formula="mean over tokens of −Σ_e p_e ln p_e, p over all experts before top-k "
        "(nats, from 0 to ln E)",
        source=f"{MDM}, equation 8",
    ),
    SignalInfo(
        name="router/routing_entropy_normalised",
        family="activations",
        unit="layer",
        healthy="drifts",
        watch="both",
        formula="routing entropy divided by ln E (from 0 to 1)",
        source=f"{MDM}, equation 8",
    ),
)
