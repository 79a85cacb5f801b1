"""One place around the attention kernel of each Hugging Face attention: its border and its choice.

Two ways lead there, and a module takes the one that its forward needs:

- transformers calls ``ALL_ATTENTION_FUNCTIONS.get_interface(...)(module, query, key, value, ...)``
  for eager, sdpa, flash and flex kernels alike. We wrap what ``get_interface`` returns; the model's
  configuration stays as it is, so masks are made as always.
- other modules call ``scaled_dot_product_attention`` themselves. A ``TorchFunctionMode`` sees the
  call, in the scope of that module's forward only, and only when the step is sampled or another
  kernel is to run; else a forward costs one look at the tap.

Both ways treat a module without a tap as if they were not there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...calls import AttentionCall
from ...messages import say
from ...monitors.base import StepState
from ..taps import AttentionTap

_TAP = "mcore_monitors_tap"


def why_not_observed(module: nn.Module) -> str | None:
    """Why nothing of this module's kernel can be seen, or None where it can."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "the module is compiled, and compiled code does not pass through Python"
    names = _names(module)
    if "get_interface" not in names and "scaled_dot_product_attention" not in names:
        return (
            f"{type(module).__name__}.forward calls neither transformers' attention interface nor "
            "scaled_dot_product_attention"
        )
    return None


def observe_attention(module: nn.Module, groups: int, state: StepState) -> AttentionTap:
    """Put a tap, ``mcore_monitors_tap``, around the module's kernel.

    Args:
        groups: query groups of the module. A module that repeats keys for its query heads before
            the kernel is not told of, since a gradient at the border is not one of its keys.
    """
    tap = AttentionTap(state)
    setattr(module, _TAP, tap)
    if "get_interface" in _names(module):
        _wrap_interface()
    else:
        scope = _Scope(tap, groups)
        module.register_forward_pre_hook(scope.enter)
        module.register_forward_hook(scope.leave, always_call=True)
    return tap


def _names(module: nn.Module) -> set[str]:
    """Attributes and globals that the module's forward uses."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return set(code.co_names) if code is not None else set()


def _run(
    module: nn.Module,
    tap: AttentionTap,
    host: Callable[[], Any],
    kernel_arguments: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[Tensor, Any]:
    """(output [B, S, H, d], the rest that the host's function returned), of the kernel to run."""
    kernel = tap.kernel()
    if kernel is None:
        output, *rest = host()
        return output, rest
    args, kwargs = kernel_arguments
    return kernel(module, *args, **kwargs), [None]


# ---- transformers' interface ----


@cache
def _wrap_interface() -> None:
    """Let ``get_interface`` return functions that look for a tap. Once a process."""
    from transformers.modeling_utils import AttentionInterface

    given = AttentionInterface.get_interface

    @wraps(given)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return _observed(given(self, *args, **kwargs))

    AttentionInterface.get_interface = get_interface


@cache
def _observed(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tap = getattr(module, _TAP, None)
        if tap is None or torch.compiler.is_compiling():
            return function(module, query, key, value, *args, **kwargs)
        output, rest = _run(
            module,
            tap,
            lambda: function(module, query, key, value, *args, **kwargs),
            ((query, key, value, *args), kwargs),
        )
        if module.training and tap.watches():
            # heads first as in query, key and value; what the model goes on with is a view of it
            output = output.transpose(1, 2)
            tap.tell(_call(query, key, value, output, kwargs.get("cu_seq_lens_q")))
            output = output.transpose(1, 2)
        return (output, *rest)

    return attention


def _call(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, packed: Any = None
) -> AttentionCall:
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        output=output,
        heads=query.shape[1],
        groups=key.shape[1],
        layout="bhsd",
        packed=packed,
    )


# ---- modules that call the kernel themselves ----


class _Scope:
    """Hooks that put the mode around a module's forward."""

    def __init__(self, tap: AttentionTap, groups: int) -> None:
        self._tap, self._groups = tap, groups
        self._open: list[_Mode] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        watched = module.training and self._tap.watches()
        if watched or self._tap.kernel() is not None:
            mode = _Mode(module, self._tap, self._groups, watched)
            mode.__enter__()
            self._open.append(mode)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open and self._open[-1].module is module:
            self._open.pop().__exit__(None, None, None)


class _Mode(TorchFunctionMode):
    def __init__(self, module: nn.Module, tap: AttentionTap, groups: int, watched: bool) -> None:
        super().__init__()
        self.module, self._tap, self._groups, self._watched = module, tap, groups, watched

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, settings = _sdpa_arguments(*args, **kwargs)
        if self._tap.kernel() is None:
            output = function(*args, **kwargs)
        else:
            output, _ = _run(self.module, self._tap, tuple, ((query, key, value), settings))
            output = output.transpose(1, 2)
        if self._watched and query.dim() == 4:
            if key.shape[1] == self._groups:
                self._tap.tell(_call(query, key, value, output))
            else:
                _say_repeated(type(self.module).__name__, self._groups, key.shape[1])
        return output


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments of ``scaled_dot_product_attention`` in the words of transformers' interface."""
    return query, key, value, {
        "attention_mask": attn_mask,
        "dropout": dropout_p,
        "scaling": scale,
        "is_causal": is_causal,
    }


@cache
def _say_repeated(name: str, groups: int, heads: int) -> None:
    say(
        f"left out: kernel of {name}: it repeats the keys of {groups} groups for {heads} heads "
        "before the kernel."
    )
