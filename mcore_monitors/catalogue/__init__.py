"""Every signal there is, by base name; one file a family.

Imports neither torch nor a host, so that a recorded run can be read and judged anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from . import attention_update, conservation, router
from .info import SignalInfo

#: Frozen: dashboards and recorded runs rely on these names.
SIGNALS: Mapping[str, SignalInfo] = MappingProxyType(
    {
        info.name: info
        for family in (conservation, attention_update, router)
        for info in family.SIGNALS
    }
)


def base_name(signal: str) -> str:
    """Return a signal's name without its window: ``a/b@50`` gives ``a/b``."""
    return signal.split("@", 1)[0]
