"""Residual Koopman profile: what a layer does to its residual stream, as eigenvalues."""

from __future__ import annotations

from .info import SignalInfo

_RKSP = "arXiv 2602.22988 (RKSP)"
_TESTED = (
    "Megatron-core: TP 2 with sequence parallelism, EP 2, PP 2, DP 2, recompute, micro-batches; "
    "DeepSpeed and Hugging Face models: one layout"
)


def _signal(
    name: str, formula: str, meaning: str, *, unit: str = "layer", source: str = _RKSP
) -> SignalInfo:
    return SignalInfo(
        name=f"koopman/{name}",
        family="activations",
        unit=unit,
        healthy="drifts",
        watch="record",
        formula=formula,
        source=source,
        meaning=meaning,
        tested=_TESTED,
    )


SIGNALS = (
    _signal(
        "near_unit",
        "share of the modes λ of A with 0.90 ≤ |λ| ≤ 1.05; A = argmin ‖Ỹ − A X̃‖, X̃ and Ỹ the "
        "stream before and after the layer, whitened by X",
        "Near 1 the layer passes its input on; the paper calls a mass above 0.5 at initialization "
        "a high risk, which healthy Post-LN models break.",
    ),
    _signal(
        "super_unit",
        "share of the modes with |λ| > 1.05",
        "Directions that the layer makes larger: many of them, layer after layer, let the stream "
        "grow.",
    ),
    _signal(
        "sub_unit",
        "share of the modes with |λ| < 0.80",
        "Directions that the layer forgets.",
    ),
    _signal(
        "spectral_radius",
        "largest |λ|",
        "The strongest growth of one direction by this layer.",
    ),
    _signal(
        "condition",
        "κ(V), V the eigenvectors of A",
        "How far the eigenvalues can be trusted: large where modes nearly coincide, missing where "
        "A has no basis of eigenvectors.",
    ),
    _signal(
        "kreiss",
        "lower bound of sup over |z| > 1 of (|z| − 1) ‖(zI − A)⁻¹‖, with A over its spectral "
        "radius where that is above 1",
        "How far powers of A grow on their way although their eigenvalues do not say so.",
    ),
    _signal(
        "nonlinearity",
        "‖Ỹ − A X̃‖ / ‖Ỹ − X̃‖",
        "Share of what the layer adds that no linear map explains; missing where it adds nothing.",
    ),
    _signal(
        "eigenvalue_real",
        "Re λ, modes by falling |λ|",
        "The spectrum itself, for a picture beside the unit circle.",
        unit="mode",
    ),
    _signal(
        "eigenvalue_imaginary",
        "Im λ, modes by falling |λ|",
        "As above.",
        unit="mode",
    ),
    _signal(
        "mode_residual",
        "‖uᴴ(Ỹ − λ X̃)‖ / ‖uᴴ X̃‖, u the left eigenvector of the mode",
        "How badly the tokens obey this mode; the paper's filter leaves out what is above 0.1.",
        unit="mode",
    ),
    _signal(
        "tokens",
        "number of tokens that the profile saw",
        "Fewer than the hidden size leave directions that nothing is known of.",
        source="ours",
    ),
)
