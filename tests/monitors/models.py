"""Hand-made models: live weights that train a little, and the views that a host would give."""

from __future__ import annotations

import torch

from mcore_monitors.monitors.base import Monitor, Readings
from mcore_monitors.parallel import Packed
from mcore_monitors.views import AttentionView, ModelView, Replica, RouterView

CPU = torch.device("cpu")
ALONE = Replica()


class TinyModel:
    """Weights of a few layers; ``train`` moves them in place, as an optimizer does.

    Args:
        layers, groups, heads_per_group, head_dim, hidden, experts: sizes.
        dtype: number format of the weights.
    """

    def __init__(
        self,
        layers: int = 2,
        groups: int = 2,
        heads_per_group: int = 2,
        head_dim: int = 4,
        hidden: int = 16,
        experts: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers, self.groups, self.heads_per_group = layers, groups, heads_per_group
        self.experts, self.head_dim = experts, head_dim
        self._generator = torch.Generator().manual_seed(layers + 10 * groups)
        heads = groups * heads_per_group
        self.query = [self._normal(heads, head_dim, hidden).to(dtype) for _ in range(layers)]
        self.key = [self._normal(groups, head_dim, hidden).to(dtype) for _ in range(layers)]
        self.router = [self._normal(experts, hidden).to(dtype) for _ in range(layers)]

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def train(self) -> None:
        """One small update of every weight."""
        for weight in (*self.query, *self.key, *self.router):
            weight += 0.01 * self._normal(*weight.shape).to(weight.dtype)

    def copy(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q [H, d, D] and W_k [G, d, D] of a layer (from 1) as they are now."""
        return self.query[layer - 1].clone(), self.key[layer - 1].clone()

    def view(
        self,
        replica: Replica = ALONE,
        *,
        layers: range | None = None,
        groups: range | None = None,
    ) -> ModelView:
        """What a rank shows that holds ``layers`` and, of each, ``groups`` (all by default)."""
        layers = range(1, self.layers + 1) if layers is None else layers
        groups = range(self.groups) if groups is None else groups
        view = ModelView(
            layers=self.layers,
            heads=self.groups * self.heads_per_group,
            groups=self.groups,
            experts=self.experts,
            device=CPU,
            activation_dtype=torch.float32,
            sequence_length=8,
            head_dim=self.head_dim,
        )
        for layer in layers:
            view.attention.append(self._attention(layer, groups, replica))
            weight = self.router[layer - 1]
            view.routers.append(RouterView(layer=layer, read=lambda w=weight: w, replica=replica))
            view.conserves_attention(layer, groups.start, len(groups))
        return view

    def _attention(self, layer: int, groups: range, replica: Replica) -> AttentionView:
        n = self.heads_per_group
        query = self.query[layer - 1][groups.start * n : groups.stop * n]
        key = self.key[layer - 1][groups.start : groups.stop]
        return AttentionView(
            layer=layer,
            first_group=groups.start,
            groups=len(groups),
            heads_per_group=n,
            read=lambda: (query, key),
            replica=replica,
        )


def reduced(monitors: list[Monitor], iteration: int) -> dict[str, torch.Tensor]:
    """Let all ranks' monitors collect into one buffer: the sum that the collective gives."""
    packed = Packed(monitors[0].schema(), CPU)
    for monitor in monitors:
        monitor.collect(iteration, packed.fields)
    return packed.reduce()


def sample(monitors: list[Monitor], iteration: int) -> Readings:
    """The readings of one sample over all ranks, without signals that nobody read."""
    readings = monitors[0].read(reduced(monitors, iteration))
    return {name: layers for name, layers in readings.items() if layers}
