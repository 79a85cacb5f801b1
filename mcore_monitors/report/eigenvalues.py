"""The eigenvalues of every layer beside the unit circle, as one SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Annulus, Circle

#: Moduli between which a mode is near-unit, as in :mod:`mcore_monitors.signals.koopman`.
_NEAR = (0.90, 1.05)
_COLOURS = {"near": "#2f6fb0", "over": "#c0392b", "under": "#7f8c8d"}
#: What lies further out is drawn on the border, as a triangle.
_REACH = 1.6
_COLUMNS = 6


def draw(layers: Mapping[int, Sequence[complex]], title: str, path: Path) -> None:
    """Write one small picture a layer.

    Args:
        layers: layer number to its eigenvalues; a layer without any is drawn empty.
        title: a line above all.
        path: of the file; its ending says the format.
    """
    columns = min(_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "k"})
        figure = Figure(figsize=(max(4.6, 1.9 * columns), 2.05 * rows + 0.75), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for place, (layer, values) in zip(axes, layers.items(), strict=False):
            _draw_layer(place, layer, values)
        for place in axes[len(layers) :]:
            place.set_axis_off()
        figure.suptitle(title, fontsize=10)
        figure.supxlabel(
            "blue: near-unit, 0.90 ≤ |λ| ≤ 1.05; red: larger; grey: smaller; triangle: |λ| > 1.6",
            fontsize=8,
        )
        figure.savefig(path, metadata={"Date": None})


def _draw_layer(place: matplotlib.axes.Axes, layer: int, values: Sequence[complex]) -> None:
    inner, outer = _NEAR
    place.add_patch(Annulus((0, 0), outer, outer - inner, color="#2f6fb0", alpha=0.12, lw=0))
    place.add_patch(Circle((0, 0), 1.0, fill=False, color="#888888", lw=0.6))
    groups = {
        "near": [z for z in values if inner <= abs(z) <= outer],
        "over": [z for z in values if outer < abs(z) <= _REACH],
        "under": [z for z in values if abs(z) < inner],
    }
    for name, group in groups.items():
        place.scatter(
            [z.real for z in group], [z.imag for z in group], s=7, lw=0, alpha=0.8,
            color=_COLOURS[name],
        )  # fmt: skip
    far = [_REACH * z / abs(z) for z in values if abs(z) > _REACH]
    place.scatter([z.real for z in far], [z.imag for z in far], s=12, marker="^", lw=0,
                  color=_COLOURS["over"])  # fmt: skip
    limit = 1.08 * _REACH
    place.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    place.set_title(f"layer {layer}" if len(values) else f"layer {layer}: not finite", fontsize=9)
    for spine in place.spines.values():
        spine.set_color("#dddddd")
