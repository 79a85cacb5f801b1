"""The layers of a model that numbers none: the modules that carry its residual stream."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...monitors.base import StepState
from ..observed_layer import LayerTap, observe_layer
from .attention import FoundAttention, ShapeOf


def find_blocks(module: nn.Module, numbers: Mapping[str, int]) -> dict[int, nn.Module]:
    """Layer number to the module that holds everything of this layer, in the order of layers.

    A path as ``model.layers.3.self_attn`` lies in ``model.layers.3``: a layer is one of a list of
    modules. Paths without a number, and numbers that two modules share, give none.

    Args:
        module: the whole model.
        numbers: paths of attentions and routers to their layer, as
            :func:`.layers.number_layers` gives them.
    """
    blocks: dict[int, set[str]] = {}
    for path, number in numbers.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        blocks.setdefault(number, set()).add("" if at is None else ".".join(parts[: at + 1]))
    found = {number: paths.pop() for number, paths in sorted(blocks.items()) if len(paths) == 1}
    if len(set(found.values())) < len(found):
        return {}
    return {number: module.get_submodule(path) for number, path in found.items() if path}


def attention_width(attention: FoundAttention, shape_of: ShapeOf) -> int:
    """Channels of what an attention takes in."""
    return shape_of(attention.query)[0 if attention.transposed else 1]


def tapped(
    layers: Mapping[int, nn.Module], state: StepState, every: int, *, evaluation: bool = False
) -> dict[int, LayerTap]:
    """Give each layer a tap of its own; see :func:`..observed_layer.observe_layer`."""
    taps = {number: LayerTap(state, every) for number in layers}
    for number, layer in layers.items():
        observe_layer(layer, taps[number], batch_first=True, evaluation=evaluation)
    return taps
