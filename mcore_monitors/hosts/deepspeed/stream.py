"""The residual stream of a DeepSpeed engine's module, and the learning rate of its schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ... import parallel
from ...parallel import GroupReduce
from ...runtime import Runtime
from ...views import ResidualStream
from ..huggingface.blocks import tapped
from ..observed_layer import LayerTap
from .describe import ModuleDescription


def take_stream(found: ModuleDescription, engine: Any) -> None:
    """Enter the residual stream, or say why it can't be read."""
    view, world = found.view, parallel.world_size()
    if not found.layers or not found.width:
        view.left_out.append(
            "residual stream: no layers of one width were found in a list of modules"
        )
        return
    if engine.dp_world_size != world:
        view.left_out.append(
            "residual stream: ranks share sequences or layers, and which tokens pass through which "
            "rank is not known"
        )
        return
    view.residual = ResidualStream(
        width=found.width,
        sequences=engine.train_batch_size(),
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        replica=view.data,
        layers=tuple(sorted(found.layers)),
        onto=GroupReduce(dist.group.WORLD if parallel.in_use() else None),
    )


def tapped_layers(layers: dict[int, nn.Module], runtime: Runtime) -> dict[int, LayerTap]:
    """Give each layer a tap of its own, where its profile is wanted."""
    koopman = next((m for m in runtime.crew.monitors if m.name == "koopman"), None)
    if koopman is None:
        return {}
    return tapped(layers, runtime.state, koopman.every)


def largest_rate(engine: Any) -> float | None:
    """The largest learning rate of the engine's schedule, as far as its settings say it."""
    for given, name in (
        (engine.scheduler_params(), "warmup_max_lr"),
        (engine.optimizer_params(), "lr"),
    ):
        if given and isinstance(given.get(name), int | float):
            return float(given[name])
    groups = engine.optimizer.param_groups if engine.optimizer is not None else []
    rates = [float(torch.as_tensor(g.get("initial_lr", g["lr"]))) for g in groups]
    return max(rates, default=None)
