"""Which checkpoint an engine loads: the script's choice, or that of a recovery plan.

Once there is a plan, the ledger names the checkpoint of every start. It is loaded when the monitors
are attached, so that a script that never loads one obeys as well; a call of ``load_checkpoint``
before the first step is then answered with it, whatever folder and tag it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ... import parallel
from ...config import Config
from ...errors import HostError, MonitorsError
from ...messages import say
from ...recovery import StartOrder, resolve_start


def order_for_all(config: Config) -> StartOrder | None:
    """What the plan on disk orders, as rank 0 reads it; the same on every rank.

    Only rank 0 reads, so that no rank sees an older state of a shared file system.

    Raises:
        RecoveryError: the recovery state can't be used, or the run has given up; on all ranks.
    """
    found: StartOrder | MonitorsError | None = None
    if parallel.rank() == 0:
        try:
            found = resolve_start(config.run_dir, config.recovery.mode)
        except MonitorsError as error:
            found = error
    found = parallel.from_rank_0(found)
    if isinstance(found, MonitorsError):
        raise found
    return found


class Checkpoints:
    """Loads of one engine.

    Attributes:
        loading: whether the load in progress is ours.
        answer: what a call of the script's gets instead of a load, until the first step.
        tell: called with the path after a load of the script's, where the patch doesn't.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._load: Callable[..., tuple[Any, Any]] = engine.load_checkpoint
        self.loading = False
        self.answer: tuple[Any, Any] | None = None
        self.tell: Callable[[str | None], None] | None = None
        engine.load_checkpoint = self._scripts_load

    def load_ordered(self, order: StartOrder) -> tuple[Any, Any]:
        """Load the checkpoint of a plan, on every rank, and pass over the samples it names.

        Weights, optimizer, learning-rate schedule and the engine's counters go back.

        Returns:
            what DeepSpeed's ``load_checkpoint`` returned: path and client state.

        Raises:
            HostError: DeepSpeed could not load it, or loaded another iteration.
        """
        engine = self._engine
        with self._ours():
            path, client_state = self._load(order.load_dir, tag=order.name)
        if path is None or engine.global_steps != order.iteration:
            found = "nothing" if path is None else f"iteration {engine.global_steps}"
            raise HostError(
                f"the recovery plan orders checkpoint {order.iteration} "
                f"({order.checkpoint_path}), but DeepSpeed loaded {found}. Nothing was trained; "
                "check the files."
            )
        # DeepSpeed saves this counter, so that a later checkpoint has these samples behind it.
        engine.global_samples += order.pass_over_samples
        return path, client_state

    @contextmanager
    def _ours(self) -> Iterator[None]:
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    def _scripts_load(
        self, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if self.answer is not None:
            if parallel.rank() == 0:
                say(f"load_checkpoint: the recovery plan's checkpoint is loaded, {self.answer[0]}")
            return self.answer
        loaded = self._load(load_dir, tag, *args, **kwargs)
        if self.tell is not None:
            self.tell(loaded[0])
        return loaded
