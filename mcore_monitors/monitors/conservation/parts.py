"""The gradient that a tensor gets through one module alone, from the graph as the host built it.

In a pre-norm block the input of the norm also feeds the residual connection, and a hook on it would
see the sum of both. Handing the module an alias would split them, but a module made of several
operations takes its input more than once, and its parts would then be added up in another order:
the host's numbers would change. So the graph stays as it is and the nodes that take the input are
asked for what they send back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def watch_parts(
    x: torch.Tensor, y: torch.Tensor, arrived: Callable[[torch.Tensor], None]
) -> int:
    """Let ``arrived`` be called with each part of x's gradient that comes through ``y``.

    The parts are the engine's own tensors, to be read or copied within the call: it may add to them
    afterwards.

    Args:
        x: a tensor that ``y`` was computed from, by operations on x and leaves of the graph only.
        y: what was computed; has a graph.

    Returns:
        number of parts that will come in one backward pass; 0 if y does not depend on x.
    """
    maker, output = x.grad_fn, x.output_nr
    pending, met, parts = [y.grad_fn], {y.grad_fn}, 0
    takers: list[tuple[Any, list[int]]] = []
    while pending:
        node = pending.pop()
        places = []
        for i, (behind, number) in enumerate(node.next_functions):
            # the tensor's maker, or for a leaf its accumulator
            if behind is None:
                continue
            if (
                (behind is maker and number == output)
                if maker is not None
                else getattr(behind, "variable", None) is x
            ):
                places.append(i)
            elif behind not in met:
                met.add(behind)
                pending.append(behind)
        if places:
            takers.append((node, places))
            parts += len(places)
    for node, places in takers:
        node.register_hook(_sends(places, arrived))
    return parts


def _sends(
    places: list[int], arrived: Callable[[torch.Tensor], None]
) -> Callable[[tuple[torch.Tensor | None, ...], Any], None]:
    def sent(to_inputs: tuple[torch.Tensor | None, ...], _: Any) -> None:
        for i in places:
            if to_inputs[i] is not None:
                arrived(to_inputs[i])

    return sent
