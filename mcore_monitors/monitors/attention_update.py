"""Attention-update signals: does the QK bilinear update collapse onto few directions?

Records ``attention/delta2_effective_rank@W`` per head for each window of ``W`` iterations
(:func:`mcore_monitors.signals.spectra.delta2_effective_rank`).
"""

from __future__ import annotations

import torch

from ..signals.spectra import delta2_effective_rank
from ..views import AttentionView, ModelView
from .base import Monitor, Readings, mean_by_layer


class AttentionUpdateMonitor(Monitor):
    """Compares the query and key weights with their snapshots of one window ago.

    Query groups are shared out over the ranks that hold the same weights, so both the work and the
    snapshots of a rank are (QK weights) / (replicas). Snapshots sit at absolute iterations, so that
    a resumed run continues the same grid; its first readings come one window after the resume.

    Args:
        model: what the host shows.
        windows: window lengths in iterations, each a multiple of ``interval``.
        interval: iterations between samples.
    """

    name = "attention_update"

    def __init__(self, model: ModelView, windows: list[int], interval: int) -> None:
        self._shape = (model.layers, model.heads)
        self._windows = sorted(windows)
        self._depth = self._windows[-1] // interval
        self._pieces: list[tuple[AttentionView, list[int]]] = []
        piece = 0
        for view in model.attention:
            mine = [g for g in range(view.groups) if view.replica.owns(piece + g)]
            piece += view.groups
            if mine:
                self._pieces.append((view, mine))
        # iteration -> (W_q [H, d, D], W_k [G, d, D]) of this rank's groups, fp32
        self._snapshots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def schema(self) -> dict[str, tuple[int, ...]]:
        fields = {}
        for window in self._windows:
            fields[f"rank@{window}"] = self._shape
            fields[f"count@{window}"] = self._shape
        return fields

    @property
    def snapshot_bytes(self) -> int:
        """Bytes held in snapshots on this rank."""
        return sum(q.nbytes + k.nbytes for q, k in self._snapshots.values())

    @torch.no_grad()
    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = [], []
        for view, groups in self._pieces:
            wq, wk = view.read()
            wq = wq.unflatten(0, (view.groups, view.heads_per_group))
            queries += [wq[g] for g in groups]  # slices: a list as an index would sync a GPU
            keys += [wk[g] for g in groups]
        # cat and stack copy, so the snapshot does not follow the live parameters
        return torch.cat(queries).float(), torch.stack(keys).float()

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        if not self._pieces:
            return
        new = self._gather()
        ready = [w for w in self._windows if iteration - w in self._snapshots]
        if ready:
            self._compare(ready, iteration, new, fields)
        self._snapshots[iteration] = new
        oldest = iteration - self._windows[-1]
        for stale in [i for i in self._snapshots if i <= oldest]:
            del self._snapshots[stale]

    def _compare(
        self,
        windows: list[int],
        iteration: int,
        new: tuple[torch.Tensor, torch.Tensor],
        fields: dict[str, torch.Tensor],
    ) -> None:
        """Add the effective ranks of all windows into ``fields``, through one batched call.

        One call, because the eigensolver on a GPU waits for the device once a call.
        """
        old = [self._snapshots[iteration - w] for w in windows]
        ranks = delta2_effective_rank(
            torch.cat([q for q, _ in old]),
            torch.cat([k for _, k in old]),
            new[0].repeat(len(windows), 1, 1),
            new[1].repeat(len(windows), 1, 1),
        ).unflatten(0, (len(windows), -1))
        for window, row in zip(windows, ranks, strict=True):
            start = 0
            for view, groups in self._pieces:
                n = view.heads_per_group
                for group in groups:
                    head = (view.first_group + group) * n
                    place = (view.layer - 1, slice(head, head + n))
                    fields[f"rank@{window}"][place] += row[start : start + n]
                    fields[f"count@{window}"][place] += 1
                    start += n

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        return {
            f"attention/delta2_effective_rank@{window}": by_layer
            for window in self._windows
            if (by_layer := mean_by_layer(fields[f"rank@{window}"], fields[f"count@{window}"]))
        }
