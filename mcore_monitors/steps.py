"""The steps since the last sample: loss and gradient norm of each, until they are reduced.

Losses stay on the device as they came; nothing here waits for it.
"""

from __future__ import annotations

import torch

#: iterations back for which consumed samples are remembered
_REMEMBERED = 10_000


class StepLog:
    """Collects steps between two samples.

    Args:
        interval: iterations between samples, on absolute iterations.
        loss, grad_norm: whether what this rank knows of them is to be recorded.
    """

    def __init__(self, interval: int, *, loss: bool, grad_norm: bool) -> None:
        self._interval, self._takes = interval, (loss, grad_norm)
        self._rows: list[
            tuple[int, torch.Tensor | float | None, torch.Tensor | float | None]
        ] = []
        # An asynchronous save is finished many steps after the iteration that it holds.
        self._consumed: dict[int, int] = {}

    @property
    def first(self) -> int:
        """First iteration since the last sample."""
        return self._rows[0][0]

    def schema(self) -> dict[str, tuple[int, ...]]:
        """Fields of the packed buffer: a slot a step."""
        names = ("loss", "loss_count", "grad_norm", "grad_norm_count")
        return dict.fromkeys(names, (self._interval,))

    def add(
        self,
        iteration: int,
        loss: torch.Tensor | float | None,
        grad_norm: torch.Tensor | float | None,
        consumed_samples: int,
    ) -> None:
        """Take in a finished step."""
        first = self._rows[0][0] if self._rows else iteration
        if (first - 1) // self._interval != (iteration - 1) // self._interval:
            # The host passed over the sampled iteration; its steps are lost to the history.
            self.clear()
        self._rows.append((iteration, loss, grad_norm))
        self._consumed[iteration] = consumed_samples
        self._consumed.pop(iteration - _REMEMBERED, None)

    def consumed_at(self, iteration: int, default: int) -> int:
        """Samples consumed by the end of an iteration; ``default`` where it was not seen."""
        return self._consumed.get(iteration, default)

    def clear(self) -> None:
        """Begin anew behind a sample."""
        self._rows = []

    def write(self, fields: dict[str, torch.Tensor]) -> None:
        """Add this rank's losses and gradient norms into the packed buffer."""
        for iteration, *values in self._rows:
            slot = iteration - self.first
            for name, value, takes in zip(("loss", "grad_norm"), values, self._takes, strict=True):
                if value is not None and takes:
                    fields[name][slot] += value
                    fields[f"{name}_count"][slot] += 1

    def read(self, name: str, reduced: dict[str, torch.Tensor]) -> list[float | None]:
        """One value a step from the first to the last; None where nobody knew it."""
        slots = self._rows[-1][0] - self.first + 1
        total, count = reduced[name][:slots].tolist(), reduced[f"{name}_count"][:slots].tolist()
        return [v / n if n else None for v, n in zip(total, count, strict=True)]
