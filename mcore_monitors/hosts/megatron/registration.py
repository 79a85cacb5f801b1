"""``register(spec)``: a layer spec in, the same layer spec with observed parts out.

A Megatron layer spec is a tree of ``ModuleSpec``, ``functools.partial`` over ``submodules``, block
submodules with a list of layer specs, and plain dataclasses of builders. Two fields matter:
``router`` of the mixture-of-experts submodules and ``core_attention`` of the self-attention ones.
They are found by name wherever they stand, so dense and MoE, local and Transformer Engine, GPT and
heterogeneous specs are all taken. The given spec is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from ...errors import HostError
from .observed_attention import observed_attention
from .observed_router import observed_router

_OBSERVERS: dict[str, Callable[[type], type]] = {
    "router": observed_router,
    "core_attention": observed_attention,
}


def register(spec: Any) -> Any:
    """Return ``spec`` with its routers and core attentions observed.

    Args:
        spec: a Megatron layer spec: ``ModuleSpec``, ``TransformerBlockSubmodules``,
            ``TransformerLayerSubmodules``, a ``functools.partial`` over submodules, or a list.

    Raises:
        HostError: nothing in it is a spec.
    """
    if not (isinstance(spec, ModuleSpec | partial | list | tuple) or _is_submodules(spec)):
        raise HostError(
            f"register() was given {type(spec).__name__}; allowed: a Megatron layer spec "
            "(ModuleSpec, block or layer submodules, a partial over submodules, or a list of them)."
        )
    return _rebuild(spec)


def _is_submodules(node: Any) -> bool:
    # by name: Megatron's submodules are plain dataclasses without a common base
    return is_dataclass(node) and type(node).__name__.endswith("Submodules")


def _rebuild(node: Any) -> Any:
    if isinstance(node, ModuleSpec):
        new = copy.copy(node)
        new.submodules = _rebuild(node.submodules)
        return new
    if isinstance(node, partial):
        keywords = {k: _rebuild(v) for k, v in node.keywords.items()}
        return partial(node.func, *map(_rebuild, node.args), **keywords)
    if isinstance(node, list | tuple):
        return type(node)(map(_rebuild, node))
    if _is_submodules(node):
        changes = {}
        for f in fields(node):
            value = getattr(node, f.name)
            observe = _OBSERVERS.get(f.name)
            new = _rebuild(value) if observe is None else _observe(value, observe)
            if new is not value:
                changes[f.name] = new
        return replace(node, **changes)
    return node


def _observe(builder: Any, observe: Callable[[type], type]) -> Any:
    """Replace the class that a builder builds by its observed subclass."""
    if isinstance(builder, type):
        if issubclass(builder, IdentityOp) or hasattr(builder, "mcore_monitors_tap"):
            return builder
        return observe(builder)
    if isinstance(builder, ModuleSpec):
        module = builder.module
        if isinstance(module, tuple | list):  # (place, name)
            module = import_module(module)
        new = copy.copy(builder)
        new.module = _observe(module, observe)
        return new
    if isinstance(builder, partial) and isinstance(builder.func, type):
        return partial(_observe(builder.func, observe), *builder.args, **builder.keywords)
    # A function that builds the module itself; its result can't be taken over from here. Whoever
    # attaches the monitors finds the layer without a tap and says so.
    return builder
