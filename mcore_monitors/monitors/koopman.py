"""The residual Koopman profile during training: what each layer does to its residual stream.

On the steps whose turn it is, hooks copy some tokens of the stream before and after each layer;
at the sample each layer's tokens come together on one of the ranks that run it, layers taking turns
over these ranks, and that rank decomposes it. Formulas in :mod:`mcore_monitors.signals.koopman`,
what each signal says in :mod:`mcore_monitors.catalogue.koopman`.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..signals.koopman import Profile, decompose, features, whiten
from ..views import ModelView
from .base import Monitor, Readings
from .koopman_tokens import TokenChoice

#: hidden size up to which ``auto`` takes all modes; above, their cost grows with its third power
FULL_UP_TO = 256
#: modes that ``auto`` takes of wider models (arXiv 2602.22988)
MODES = 32
_OF_MODES = ("eigenvalue_real", "eigenvalue_imaginary", "mode_residual")


def modes_of(rank: int | Literal["auto", "full"], width: int) -> int:
    """How many modes of a model of this hidden size are computed."""
    if rank == "auto":
        rank = "full" if width <= FULL_UP_TO else MODES
    return width if rank == "full" else min(rank, width)


class KoopmanMonitor(Monitor):
    """Profiles the layers of this rank.

    Args:
        model: ``model.residual`` is the stream to look at.
        every: iterations between profiles; a multiple of the runtime's interval.
        rank: number of modes, ``full`` for as many as channels; ``auto`` see :func:`modes_of`.
        tokens: at most this many tokens of a step are looked at, on all ranks together.
    """

    name = "koopman"

    def __init__(
        self,
        model: ModelView,
        *,
        every: int,
        rank: int | Literal["auto", "full"] = MODES,
        tokens: int = 2048,
    ) -> None:
        stream = model.residual
        self.every, self._layers = every, model.layers
        self.modes = modes_of(rank, stream.width)
        self.collective = stream.onto.size > 1
        self._stream = stream
        self._choice = TokenChoice(stream, tokens)
        own = self._choice.rows, self._choice.own_columns
        #: before and after each layer of this rank
        self._states = torch.zeros(
            len(stream.layers), 2, *own, stream.width, dtype=torch.float32, device=model.device
        )
        self._present = torch.zeros(
            len(stream.layers), *own, dtype=torch.float32, device=model.device
        )
        self._piece = {layer: i for i, layer in enumerate(stream.layers)}
        self._seen = dict.fromkeys(stream.layers, 0)

    @property
    def bytes_per_layer(self) -> int:
        """Device memory that is kept for each layer of this rank."""
        return self._states[:1].nbytes + self._present[:1].nbytes

    def schema(self) -> dict[str, tuple[int, ...]]:
        one = ("tokens", *Profile._fields)
        return {
            **{name: (self._layers, 1) for name in one},
            **{name: (self._layers, self.modes) for name in _OF_MODES},
        }

    def restart(self) -> None:
        self._present.zero_()
        self._seen = dict.fromkeys(self._seen, 0)

    @torch.no_grad()
    def on_layer(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in one micro-batch of one layer.

        Args:
            layer: global layer number.
            x, y: [S, B, D], this rank's part of the stream before and after the layer.
        """
        if x.shape != y.shape or x.shape[-1] != self._stream.width:
            raise ValueError(
                f"layer {layer} makes {list(y.shape)} of {list(x.shape)}: no residual stream of "
                f"width {self._stream.width}"
            )
        piece, micro_batch = self._piece[layer], self._seen[layer]
        self._seen[layer] += 1
        self._choice.take(micro_batch, x, self._states[piece, 0])
        for at in self._choice.take(micro_batch, y, self._states[piece, 1]):
            self._present[piece][at] = 1.0

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        if iteration % self.every:
            return
        onto, choice = self._stream.onto, self._choice
        mine = []
        # every rank of the group takes part for each layer; only then does one begin to compute
        for piece, layer in enumerate(self._stream.layers):
            table = torch.zeros(
                2 * self._stream.width + 1, choice.sequences, choice.columns,
                dtype=torch.float32, device=self._states.device,
            )  # fmt: skip
            x, y, there = table.split((self._stream.width, self._stream.width, 1))
            choice.spread(self._states[piece, 0], x.movedim(0, -1))
            choice.spread(self._states[piece, 1], y.movedim(0, -1))
            choice.spread(self._present[piece], there[0])
            if onto(table, piece % onto.size):
                mine.append((layer, table))
        self.restart()
        for layer, table in mine:
            self._profile(layer - 1, table.flatten(1), fields)

    def _profile(self, row: int, table: torch.Tensor, fields: dict[str, torch.Tensor]) -> None:
        """Decompose one layer, [2 D + 1, N]: X, Y and which tokens there are."""
        width, there = self._stream.width, table[-1]
        x, y = table[:width].mT, table[width:-1].mT
        modes = decompose(*whiten(x, y, present=there), rank=self.modes)
        for name, value in features(modes)._asdict().items():
            fields[name][row] += value
        order = modes.eigenvalues.abs().argsort(descending=True)
        values = modes.eigenvalues[order]
        for name, value in zip(
            _OF_MODES, (values.real, values.imag, modes.residuals[order]), strict=True
        ):
            fields[name][row] += value
        fields["tokens"][row] += there.sum()

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        seen = [i for i in range(self._layers) if fields["tokens"][i, 0] > 0]
        names = ("tokens", *Profile._fields, *_OF_MODES)
        readings = {
            f"koopman/{name}": {i + 1: fields[name][i].tolist() for i in seen} for name in names
        }
        return {name: layers for name, layers in readings.items() if layers}
