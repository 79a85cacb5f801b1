"""Numbers for the layers of a model that numbers none itself."""

from __future__ import annotations

from collections import Counter


def number_layers(attentions: list[str], routers: list[str]) -> tuple[dict[str, int], int]:
    """Give attentions and routers of one block the same number, counted from 1.

    A path as ``model.layers.3.self_attn`` says 4, if all paths agree in what stands before the
    number and no two attentions or two routers share one. Otherwise attentions are counted in the
    order of the model, and a router gets the number of the attention before it.

    Args:
        attentions, routers: module paths, in the order of the model.

    Returns:
        path to number, and how many layers there are: the largest number, at least 1.
    """
    numbers = _by_index(attentions, routers) or _by_order(attentions, routers)
    return numbers, max(numbers.values(), default=1)


def _by_index(attentions: list[str], routers: list[str]) -> dict[str, int] | None:
    numbers, prefixes = {}, set()
    for path in (*attentions, *routers):
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            return None
        prefixes.add(tuple(parts[:at]))
        numbers[path] = int(parts[at]) + 1
    if len(prefixes) > 1:
        return None
    for paths in (attentions, routers):
        if len({numbers[p] for p in paths}) < len(paths):
            return None
    return numbers


def _by_order(attentions: list[str], routers: list[str]) -> dict[str, int]:
    """``attentions`` and ``routers`` are in the model's order, which is that of their common list.

    Without an attention, routers are counted. With attentions, each router follows the one whose
    path shares most with its own; where two routers would follow the same, they are counted too.
    """
    numbers = {path: i for i, path in enumerate(attentions, start=1)}
    nearest = {r: max(attentions, key=lambda a: _shared(a, r), default=None) for r in routers}
    if any(n > 1 or a is None for a, n in Counter(nearest.values()).items()):
        return numbers | {path: i for i, path in enumerate(routers, start=1)}
    return numbers | {path: numbers[a] for path, a in nearest.items()}


def _shared(a: str, b: str) -> int:
    """How many leading parts two paths share."""
    n = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        n += 1
    return n
