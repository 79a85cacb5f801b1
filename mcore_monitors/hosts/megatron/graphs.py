"""What of a Megatron model runs inside captured CUDA graphs, where no Python hook runs."""

from __future__ import annotations

from typing import Any, Literal

#: modules that can be captured, and what has the tap in question inside
_HOLDING = {
    "attention": {"attn"},
    "router": {"moe", "moe_router"},
}


def captured(config: Any, what: Literal["attention", "router"]) -> bool:
    """Whether training replays a graph of the attentions or of the routers.

    Args:
        config: Megatron's ``TransformerConfig`` of any supported release.
    """
    implementation = getattr(config, "cuda_graph_impl", "none")
    if implementation == "none":
        return False
    # named cuda_graph_scope before 0.19
    modules = getattr(config, "cuda_graph_modules", getattr(config, "cuda_graph_scope", None))
    if isinstance(modules, str):
        modules = modules.split(",") if modules else []
    names = {getattr(module, "name", str(module)) for module in modules or []}
    whole = not names or names & {"full", "full_iteration"}
    return bool(implementation == "full_iteration" or whole or names & _HOLDING[what])
