"""Recovery: the ledger of checkpoints, the plan to go back, and its bounds."""

from .recovery import Action, Recovery
from .start import StartOrder, resolve_start

__all__ = ["Action", "Recovery", "StartOrder", "resolve_start"]
