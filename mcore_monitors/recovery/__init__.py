"""From a diagnosis back to health: checkpoints known to be good, plans, and their bounds.

Nothing here knows how a host saves or loads. Every rank asks :func:`resolve_start` at a start;
global rank 0 has a :class:`Recovery`, and the runtime gives its decisions to all ranks.
"""

from mcore_monitors.recovery.config import DEFAULT_REMEDIES, RecoveryConfig, Remedy
from mcore_monitors.recovery.ledger import LEDGER_FILE, Checkpoint, Ledger, Plan
from mcore_monitors.recovery.plan import GaveUp, make_plan
from mcore_monitors.recovery.policy import Action, Recovery
from mcore_monitors.recovery.start import GaveUpError, StartOrder, resolve_start

__all__ = [
    "DEFAULT_REMEDIES",
    "LEDGER_FILE",
    "Action",
    "Checkpoint",
    "GaveUp",
    "GaveUpError",
    "Ledger",
    "Plan",
    "Recovery",
    "RecoveryConfig",
    "Remedy",
    "StartOrder",
    "make_plan",
    "resolve_start",
]
