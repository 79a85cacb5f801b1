"""Attention-update signals: do the updates of queries and keys collapse onto few directions?

Compares the query and key weights of every head with their snapshots of some iterations ago and
records what :mod:`mcore_monitors.catalogue.attention_update` lists, per window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from ..catalogue import part_name
from ..signals.direction import directions_of, leading_coefficients
from ..signals.rounding import rounding_energy, without_rounding
from ..signals.spectra import measures
from ..signals.spike import spike
from ..signals.update_spectra import (
    UpdateGrams,
    UpdateSpectra,
    spectra_from_grams,
    update_grams,
)
from ..views import ModelView
from ..windows import Grid
from .attention_shares import Batch, batches, share_out
from .base import Monitor, Readings
from .persistence import Persistence
from .snapshots import Snapshots

#: columns of a spectrum in the packed buffer; the entropy is the logarithm of the effective rank
_MEASURES = ("effective_rank", "frobenius", "stable_rank")
_SPIKE = ("spike_strength", "outliers")


def _grams(
    wq_old: torch.Tensor, wk_old: torch.Tensor, wq_new: torch.Tensor, wk_new: torch.Tensor
) -> UpdateGrams:
    """Gram matrices of an update; where weights exist in 16 bits only, without their rounding."""
    grams = update_grams(wq_old, wk_old, wq_new, wk_new)
    if wq_new.dtype not in (torch.bfloat16, torch.float16):
        return grams
    energies = rounding_energy(wq_old, wq_new), rounding_energy(wk_old, wk_new)
    return without_rounding(grams, *energies)


def _named(matrix: str, *columns: str) -> list[str]:
    return [f"{matrix}_{column}" for column in columns]


#: fields of the packed buffer, for each part, and their columns behind the count
_FIELDS = {
    "heads": [
        *_named("delta2", *_MEASURES),
        *_named("delta3", *_MEASURES),
        *_named("query_update", *_MEASURES, *_SPIKE),
    ],
    "groups": _named("key_update", *_MEASURES, *_SPIKE),
    "persistence": ["delta2_direction_overlap", "persistent_spike"],
}


class AttentionUpdateMonitor(Monitor):
    """Compares the query and key weights with their snapshots, window by window.

    Query groups, or slices of their heads, are shared out over the ranks that hold the same
    weights: no two of them compute the same head, and both the work and the snapshots of a rank are
    (QK weights) / (replicas).
    Comparisons and snapshots sit at absolute iterations (:mod:`mcore_monitors.windows`), so that a
    resumed run continues the same grid. Snapshots are not saved: the first readings of a window
    come one window after a start. At a sample where a window is not compared, its signals are
    absent.

    Snapshots have the number format of the weights as they are read, which loses nothing: fp32 main
    weights stay fp32, and what exists in bf16 only is kept in bf16; there the expected energy of
    rounding is taken off (:mod:`mcore_monitors.signals.rounding`). Differences are taken in
    float64.

    Args:
        model: what the host shows.
        windows: window lengths in iterations, each a multiple of ``interval``.
        interval: iterations between samples.
        judged: windows that a rule judges (:class:`mcore_monitors.windows.Grid`); None for all.
        parts: all parts (:attr:`.AttentionView.part`) that any rank's views have.
        collective: whether reading any rank's view needs other ranks.
        snapshots: where earlier weights are kept.
    """

    name = "attention_update"

    def __init__(
        self,
        model: ModelView,
        windows: Sequence[int],
        interval: int,
        *,
        judged: Sequence[int] | None = None,
        parts: Sequence[str] = ("",),
        collective: bool = False,
        snapshots: Literal["device", "host"] = "device",
    ) -> None:
        self.collective = collective
        self._layers, self._heads, self._groups = model.layers, model.heads, model.groups
        self._grid = Grid(windows, interval, judged)
        self._windows = self._grid.windows
        self._parts = sorted(parts)
        self._pieces = share_out(model.attention)
        self._batches: list[Batch] | None = None
        self._place, self._device = snapshots, model.device
        self.restart()

    def restart(self) -> None:
        """Forget the snapshots: they are no longer of the past of the present weights."""
        self._snapshots = Snapshots(self._place, self._device)
        self._persistence = Persistence()

    def schema(self) -> dict[str, tuple[int, ...]]:
        fields: dict[str, tuple[int, ...]] = {}
        for part in self._parts:
            for field, names in _FIELDS.items():
                units = self._groups if field == "groups" else self._heads
                fields[f"{field}/{part}"] = len(self._windows), self._layers, units, 1 + len(names)
        return fields

    @property
    def snapshot_bytes(self) -> int:
        """Bytes held in snapshots on this rank."""
        return self._snapshots.nbytes

    @torch.no_grad()
    def _read(self) -> list[torch.Tensor]:
        """This rank's weights as they are now: W_q [H, d, D] and W_k [G, d, D] of each batch."""
        read = [piece.read() for piece in self._pieces]
        if self._batches is None:
            self._batches = batches(self._pieces, read, self._heads, self._groups)
        # cat copies, so a snapshot does not follow the live parameters
        return [
            torch.cat([read[i][side] for i in batch.members])
            for batch in self._batches
            for side in (0, 1)
        ]

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        due = self._grid.compared(iteration)
        ready = [window for window in due if iteration - window in self._snapshots]
        keep = self._grid.is_needed(iteration, iteration)
        if not self._pieces or not (ready or keep):
            return
        new = self._read()
        if ready:
            for number, batch in enumerate(self._batches or ()):
                self._compare(batch, number, ready, iteration, new, fields)
        self._snapshots.drop(lambda kept: not self._grid.is_needed(kept, iteration))
        if keep:
            self._snapshots.keep(iteration, new)

    def _compare(
        self,
        batch: Batch,
        number: int,
        ready: list[int],
        iteration: int,
        new: list[torch.Tensor],
        fields: dict[str, torch.Tensor],
    ) -> None:
        """Add one batch's signals of all windows that are ready into ``fields``.

        All windows go through one call of the eigensolver, which on a GPU waits for the device.
        """

        def weights(window: int) -> tuple[torch.Tensor, ...]:
            places = 2 * number, 2 * number + 1
            old = (self._snapshots.get(iteration - window, place) for place in places)
            return *old, *(new[place] for place in places)

        grams = {window: _grams(*weights(window)) for window in ready}
        spectra = spectra_from_grams(_joined(grams.values()))
        found = _Columns(spectra, hidden=new[2 * number].shape[-1])
        for field, places, block in (
            (f"heads/{batch.part}", batch.heads, found.of_heads),
            (f"groups/{batch.part}", batch.groups, found.of_groups),
        ):
            for window, rows in zip(ready, block.chunk(len(ready)), strict=True):
                self._add(fields[field], window, places, rows)

        outliers = dict(zip(ready, found.outliers.chunk(len(ready)), strict=True))
        apart = [window for window in ready if iteration % self._grid.period(window) == 0]
        if not apart:
            return
        coefficients = leading_coefficients(_joined(grams[window] for window in apart))
        by_window = zip(*(side.chunk(len(apart)) for side in coefficients), strict=True)
        for window, sides in zip(apart, by_window, strict=True):
            kept = self._persistence.update(
                number,
                window,
                self._grid.period(window),
                iteration,
                directions_of(sides, *weights(window)),
                outliers[window],
            )
            if kept is not None:
                field = fields[f"persistence/{batch.part}"]
                self._add(field, window, batch.heads, _block(torch.stack(kept, dim=1)))

    def _add(
        self, field: torch.Tensor, window: int, places: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Add rows [n, columns] to their places in a field [windows, layers, units, columns]."""
        flat = field[self._windows.index(window)].view(-1, field.shape[-1])
        flat.index_add_(0, places, rows)

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        readings: Readings = {}
        for part in self._parts:
            for field, names in _FIELDS.items():
                readings |= self._by_layer(names, fields[f"{field}/{part}"], part)
        return readings

    def _by_layer(self, names: Sequence[str], field: torch.Tensor, part: str) -> Readings:
        """Divide the sums [windows, layers, units, 1 + names] by the counts in their first column.

        What nobody read is left out: a window that was not compared, a layer without attention.
        """
        readings: Readings = {}
        count = field[..., 0]
        values = (field[..., 1:] / count[..., None]).movedim(-1, 1)
        for i, window in enumerate(self._windows):
            layers = [n for n, units in enumerate(count[i].tolist(), start=1) if any(units)]
            if not layers:
                continue
            for name, by_layer in zip(names, values[i], strict=True):
                rows = by_layer.tolist()
                signal = f"{part_name(f'attention/{name}', part)}@{window}"
                readings[signal] = {n: rows[n - 1] for n in layers}
                if name.endswith("effective_rank"):
                    entropy = by_layer.log().tolist()
                    signal = signal.replace("effective_rank", "spectral_entropy")
                    readings[signal] = {n: entropy[n - 1] for n in layers}
        return readings


class _Columns:
    """What is recorded of the spectra of some heads and groups, as columns behind a count.

    Attributes:
        of_heads: [H, 1 + columns of a head].
        of_groups: [G, 1 + columns of a group].
        outliers: [H], outlying singular values of ΔW_q.
    """

    def __init__(self, spectra: UpdateSpectra, hidden: int) -> None:
        # Δ3, ΔW_q and ΔW_k have spectra of one length: what is done to all is done in one go.
        heads, groups = len(spectra.query), len(spectra.key)
        singles = torch.cat([spectra.query, spectra.key, spectra.delta3])
        query, key, delta3 = _measured(singles).split([heads, groups, heads])
        noise = torch.stack(spike(singles[: heads + groups], hidden), dim=1)
        in_query, in_key = noise.split([heads, groups])
        self.of_heads = _block(_measured(spectra.delta2), delta3, query, in_query)
        self.of_groups = _block(key, in_key)
        self.outliers = in_query[:, _SPIKE.index("outliers")]


def _measured(squared: torch.Tensor) -> torch.Tensor:
    """The measures of spectra [n, values] that have a column of their own, [n, columns]."""
    found = measures(squared)
    return torch.stack([getattr(found, name) for name in _MEASURES], dim=1)


def _block(*columns: torch.Tensor) -> torch.Tensor:
    """A count of one in front of columns [n, any], side by side."""
    return torch.cat([torch.ones_like(columns[0][:, :1]), *columns], dim=1)


def _joined(grams: Iterable[UpdateGrams]) -> UpdateGrams:
    """The Gram matrices of several windows as those of so many more heads."""
    return UpdateGrams(*(torch.cat(side) for side in zip(*grams, strict=True)))
