"""Walk a DeepSpeed engine's module and describe its mixture-of-experts gates to the monitors.

DeepSpeed numbers no layers; gates are counted from 1 in the order of ``named_modules``. Attention
is the user's own here and is not watched yet; that is said once at the start.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate

from ...views import ModelView, Replica, RouterView


def describe(engine: Any) -> tuple[ModelView, dict[int, TopKGate]]:
    """Return what monitors may see of an engine's module, and its gates by number."""
    gates = dict(enumerate(
        (m for m in engine.module.modules() if isinstance(m, TopKGate)), start=1
    ))
    parameter = next(engine.module.parameters())
    view = ModelView(
        layers=max(1, len(gates)),
        heads=1,
        groups=1,
        experts=max((gate.wg.out_features for gate in gates.values()), default=1),
        router_score="softmax",
        device=engine.device,
        activation_dtype=parameter.dtype,
        sequence_length=0,
    )
    view.left_out.append("attention: on DeepSpeed only mixture-of-experts gates are watched so far")
    # a gate's weight is the same on every rank of the data-parallel world
    replica = Replica(rank=dist.get_rank(), size=dist.get_world_size())
    sharded = any(hasattr(gate.wg.weight, "ds_id") for gate in gates.values())
    if sharded:
        view.left_out.append("router weights: ZeRO stage 3 shards them; only logits are watched")
    for layer, gate in gates.items():
        if gate.wg.out_features != view.experts:
            view.left_out.append(
                f"gate {layer}: it has {gate.wg.out_features} experts, others {view.experts}"
            )
            continue
        read = None if sharded else partial(_weight, gate)
        view.routers.append(RouterView(layer=layer, read=read, replica=replica))
    return view, gates


def _weight(gate: TopKGate) -> torch.Tensor:
    return gate.wg.weight.detach()
