"""A runtime as a host makes it, on one rank, with small monitors of its own."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from mcore_monitors import parallel
from mcore_monitors.config import Config, from_dict
from mcore_monitors.detection.judge import Judge
from mcore_monitors.monitors.base import Monitor, Readings, mean_by_layer
from mcore_monitors.recovery import Recovery
from mcore_monitors.runtime import Runtime
from mcore_monitors.sample import Sample
from mcore_monitors.sinks import Sinks, open_sinks
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader

CPU = torch.device("cpu")


class Mean(Monitor):
    """The mean of what its hook was given, over all ranks, as one signal of layer 1.

    Args:
        name: of the monitor.
        signal: what its reading is called.
        fails_in: ``collect`` or ``read``: that raises.
    """

    def __init__(self, name: str, signal: str | None = None, fails_in: str = "") -> None:
        self.name, self._fails_in = name, fails_in
        self._signal = signal or f"test/{name}"
        self.calls = 0
        self._taken = torch.zeros(2, dtype=torch.float64)

    def take(self, value: float) -> None:
        """The hook."""
        self.calls += 1
        if value < 0:
            raise ValueError(f"{value} is negative")
        self._taken += torch.tensor([value, 1.0], dtype=torch.float64)

    def schema(self) -> dict[str, tuple[int, ...]]:
        return {"sum": (1, 1), "count": (1, 1)}

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        if self._fails_in == "collect":
            raise RuntimeError("cannot collect")
        fields["sum"] += self._taken[0]
        fields["count"] += self._taken[1]
        self._taken.zero_()

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        if self._fails_in == "read":
            raise RuntimeError("cannot read")
        return {self._signal: mean_by_layer(fields["sum"], fields["count"])}


def settings(folder: Path, interval: int = 5, **more: Any) -> Config:
    """Settings without W&B and console."""
    data = {"run_dir": str(folder), "interval": interval, "console": False}
    data["wandb"] = {"enabled": False}
    data["monitors"] = {"attention_update": {"windows": [interval]}}
    return from_dict(data | more)


def runtime(
    config: Config,
    monitors: list[Monitor],
    *,
    judge: Judge | None = None,
    recovery: Recovery | None = None,
    attempt: int = 0,
    reports_loss: bool = True,
    sinks: Sinks | None = None,
) -> Runtime:
    """What ``attach`` makes; only rank 0 writes and judges."""
    first = parallel.rank() == 0
    return Runtime(
        config,
        monitors,
        CPU,
        sinks or open_sinks(config, local=first, wandb=False),
        judge=judge if first else None,
        recovery=recovery if first else None,
        attempt=attempt,
        reports_loss=reports_loss,
    )


def step(run: Runtime, iteration: int, loss: Any = 1.0, grad_norm: float | None = 2.0) -> None:
    """One finished step of the host."""
    run.on_step(
        iteration,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=0.001,
        consumed_samples=4 * iteration,
    )


def history(folder: Path) -> list[Sample]:
    return HistoryReader(folder).read()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in EventReader(folder).read() if e["kind"] == kind]


@contextlib.contextmanager
def said():
    """Collects standard error; the list has one text when the block ends."""
    texts: list[str] = []
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        yield texts
    texts.append(stream.getvalue())
