"""Call a function on a module right after its import, before anyone has taken names from it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, adjust: Callable[[ModuleType], None]) -> None:
        self._inner, self._adjust = inner, adjust

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its ordinary loader, so that inspect and pickle see nothing unusual.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._adjust(module)


class AfterImport(importlib.abc.MetaPathFinder):
    """A finder that leaves the search to the others and adjusts the listed modules.

    Args:
        adjustments: full module name -> function called with the module after it was executed.
    """

    def __init__(self, adjustments: dict[str, Callable[[ModuleType], None]]) -> None:
        self._adjustments = adjustments

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec the other finders give, with a loader that adjusts afterwards."""
        adjust = self._adjustments.get(name)
        if adjust is None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, adjust)
                return spec
        return None

    def install(self) -> None:
        """Put this finder first in ``sys.meta_path``."""
        sys.meta_path.insert(0, self)
