"""Write the catalogue of signals as a page.

    python -m mcore_monitors.catalogue.document > docs/signals.md
"""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase

from . import SIGNALS
from .info import SignalInfo

COMMAND = "python -m mcore_monitors.catalogue.document > docs/signals.md"

_HEAD = f"""# Signals

Every signal that mcore-monitors records, by family. This page is generated from the code
(`mcore_monitors/catalogue`); after a change there run

    {COMMAND}

*unit* is that of the number (1: a ratio, a share, a count or another pure number), *per* what one
value of a layer stands for. *healthy* is the course in a healthy run: **stable** keeps its level,
**drifts** moves slowly with the training, **low** stays near zero or at the round-off floor.
*judged* says what raises an alarm: passing a **limit** set by the number format, or leaving its own
recent **band** (to which side); **–** is written and shown and raises none. Signals over windows
carry the window in their name, `attention/delta2_effective_rank@50`. Letters under *tested* stand
for the hosts and layouts below each table.

Rhythm: what is judged is told at every sample (a window at its own grid; residuals of one place after
the other, and at every sample of a dubious one, [conservation.md](conservation.md)). What is not
judged is told at some of them, to keep the cost small: of `router/` all but the weights' three and the mean
entropy, and `attention/max_logit` and `entropy`, at every tenth sample, the first one included;
`optimizer/` layer by layer in turn, each at every fortieth. `monitors.*.every` sets it
([files.md](files.md)); 1 is at every sample.
"""

#: family to title and what all of its signals have in common
_FAMILIES = {
    "conservation": (
        "Conservation residuals",
        "Exact identities of the backward pass: zero for a right kernel, whatever data, weights or "
        "learning rate.",
    ),
    "weights": (
        "From the weights",
        "Read at the sample; nothing is hooked, so CUDA graphs and fused kernels change nothing.",
    ),
    "activations": (
        "From the activations",
        "Taken in during training's own forward passes: each token once under recompute, padding "
        "and evaluation left out.",
    ),
}
_JUDGED = {
    "limit": "limit",
    "low": "band, fall",
    "high": "band, rise",
    "both": "band, both sides",
    "record": "–",
}
_COLUMNS = ("signal", "formula", "unit", "per", "healthy", "judged", "when it moves", "tested")


def document(signals: Iterable[SignalInfo] = SIGNALS.values()) -> str:
    """The page as Markdown: one table a family, in the order of the catalogue."""
    families: dict[str, list[SignalInfo]] = {name: [] for name in _FAMILIES}
    for info in signals:
        families.setdefault(info.family, []).append(info)
    return _HEAD + "".join(_section(name, infos) for name, infos in families.items() if infos)


def _section(family: str, infos: list[SignalInfo]) -> str:
    title, common = _FAMILIES.get(family, (family.capitalize(), ""))
    tests = list(dict.fromkeys(info.tested for info in infos if info.tested))
    letters = dict(zip(tests, ascii_lowercase, strict=False))
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    rows += [_row(info, letters.get(info.tested, "–")) for info in infos]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "".join(f"* **{letter}**: {tested}\n" for tested, letter in letters.items())
    return f"\n## {title}\n\n{common}\n\n{table}\n\n{notes}"


def _row(info: SignalInfo, tested: str) -> tuple[str, ...]:
    formula = f"{_cell(info.formula)} *({_cell(info.source)})*"
    judged = _JUDGED[info.watch]
    return (
        f"`{info.name}`", formula, info.measure, info.unit, info.healthy, judged,
        _cell(info.meaning), tested,
    )  # fmt: skip


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    print(document(), end="")
