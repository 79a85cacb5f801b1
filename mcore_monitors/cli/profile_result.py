"""What a profile found: a table, a risk, a picture, the same for machines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from mcore_monitors.cli.columns import print_columns
from mcore_monitors.sinks.wording import number

#: Features in the order of the table, with their heads.
FEATURES = {
    "near_unit": "M≈1",
    "super_unit": "M>1",
    "sub_unit": "M<1",
    "spectral_radius": "ρ",
    "condition": "κ(V)",
    "kreiss": "Kreiss",
    "nonlinearity": "η",
}
#: All eigenvalues nearer to one than this: the layer is an identity for the profile's eyes.
_IDENTITY = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer. Features are NaN where the layer's states were not finite."""

    layer: int
    tokens: int
    features: dict[str, float]
    eigenvalues: list[complex]

    @property
    def finite(self) -> bool:
        """Whether the layer's states were."""
        return math.isfinite(self.features["near_unit"])

    @property
    def note(self) -> str:
        """What to know before trusting the numbers; empty where there is nothing."""
        if not self.finite:
            return "its states are not finite: no profile"
        notes = []
        if math.isnan(self.features["nonlinearity"]):
            notes.append("adds nothing")
        elif all(abs(value - 1) < _IDENTITY for value in self.eigenvalues):
            notes.append("passes its input on: κ(V) and Kreiss say little")
        if not math.isfinite(self.features["condition"]):
            notes.append("no basis of eigenvectors (defective)")
        return ", ".join(notes)


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A whole model."""

    layers: list[LayerProfile]
    width: int
    learning_rate: float | None
    versions: dict[str, str]
    left_out: list[str] = field(default_factory=list)

    @property
    def modes(self) -> int:
        """How many modes of each layer."""
        return max(len(layer.eigenvalues) for layer in self.layers)

    def summary(self) -> dict[str, float]:
        """Each feature's mean, largest, smallest and standard deviation over the layers."""
        found = {}
        for name in FEATURES:
            values = [layer.features[name] for layer in self.layers]
            finite = all(map(math.isfinite, values))
            # max() and min() pass over NaN as it happens to stand
            found |= {
                f"{name}_mean": statistics.fmean(values),
                f"{name}_max": math.nan if any(map(math.isnan, values)) else max(values),
                f"{name}_min": math.nan if any(map(math.isnan, values)) else min(values),
                f"{name}_std": statistics.pstdev(values) if finite else math.nan,
            }
        return found


def from_signals(
    signals: Mapping[str, Mapping[int, list[float]]],
    *,
    width: int,
    learning_rate: float | None,
    versions: dict[str, str],
    left_out: list[str],
) -> Profiled | None:
    """The profile out of a sample's ``koopman/`` signals; None where there are none."""
    layers = []
    for layer, (near,) in sorted(signals.get("koopman/near_unit", {}).items()):
        features = {name: signals[f"koopman/{name}"][layer][0] for name in FEATURES}
        if math.isfinite(near) and math.isnan(features["condition"]):
            features["condition"] = math.inf  # history keeps no infinities
        real = signals["koopman/eigenvalue_real"][layer]
        imaginary = signals["koopman/eigenvalue_imaginary"][layer]
        layers.append(
            LayerProfile(
                layer=layer,
                tokens=round(signals["koopman/tokens"][layer][0]),
                features=features,
                eigenvalues=[complex(*z) for z in zip(real, imaginary, strict=True)],
            )
        )
    if not layers:
        return None
    return Profiled(
        layers=layers,
        width=width,
        learning_rate=learning_rate,
        versions=versions,
        left_out=left_out,
    )


def risk_of(found: Profiled) -> dict[str, Any] | str:
    """The calibrated risk of divergence, or why there is none."""
    from mcore_monitors.signals.koopman_risk import divergence_risk

    if found.learning_rate is None or not found.learning_rate > 0:
        return "the learning rate is not known; give --lr"
    if not all(layer.finite for layer in found.layers):
        return "a layer has no profile"
    risk = divergence_risk(found.summary(), found.learning_rate)
    outside = list(risk.outside)
    if found.modes < found.width:
        outside.append(
            f"the profile has {found.modes} of {found.width} modes, the study had all of them "
            "(--rank full)"
        )
    return {
        "probability": risk.probability,
        "low": risk.low,
        "high": risk.high,
        "learning_rate": found.learning_rate,
        "calibrated_on": risk.calibrated_on,
        "outside": outside,
    }


def print_profile(found: Profiled, risk: dict[str, Any] | str, out: IO[str]) -> None:
    """Print a line a layer, what the whole model gives, and the risk."""
    lines = [("layer", *FEATURES.values(), "")]
    for layer in found.layers:
        cells = ["∞" if v == math.inf else number(v) for v in layer.features.values()]
        lines.append((str(layer.layer), *cells, layer.note))
    summary = found.summary()
    for what in ("mean", "max", "min"):
        cells = [summary[f"{name}_{what}"] for name in FEATURES]
        lines.append((what, *("∞" if v == math.inf else number(v) for v in cells), ""))
    print_columns(lines, out, left=(len(FEATURES) + 1,))
    tokens = min(layer.tokens for layer in found.layers)
    which = "all" if found.modes == found.width else f"{found.modes} of"
    print(f"\n{which} {found.width} modes a layer, {tokens} tokens", file=out)
    if tokens <= found.width:
        print(
            f"WARNING: {tokens} tokens span fewer than the {found.width} directions of the stream; "
            "what nothing is known of counts as modes of size 0. Profile a larger batch.",
            file=out,
        )
    for sentence in found.left_out:
        print(f"left out: {sentence}.", file=out)
    _print_risk(risk, out)


def _print_risk(risk: dict[str, Any] | str, out: IO[str]) -> None:
    if isinstance(risk, str):
        print(f"risk: not computed, {risk}", file=out)
        return
    if not math.isfinite(risk["probability"]):
        print("risk: not computed, a feature is not finite", file=out)
        return
    percent = [f"{100 * risk[k]:.3g}%" for k in ("probability", "low", "high")]
    print(
        f"risk of divergence at learning rate {risk['learning_rate']:g}: {percent[0]} "
        f"(95% interval {percent[1]} to {percent[2]})",
        file=out,
    )
    print(f"calibrated on: {risk['calibrated_on']}", file=out)
    for sentence in risk["outside"]:
        print(f"OUTSIDE THE CALIBRATED RANGE: {sentence}", file=out)
    if risk["outside"]:
        print("The number above is an extrapolation.", file=out)


def _plain(value: Any) -> Any:
    """JSON has no infinities: they become ``"inf"``, NaN null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [_plain(value.real), _plain(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def to_json(found: Profiled, risk: dict[str, Any] | str, seconds: float) -> dict[str, Any]:
    """The result for machines."""
    rows = [vars(layer) | {"note": layer.note} for layer in found.layers]
    return _plain(
        {
            "seconds": round(seconds, 1),
            "hidden_size": found.width,
            "modes": found.modes,
            "layers": rows,
            "summary": found.summary(),
            "risk": risk if isinstance(risk, dict) else None,
            "no_risk_because": risk if isinstance(risk, str) else None,
            "versions": found.versions,
            "left_out": found.left_out,
        }
    )
