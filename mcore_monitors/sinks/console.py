"""The console: one line a sample, and every event that a person should see."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from typing import Any, TextIO

from mcore_monitors.sample import Sample
from mcore_monitors.sinks.summary import Place, find, largest, mean, spread, worst
from mcore_monitors.sinks.wording import event_text, number

_PREFIX = "monitors"
_STYLES = {"alarm": "1;31", "gave_up": "1;31", "rollback": "1;33", "monitor_disabled": "1;33"}


class Console:
    """Prints to a stream; colours only on a terminal, and not where ``NO_COLOR`` is set.

    Args:
        stream: where to print; the standard output by default.
        windows: windows of the update signals that are judged; None for all.
    """

    def __init__(
        self, stream: TextIO | None = None, windows: Collection[int] | None = None
    ) -> None:
        self._windows = windows
        self._stream = stream if stream is not None else sys.stdout
        self._colour = self._stream.isatty() and "NO_COLOR" not in os.environ
        self._last_time: float | None = None

    def sample(self, sample: Sample) -> None:
        """Print one line: loss, gradient norm, the worst places, and what monitoring cost."""
        parts = [
            f"iteration {sample.iteration}",
            f"loss {number(mean(sample.loss))}",
            f"grad norm {number(largest(sample.grad_norm))}",
        ]
        if place := self._worst(sample, "attention/key_shift"):
            parts.append(f"key shift {number(place.value)} (layer {place.layer})")
        if place := self._worst(sample, "attention/delta2_effective_rank"):
            where = f"layer {place.layer} head {place.unit}"
            parts.append(f"Δ2 rank {number(place.value)} ({where})")
        if found := find(sample, "router/routing_entropy"):
            seen = spread(value for values in found[1].values() for value in values)
            if seen is not None:
                parts.append(f"routing entropy {number(seen.low)} nat")
        if self._last_time is not None and sample.time > self._last_time:
            share = sample.cost_seconds / (sample.time - self._last_time)
            parts.append(f"cost {100 * share:.1f}%")
        self._last_time = sample.time
        attempt = f" attempt {sample.attempt}" if sample.attempt else ""
        self._print(f"{_PREFIX}{attempt} | " + " | ".join(parts))

    def event(self, event: Mapping[str, Any]) -> None:
        """Print an event; checkpoints stay silent, alarms stand out."""
        kind = event["kind"]
        text = event_text(event)
        if text is None:
            return
        lead = "!!! ALARM" if kind == "alarm" else kind.replace("_", " ").upper()
        self._print(
            f"{_PREFIX} | {lead} at iteration {event['iteration']} | {text}", _STYLES.get(kind)
        )

    def close(self, exit_code: int = 0) -> None:
        """The stream is not ours to close."""

    def _worst(self, sample: Sample, base: str) -> Place | None:
        found = find(sample, base, self._windows)
        return worst(*found) if found else None

    def _print(self, line: str, style: str | None = None) -> None:
        if self._colour and style:
            line = f"\x1b[{style}m{line}\x1b[0m"
        # A console in an old code page must not stop the run over a Δ.
        encoding = self._stream.encoding or "utf-8"
        safe = line.encode(encoding, errors="replace").decode(encoding)
        self._stream.write(safe + "\n")
        self._stream.flush()
