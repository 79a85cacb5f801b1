"""From conservation residuals to the site that lies: which identity broke, where, and what of it.

A fault in one layer changes the gradients of all layers below, but an identity breaks only where a
kernel computes something else than its forward pass says: so each site is judged by itself, and the
identities that hold at it say as much as those that don't.

A pure function of sizes, which are residuals over their limits. Imports neither torch nor a host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, BIASES, EVIDENCE, NORMS

#: residual → layer → one size a unit: the residual over its limit; NaN where it was not measured
Sizes = Mapping[str, Mapping[int, Sequence[float]]]

_KEY, _VALUE, _QUERY = ATTENTION_RESIDUALS
_KEY_BIAS, _QUERY_SPREAD = EVIDENCE
#: (what is broken, what holds) of each residual, in symbols
_SYMBOLS = {
    _KEY: ("Σ_j dK_j ≠ 0", "Σ_j dK_j = 0"),
    _VALUE: ("⟨V, dV⟩ ≠ ⟨O, dO⟩", "⟨V, dV⟩ = ⟨O, dO⟩"),
    _QUERY: ("⟨Q, dQ⟩ ≠ ⟨K, dK⟩", "⟨Q, dQ⟩ = ⟨K, dK⟩"),
    "router/shift": ("Σ_e dz_e ≠ 0", ""),
    "output/vocabulary_shift": ("Σ_v dlogit_v ≠ 0", ""),
    "norm/scale": ("⟨x, dx⟩ ≠ 0", "⟨x, dx⟩ = 0"),
    "norm/shift": ("Σ_c dx_c ≠ 0", "Σ_c dx_c = 0"),
}
#: broken attention identities → (pass, what is wrong)
_ATTENTION = {
    frozenset({_KEY}): (
        "backward",
        "the row term rowsum(dO∘O) of the softmax backward is wrong (biased, rounded, or of "
        "another call)",
    ),
    frozenset({_VALUE}): (
        "forward or backward",
        "the stored O is not P·V, or dV is not Pᵀ·dO (O rounded with a bias, or PV and its "
        "backward disagree)",
    ),
    frozenset({_QUERY}): (
        "backward",
        "dQ and dK were not made from the same dS (a block left out of dQ, a ring or "
        "tensor-parallel error, or a scale applied to one of them only)",
    ),
    frozenset({_KEY, _VALUE}): (
        "forward or backward",
        "the backward pass does not use the O or the probabilities of the forward pass (O rounded "
        "with a bias, or softmax scale or log-sum-exp differ)",
    ),
    frozenset({_KEY, _QUERY}): (
        "backward",
        "dK is wrong (a block of keys or queries left out of it, or made from another S than dQ)",
    ),
    frozenset({_VALUE, _QUERY}): (
        "backward",
        "two of dQ, dK and dV are wrong (blocks left out, or tensors of different calls)",
    ),
    frozenset({_KEY, _VALUE, _QUERY}): (
        "forward or backward",
        "no gradient of this kernel agrees with its forward pass",
    ),
}
#: how a residual is broken of which no single sample is over the limit
_HIDDEN = {
    _KEY: "on average, a bias below the limit of a single sample",
    _QUERY: "by more than rounding leaves, though within the limit of a single sample",
}
#: what the direction of a biased key shift says
_BIASED = {
    "offset": "the row term rowsum(dO∘O) of the softmax backward is biased by an offset",
    "share": "the row term rowsum(dO∘O) of the softmax backward is off by a share of itself, as of "
    "an O that is rounded one way or has lost low bits",
}
_OTHER = {
    "router/shift": (
        "router",
        "the gradient of the router's softmax is wrong (an expert's column lost, or another "
        "softmax than in the forward pass)",
    ),
    "output/vocabulary_shift": (
        "output layer",
        "the cross-entropy backward is wrong, or a shard of the vocabulary is missing from a "
        "reduction",
    ),
}
_NORM = {
    frozenset({"norm/scale"}): "lacks (part of) its projection term, or uses other statistics than "
    "the forward pass",
    frozenset({"norm/shift"}): "does not take the mean off",
    frozenset({"norm/scale", "norm/shift"}): "lacks its projection and mean terms",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where identities are broken in one way."""

    layers: tuple[int, ...]
    place: str
    """``attention``, ``router``, ``output layer`` or ``… norm``."""
    units: tuple[int, ...]
    """Query groups of an attention; empty where all of them, or where there is one value."""
    broken: tuple[str, ...]
    holding: tuple[str, ...]
    """Identities that were measured at the site and hold."""
    size: float
    """The largest broken residual over its limit."""
    hidden: bool
    """Whether single samples stay within the limit, and only several together give it away."""
    where: str
    """``forward``, ``backward`` or ``forward or backward``."""
    fault: str
    """What is wrong, in words."""

    @property
    def sentence(self) -> str:
        """One sentence that a kernel engineer can act on."""
        place = f"{'layer' if len(self.layers) == 1 else 'layers'} {ranges(self.layers)}"
        if self.units:
            place += f", query group{'s' if len(self.units) > 1 else ''} {ranges(self.units)}"
        if self.place == "output layer":
            place = self.place
        elif self.place != "attention" or not self.units:
            place += f", {self.place}"
        symbols = " and ".join(_SYMBOLS[name][0] for name in self.broken)
        if self.hidden:
            text = f"{place}: {symbols} {_HIDDEN[self.broken[0]]}"
        else:
            text = f"{place}: {symbols} at {self.size:.3g} times the limit of the number format"
        if self.holding:
            text += ", while " + " and ".join(_SYMBOLS[name][1] for name in self.holding)
        return f"{text}: {self.where} pass, {self.fault}"


def localise(sizes: Sizes) -> list[Site]:
    """Return the sites that lie, the worst first; empty where every identity holds."""
    sites = _together([*_attention_sites(sizes), *_norm_sites(sizes), *_other_sites(sizes)])
    return sorted(sites, key=lambda site: (-site.size, site.layers))


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in few words: ``0–3, 5``."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _size(sizes: Sizes, signal: str, layer: int, unit: int) -> float:
    values = sizes.get(signal, {}).get(layer, ())
    return values[unit] if unit < len(values) else math.nan


def _layers(sizes: Sizes, signals: Iterable[str]) -> list[int]:
    return sorted({layer for signal in signals for layer in sizes.get(signal, {})})


def _attention_sites(sizes: Sizes) -> Iterable[Site]:
    for layer in _layers(sizes, [*ATTENTION_RESIDUALS, *EVIDENCE]):
        bias = [_size(sizes, _KEY_BIAS, layer, i) for i in range(len(BIASES))]
        units = (*ATTENTION_RESIDUALS, _QUERY_SPREAD)
        count = max(len(sizes.get(s, {}).get(layer, ())) for s in units)
        patterns: dict[tuple[frozenset[str], frozenset[str], bool], list[int]] = {}
        for unit in range(count):
            at = {s: _size(sizes, s, layer, unit) for s in ATTENTION_RESIDUALS}
            broken = frozenset(s for s, x in at.items() if x > 1)
            holding = frozenset(s for s, x in at.items() if x <= 1)
            hidden = not broken
            if _size(sizes, _QUERY_SPREAD, layer, unit) > 1:
                broken, holding = broken | {_QUERY}, holding - {_QUERY}
            patterns.setdefault((broken, holding, hidden), []).append(unit)
        for (broken, holding, hidden), units in patterns.items():
            if broken:
                signals = [_QUERY_SPREAD] if hidden else broken
                found = [_size(sizes, s, layer, u) for s in signals for u in units]
                yield _attention_site(
                    layer,
                    broken,
                    holding,
                    () if len(units) == count else tuple(units),
                    max(x for x in found if x == x),
                    bias,
                    hidden=hidden,
                )
        if all(_KEY not in broken for broken, *_ in patterns) and any(x > 1 for x in bias):
            held = {s for _, holding, _ in patterns for s in holding} - {_KEY}
            size = max(x for x in bias if x > 1)
            yield _attention_site(layer, frozenset({_KEY}), held, (), size, bias, hidden=True)


def _attention_site(
    layer: int,
    broken: frozenset[str],
    holding: Iterable[str],
    units: tuple[int, ...],
    size: float,
    bias: Sequence[float],
    *,
    hidden: bool = False,
) -> Site:
    where, fault = _ATTENTION[broken]
    if broken == {_KEY} and any(x > 1 for x in bias):
        fault = _BIASED[BIASES[max(range(len(bias)), key=lambda i: bias[i])]]
    return Site(
        layers=(layer,),
        place="attention",
        units=units,
        broken=tuple(s for s in ATTENTION_RESIDUALS if s in broken),
        holding=tuple(s for s in ATTENTION_RESIDUALS if s in holding),
        size=size,
        hidden=hidden,
        where=where,
        fault=fault,
    )


def _norm_sites(sizes: Sizes) -> Iterable[Site]:
    signals = ("norm/scale", "norm/shift")
    for layer in _layers(sizes, signals):
        for unit, name in enumerate(NORMS):
            at = {s: _size(sizes, s, layer, unit) for s in signals}
            broken = tuple(s for s, x in at.items() if x > 1)
            if broken:
                yield Site(
                    layers=(layer,),
                    place=f"{name} norm",
                    units=(),
                    broken=broken,
                    holding=tuple(s for s, x in at.items() if x <= 1),
                    size=max(at[s] for s in broken),
                    hidden=False,
                    where="backward",
                    fault=f"the norm's backward {_NORM[frozenset(broken)]}",
                )


def _other_sites(sizes: Sizes) -> Iterable[Site]:
    for signal, (place, fault) in _OTHER.items():
        for layer in _layers(sizes, [signal]):
            size = _size(sizes, signal, layer, 0)
            if size > 1:
                yield Site(
                    layers=(layer,),
                    place=place,
                    units=(),
                    broken=(signal,),
                    holding=(),
                    size=size,
                    hidden=False,
                    where="backward",
                    fault=fault,
                )


def _together(sites: Iterable[Site]) -> list[Site]:
    """One site for all layers that are broken in the same way at the same place."""
    alike: dict[tuple, list[Site]] = {}
    for site in sites:
        key = (site.place, site.units, site.broken, site.holding, site.hidden)
        alike.setdefault(key, []).append(site)
    return [
        Site(
            layers=tuple(sorted({layer for site in group for layer in site.layers})),
            place=group[0].place,
            units=group[0].units,
            broken=group[0].broken,
            holding=group[0].holding,
            size=max(site.size for site in group),
            hidden=group[0].hidden,
            where=group[0].where,
            fault=group[0].fault,
        )
        for group in alike.values()
    ]
