"""From a matplotlib figure to inline SVG that follows the page's light or dark theme.

matplotlib knows colours, not CSS variables. So everything is drawn in the stand-in colours of
:data:`INK`, and :func:`inline` puts ``var(--name)`` in their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from types import MappingProxyType

import matplotlib
from matplotlib.figure import Figure

#: Name of a CSS variable → the colour that stands for it while drawing.
INK: Mapping[str, str] = MappingProxyType(
    {
        name: f"#0{index:x}fe0{index:x}"
        for index, name in enumerate(
            ("text", "soft", "grid", "main", "left", "drill", "alarm", "warn", "good", "pending")
            + ("other0", "other1", "other2", "page")
        )
    }
)
#: Colours of the runs that are drawn behind; with more than these, they repeat.
OTHERS = ("other0", "other1", "other2")

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK["text"],
    "axes.labelcolor": INK["soft"],
    "axes.edgecolor": INK["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": INK["grid"],
    "ytick.color": INK["grid"],
    "xtick.labelcolor": INK["soft"],
    "ytick.labelcolor": INK["soft"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Everything drawn inside looks as the page wants it; no setting of the user's leaks in."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def inline(figure: Figure, name: str, label: str) -> str:
    """Return the figure as one ``<svg>`` element for the middle of an HTML page.

    Args:
        figure: drawn inside :func:`drawing`.
        name: unlike that of any other figure of the page; keeps their inner names apart.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Inside HTML the namespaces go without saying, and nothing may look like a resource to load.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    # Names of groups ("axes_1") come again in every figure; those that are referred to are hashes.
    text = re.sub(r' id="[a-zA-Z.0-9]+_\d+"', "", text)
    # A tenth of a unit is less than a pixel.
    text = re.sub(
        r' d="[^"]*"',
        lambda path: re.sub(r"-?\d+\.\d+", lambda x: f"{float(x[0]):.1f}", path[0]),
        text,
    )
    for variable, colour in INK.items():
        text = text.replace(colour, f"var(--{variable})")
    size = re.search(r'viewBox="[^"]*"', text)[0]
    head = f'<svg {size} role="img" aria-label="{escape(label)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    return re.sub(r"\n\s*", "\n", text).strip()
