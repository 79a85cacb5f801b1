"""The steps since the last sample: loss and gradient norm of each, until they are reduced.

Losses stay on the device as they came; nothing here waits for it.
"""

from __future__ import annotations

import torch

#: iterations back for which consumed samples are remembered
_REMEMBERED = 10_000
#: field of the packed buffer, and what its rows hold: sums, and how many ranks knew the value
_FIELD, _ROWS = "steps", ("loss", "loss_count", "grad_norm", "grad_norm_count")


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
        """The field of the packed buffer: a slot a step."""
        return {_FIELD: (len(_ROWS), self._interval)}

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
        # what the host knows goes over in one piece
        table = [[0.0] * self._interval for _ in _ROWS]
        there: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for place, takes in enumerate(self._takes):
            for row in self._rows if takes else ():
                slot, value = row[0] - self.first, row[1 + place]
                if value is None:
                    continue
                table[2 * place + 1][slot] += 1
                if isinstance(value, torch.Tensor):
                    value = value.detach() if value.requires_grad else value
                    there.setdefault(2 * place, []).append((slot, value))
                else:
                    table[2 * place][slot] += value
        field = fields[_FIELD]
        field += torch.tensor(table, dtype=torch.float64).to(field.device, non_blocking=True)
        for place, values in there.items():
            _add(field[place], values)

    def read(self, name: str, reduced: dict[str, torch.Tensor]) -> list[float | None]:
        """One value a step from the first to the last; None where nobody knew it."""
        slots, row = self._rows[-1][0] - self.first + 1, _ROWS.index(name)
        total, count = reduced[_FIELD][row : row + 2, :slots].tolist()
        return [v / n if n else None for v, n in zip(total, count, strict=True)]


def _add(field: torch.Tensor, values: list[tuple[int, torch.Tensor]]) -> None:
    """Add tensors of one number each to their slots of a field, without waiting for them."""
    slots = [slot for slot, _ in values]
    kinds = {(value.device, value.dtype, value.dim()) for _, value in values}
    if kinds == {(field.device, values[0][1].dtype, 0)} and slots == list(range(len(slots))):
        field[: len(slots)] += torch.stack([value for _, value in values])
        return
    for slot, value in values:  # a hole between them, or numbers that are not all alike
        field[slot] += value
