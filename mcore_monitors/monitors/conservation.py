"""Conservation residuals: does the attention's backward pass obey its own identities?

Records ``attention/key_shift`` per query group: the mean over sequences of
``‖Σ_j dK_j‖ / Σ_j ‖dK_j‖``, exactly zero for a right kernel up to rounding
(:mod:`mcore_monitors.signals.conservation`).
"""

from __future__ import annotations

import torch

from ..parallel import GroupSum
from ..signals.conservation import key_shift_from_terms, key_shift_terms
from ..views import ModelView
from .base import Monitor, Readings, mean_by_layer


class ConservationMonitor(Monitor):
    """Watches dK at the border of each core attention, on sampled steps only.

    Args:
        model: what the host shows; ``model.key_shift`` names the local layers and groups.
        context: adds up over the ranks that hold the rest of each sequence.
    """

    name = "conservation"

    def __init__(self, model: ModelView, context: GroupSum) -> None:
        self._shape = (model.layers, model.groups)
        self._places = model.key_shift
        self._context = context
        self.collective = context.size > 1
        self._sums = {
            layer: torch.zeros(2, groups, dtype=torch.float64, device=model.device)
            for layer, (_, groups) in model.key_shift.items()
        }
        # Only with context parallelism: the norm has to wait for the other ranks' part of the sum.
        self._waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def schema(self) -> dict[str, tuple[int, ...]]:
        return {"key_shift_sum": self._shape, "key_shift_count": self._shape}

    def on_key_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        """Take in dK of one micro-batch, [S, B, G, d] or packed [T, G, d]."""
        if gradient.dim() == 3:  # packed sequences: each one's sum is zero, so is their total
            gradient = gradient.unsqueeze(1)
        vector, norm = key_shift_terms(gradient.detach())
        if self._context.size > 1:
            self._waiting.setdefault(layer, []).append((vector, norm))
        else:
            self._add(layer, vector, norm)

    def _add(self, layer: int, vector: torch.Tensor, norm: torch.Tensor) -> None:
        ratio, count = key_shift_from_terms(vector, norm)
        self._sums[layer][0] += ratio
        self._sums[layer][1] += count

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        self._complete()
        for layer, (first, groups) in self._places.items():
            sums = self._sums[layer]
            fields["key_shift_sum"][layer - 1, first : first + groups] += sums[0]
            fields["key_shift_count"][layer - 1, first : first + groups] += sums[1]
            sums.zero_()

    def _complete(self) -> None:
        """Add up over the ranks of a sequence what waits for it: one collective for all layers."""
        layers = sorted(self._waiting)
        if not layers:
            return
        # micro-batches need not be of one size
        parts = [
            torch.cat(terms)
            for layer in layers
            for terms in zip(*self._waiting[layer], strict=True)
        ]
        whole = self._context(torch.cat([part.flatten() for part in parts]))
        pieces = whole.split([part.numel() for part in parts])
        sums = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
        for layer, vector, norm in zip(layers, sums[::2], sums[1::2], strict=True):
            self._add(layer, vector, norm)
        self._waiting.clear()

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        return {
            "attention/key_shift": mean_by_layer(fields["key_shift_sum"], fields["key_shift_count"])
        }
