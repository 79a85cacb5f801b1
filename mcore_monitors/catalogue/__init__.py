"""Every signal there is, by base name; one file a family.

Imports neither torch nor a host, so that a recorded run can be read and judged anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType

from ..windows import window_of
from . import attention_activity, attention_update, conservation, koopman, optimizer, router
from .info import SignalInfo

#: Frozen: dashboards and recorded runs rely on these names.
SIGNALS: Mapping[str, SignalInfo] = MappingProxyType(
    {
        info.name: info
        for family in (
            conservation,
            attention_update,
            router,
            attention_activity,
            optimizer,
            koopman,
        )
        for info in family.SIGNALS
    }
)


#: Parts of a head that are read apart: the channels of latent attention without and with rotation.
PARTS = ("nope", "rope")


def part_name(signal: str, part: str) -> str:
    """Name of a signal for a part of a head: ``a/b`` gives ``a/b/rope``, and ``a/b`` without one.

    A window comes behind it: ``a/b/rope@50``.
    """
    return f"{signal}/{part}" if part else signal


@cache
def base_name(signal: str) -> str:
    """Return a signal's name without window and part: ``a/b@50``, ``a/b/rope@50`` give ``a/b``."""
    name = signal.split("@", 1)[0]
    stem, _, last = name.rpartition("/")
    return stem if last in PARTS else name


def is_judged(signal: str, windows: Collection[int] | None = None) -> bool:
    """Whether a rule judges a signal, or it is only recorded and shown.

    Args:
        signal: its name, with part and window.
        windows: ``detection.windows``, the windows that are judged; None for all.
    """
    info = SIGNALS.get(base_name(signal))
    if info is None or info.watch == "record":
        return False
    window = window_of(signal)
    return window is None or windows is None or window in windows
