"""Attention-update signals: do the updates of queries and keys collapse onto few directions?

Compares the query and key weights of every head with their snapshots of some iterations ago and
records what :mod:`mcore_monitors.catalogue.attention_update` lists, per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ..catalogue import part_name
from ..signals.direction import directions_of, leading_coefficients
from ..signals.rounding import rounding_energy, without_rounding
from ..signals.spectra import Measures, measures
from ..signals.spike import spike
from ..signals.update_grams import Gram, UpdateGrams, WholeGram, stacked_grams
from ..signals.update_measures import delta2_measures, recorded
from ..views import ModelView
from ..windows import SELDOM, Grid
from .attention_shares import Batch, batches, share_out
from .base import Monitor, Readings
from .persistence import Persistence
from .snapshots import Snapshots

#: columns of a spectrum in the packed buffer; the entropy is the logarithm of the effective rank
_MEASURES = ("effective_rank", "frobenius", "stable_rank")
_SPIKE = ("spike_strength", "outliers")


def _grams(olds: Sequence[torch.Tensor], new: torch.Tensor, heads: int) -> UpdateGrams:
    """Gram matrices of updates, those of one window after those of another.

    Where weights exist in 16 bits only, without their rounding.
    """
    grams = stacked_grams(olds, new, heads)
    if new.dtype not in (torch.bfloat16, torch.float16):
        return grams
    energies = [rounding_energy(old, new).tensor_split([heads]) for old in olds]
    return without_rounding(grams, *map(torch.cat, zip(*energies, strict=True)))


def _named(matrix: str, *columns: str) -> list[str]:
    return [f"{matrix}_{column}" for column in columns]


#: fields of the packed buffer, for each part, and their columns behind the count. Those of
#: ``heads`` are there at every comparison, the others at records (:class:`.Grid`)
_FIELDS = {
    "heads": _named("delta2", *_MEASURES),
    "records": [*_named("delta3", *_MEASURES), *_named("query_update", *_MEASURES, *_SPIKE)],
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
        judged: windows that a rule judges; None: all is computed at every sample.
        every: samples from one record to the next of what no rule judges
            (:class:`mcore_monitors.windows.Grid`): other windows, and all but Δ2.
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
        every: int = SELDOM,
        parts: Sequence[str] = ("",),
        collective: bool = False,
        snapshots: Literal["device", "host"] = "device",
    ) -> None:
        self.collective = collective
        self._layers, self._heads, self._groups = model.layers, model.heads, model.groups
        self._grid = Grid(windows, interval, judged, every)
        self._windows = self._grid.windows
        self._parts = sorted(parts)
        self._pieces = share_out(model.attention)
        self._batches: list[Batch] | None = None
        self._places: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
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

    def _read(self) -> list[torch.Tensor]:
        """This rank's weights as they are now: of each batch W_q and then W_k, [H + G, d, D]."""
        read = [piece.read() for piece in self._pieces]
        if self._batches is None:
            self._batches = batches(self._pieces, read, self._heads, self._groups)
        # cat copies, so a snapshot does not follow the live parameters
        return [
            torch.cat([view for side in (0, 1) for i in batch.members for view in read[i][side]])
            for batch in self._batches
        ]

    @torch.no_grad()
    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        due = self._grid.compared(iteration)
        ready = [window for window in due if iteration - window in self._snapshots]
        keep = self._grid.is_needed(iteration, iteration)
        if not self._pieces or not (ready or keep):
            return
        new = self._read()
        if ready:
            for number, weights in enumerate(new):
                self._compare(number, ready, iteration, weights, fields)
        self._snapshots.drop(lambda kept: not self._grid.is_needed(kept, iteration))
        if keep:
            self._snapshots.keep(iteration, new)

    def _compare(
        self,
        number: int,
        ready: list[int],
        iteration: int,
        new: torch.Tensor,
        fields: dict[str, torch.Tensor],
    ) -> None:
        """Add the signals of batch ``number`` of all windows that are ready into ``fields``.

        All windows of which the same is wanted go through one call of the eigensolver, which on a
        GPU waits for the device.
        """
        batch = self._batches[number]
        heads = len(batch.heads)
        record = [w for w in ready if self._grid.is_record(w, iteration)]
        plain = [w for w in ready if w not in record]
        if plain:
            olds = [self._snapshots.get(iteration - window, number) for window in plain]
            delta2 = _columns(delta2_measures(_grams(olds, new, heads)))
            self._add(fields, f"heads/{batch.part}", plain, batch.heads, *delta2)
        if record:
            olds = [self._snapshots.get(iteration - window, number) for window in record]
            grams = _grams(olds, new, heads)
            found = _Columns(*recorded(grams), hidden=new.shape[-1])
            self._add(fields, f"heads/{batch.part}", record, batch.heads, *found.delta2)
            self._add(fields, f"records/{batch.part}", record, batch.heads, *found.of_heads)
            self._add(fields, f"groups/{batch.part}", record, batch.groups, *found.of_groups)
            self._persist(number, record, iteration, grams, olds, new, found.outliers, fields)

    def _persist(
        self,
        number: int,
        windows: list[int],
        iteration: int,
        grams: UpdateGrams,
        olds: list[torch.Tensor],
        new: torch.Tensor,
        outliers: torch.Tensor,
        fields: dict[str, torch.Tensor],
    ) -> None:
        """Hold the directions of one batch against those of one period ago, where that is over.

        Args:
            grams: Gram matrices of all ``windows``.
            olds, new: weights then, of each window, and now.
            outliers: [windows × H], outlying values of each head.
        """
        apart = [i for i, w in enumerate(windows) if self._grid.is_apart(w, iteration)]
        if not apart:
            return
        batch, times = self._batches[number], len(windows)
        heads = len(batch.heads)
        if len(apart) < times:
            grams = UpdateGrams(*(_parts(side, apart, times) for side in grams))
        left, right = (side.chunk(len(apart)) for side in leading_coefficients(grams))
        for n, i in enumerate(apart):
            sizes = [heads, len(new) - heads]
            weights = (w for side in (olds[i], new) for w in side.split_with_sizes(sizes))
            kept = self._persistence.update(
                number,
                windows[i],
                self._grid.period(windows[i]),
                iteration,
                directions_of((left[n], right[n]), *weights),
                outliers.chunk(times)[i],
            )
            if kept is not None:
                self._add(fields, f"persistence/{batch.part}", [windows[i]], batch.heads, *kept)

    def _add(
        self,
        fields: dict[str, torch.Tensor],
        name: str,
        windows: list[int],
        places: torch.Tensor,
        *columns: torch.Tensor,
    ) -> None:
        """Add a count of one and columns to a field [windows, layers, units, 1 + columns].

        Args:
            places: [n], of each row of a window in a flat [layers × units].
            columns: [windows × n] or [windows × n, any], to stand side by side behind the count.
        """
        field = fields[name]
        key = name, tuple(windows), id(places)
        if key not in self._places:
            of_window = field[0, ..., 0].numel()
            starts = [of_window * self._windows.index(window) for window in windows]
            rows = torch.cat([places + start for start in starts])
            self._places[key] = rows, field.new_ones(len(rows), 1)
        rows, count = self._places[key]
        block = torch.cat([count, *(c.view(len(count), -1) for c in columns)], dim=1)
        field.view(-1, field.shape[-1]).index_add_(0, rows, block)

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
        table = field.numpy()
        there = table[..., 0].any(axis=2).tolist()  # true for NaN: broken is not absent
        for window, of_window, seen in zip(self._windows, table, there, strict=True):
            layers = [n for n, here in enumerate(seen) if here]
            if not layers:
                continue
            with np.errstate(all="ignore"):  # units without a count
                values = (of_window[..., 1:] / of_window[..., :1]).transpose(2, 0, 1)
                rows = dict(zip(names, values.tolist(), strict=True))
                for i, name in enumerate(names):
                    if name.endswith("effective_rank"):
                        entropy = name.replace("effective_rank", "spectral_entropy")
                        rows[entropy] = np.log(values[i]).tolist()
            for name, by_layer in rows.items():
                signal = f"{part_name(f'attention/{name}', part)}@{window}"
                readings[signal] = {n + 1: by_layer[n] for n in layers}
        return readings


class _Columns:
    """What is recorded of the spectra of some heads and groups.

    Args:
        delta2: [H], measures.
        singles: [2 H + G, d], spectra of ΔW_q, of ΔW_k and of Δ3.
        hidden: D.

    Attributes:
        delta2: columns [H].
        of_heads, of_groups: columns [H, any], [G, any] that stand side by side.
        outliers: [H], outlying singular values of ΔW_q.
    """

    def __init__(self, delta2: Measures, singles: torch.Tensor, hidden: int) -> None:
        heads = len(delta2.frobenius)
        groups = len(singles) - 2 * heads
        table = torch.stack(_columns(measures(singles)), dim=1)
        query, key, delta3 = table.split_with_sizes([heads, groups, heads])
        noise = torch.stack(spike(singles[: heads + groups], hidden), dim=1)
        in_query, in_key = noise.split_with_sizes([heads, groups])
        self.delta2 = _columns(delta2)
        self.of_heads = delta3, query, in_query
        self.of_groups = key, in_key
        self.outliers = in_query[:, _SPIKE.index("outliers")]


def _columns(found: Measures) -> list[torch.Tensor]:
    """The measures [n] that have a column of their own."""
    return [getattr(found, name) for name in _MEASURES]


def _parts(gram: Gram | WholeGram, numbers: list[int], of: int) -> Gram | WholeGram:
    """Some of so many equal parts of Gram matrices."""
    parts = ([block.chunk(of)[n] for n in numbers] for block in gram)
    return type(gram)(*(some[0] if len(some) == 1 else torch.cat(some) for some in parts))
