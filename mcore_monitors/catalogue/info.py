"""What is known of a signal besides its values."""

from __future__ import annotations

from dataclasses import dataclass

#: Source of the mechanism-driven signals.
MDM = "arXiv 2606.28116 (Mechanism-Driven Monitors)"


@dataclass(frozen=True, kw_only=True)
class SignalInfo:
    """What a signal measures and how to read it."""

    name: str
    """Name without a window, e.g. ``attention/delta2_effective_rank``."""
    family: str
    """``weights``, ``activations`` or ``conservation``."""
    unit: str
    """What one value of a layer stands for: ``head``, ``query group`` or ``layer``."""
    healthy: str
    """Course in a healthy run: ``stable``, ``drifts`` or ``low`` (at the round-off floor)."""
    watch: str
    """Side that speaks for a fault: ``low``, ``high``, ``both``, ``limit`` (a fixed limit), or
    ``record``: written and shown, not judged."""
    formula: str
    """The definition, in one line."""
    source: str
    """Paper, equation or derivation."""
    measure: str = "1"
    """Unit of the number, e.g. ``nats``; ``1`` for ratios, shares and other pure numbers."""
    meaning: str = ""
    """What it means when it moves, in one or two sentences."""
    tested: str = ""
    """Hosts and parallelism that it is tested on."""
