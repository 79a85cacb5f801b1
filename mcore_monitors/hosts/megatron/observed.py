"""What all observed Megatron modules have in common.

An observed class is a subclass made on the fly of whatever class the layer spec names, so state
dicts, checkpoints and isinstance checks stay as they were. Without a tap it does what its parent
does and nothing else.
"""

from __future__ import annotations

from typing import Any


def named(cls: type, parent: type) -> type:
    """Give an observed class its name, ``Observed`` and its parent's."""
    cls.__name__ = f"Observed{parent.__name__}"
    cls.__qualname__ = cls.__name__
    cls.__doc__ = f"{parent.__name__} with a tap for mcore-monitors."
    return cls


def is_observed(module: Any) -> bool:
    """Whether a module was built from a registered spec."""
    return hasattr(type(module), "mcore_monitors_tap")
