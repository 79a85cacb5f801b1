"""Adam's state of every layer's parameters, each element on one rank only.

Who counts what: a parameter that tensor parallelism replicates (norms, routers) counts on its first
tensor-parallel rank. Data replicas share the parameters out; with the distributed optimizer they
hold disjoint pieces already, and each counts its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from ...signals.optimizer import AdamStep
from ...views import AdamState, OptimizerView
from .main_weights import chained, is_distributed, keeps_its_own


def optimizer_views(
    chunks: list[torch.nn.Module], optimizer: Any, groups: Any
) -> tuple[list[OptimizerView], list[str]]:
    """The parameters that this rank is to count, and a sentence for each thing left out.

    Args:
        chunks: the model chunks of this rank.
        optimizer: Megatron's optimizer, chained or not; None has no state.
        groups: the model's process groups.
    """
    if optimizer is None:
        return [], []
    readers, left_out = [], []
    for one in chained(optimizer):
        reason = _why_not(one)
        if reason is None:
            _note_steps(one)
            readers.append(_Pieces(one) if is_distributed(one) else _Whole(one, groups))
        else:
            left_out.append(f"optimizer signals: {reason}")
    views = []
    for number, (layer, parameter) in enumerate(_parameters(chunks)):
        if not parameter.requires_grad or _is_copy(parameter, groups):
            continue
        for reader in readers:
            if reader.counts(parameter, number):
                views.append(OptimizerView(layer=layer, read=partial(reader.read, parameter)))
    return views, list(dict.fromkeys(left_out))


def _parameters(chunks: list[torch.nn.Module]) -> Iterator[tuple[int, torch.nn.Parameter]]:
    """(global layer number, parameter) of the transformer layers of this rank."""
    for chunk in chunks:
        for block in chunk.modules():
            if isinstance(block, TransformerBlock):
                for layer in block.layers:
                    for parameter in layer.parameters():
                        yield layer.layer_number, parameter


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _is_copy(parameter: torch.nn.Parameter, groups: Any) -> bool:
    """Whether a lower tensor-parallel rank has the same parameter."""
    if getattr(parameter, "tensor_model_parallel", False):
        return False
    return (groups.expt_tp if _is_expert(parameter) else groups.tp).rank() > 0


def _why_not(optimizer: Any) -> str | None:
    inner = getattr(optimizer, "optimizer", None)
    if keeps_its_own(optimizer):
        return "the precision-aware optimizer keeps its state in a format of its own"
    if not type(inner).__name__.endswith(("Adam", "AdamW")):
        return f"{type(inner).__name__} is not Adam"
    if any(group.get("capturable") or group.get("fused") for group in inner.param_groups):
        return "this Adam counts its steps on the device, where nobody may wait for it"
    return None


def _note_steps(optimizer: Any) -> None:
    """Keep learning rate and weight decay of the step: by a sample the schedule has moved on."""

    def note(inner: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.mcore_monitors_step = [
            (float(group["lr"]), group["weight_decay"]) for group in inner.param_groups
        ]

    optimizer.optimizer.register_step_post_hook(note)


class _Whole:
    """An optimizer with the whole state of its parameters on every data replica."""

    def __init__(self, optimizer: Any, groups: Any) -> None:
        self._optimizer, self._groups = optimizer, groups
        # by number, since loading a checkpoint makes new groups
        self._group_of = {
            id(parameter): number
            for number, group in enumerate(optimizer.optimizer.param_groups)
            for parameter in group["params"]
        }

    def _main(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        main = getattr(parameter, "main_param", None)
        return parameter if main is None else main

    def counts(self, parameter: torch.nn.Parameter, number: int) -> bool:
        replicas = self._groups.expt_dp if _is_expert(parameter) else self._groups.dp_cp
        mine = number % replicas.size() == replicas.rank()
        return mine and id(self._main(parameter)) in self._group_of

    def read(self, parameter: torch.nn.Parameter) -> AdamState | None:
        main = self._main(parameter)
        return _state(self._optimizer, main, self._group_of[id(main)])


class _Pieces:
    """A distributed optimizer: each data replica has a piece of some parameters."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        # several instances hold the same pieces and share them out
        self._instance = optimizer.distributed_optimizer_instance_id
        self._instances = optimizer.ddp_config.num_distributed_optimizer_instances

    def counts(self, parameter: torch.nn.Parameter, number: int) -> bool:
        mine = number % self._instances == self._instance
        return mine and parameter in self._optimizer.model_param_gbuf_map

    def read(self, parameter: torch.nn.Parameter) -> AdamState | None:
        group, order = self._optimizer.model_param_group_index_map[parameter]
        main = self._optimizer.optimizer.param_groups[group]["params"][order]
        return _state(self._optimizer, main, group)


def _state(optimizer: Any, main: torch.Tensor, group_number: int) -> AdamState | None:
    state = optimizer.optimizer.state.get(main)
    if not state or "exp_avg_sq" not in state or not hasattr(optimizer, "mcore_monitors_step"):
        return None
    group = optimizer.optimizer.param_groups[group_number]
    # torch counts steps for each parameter, on the host; Transformer Engine and Apex for a group
    step = int(state["step"] if "step" in state else group["step"])
    if step < 1:
        return None
    config = optimizer.config
    lr, weight_decay = optimizer.mcore_monitors_step[group_number]
    # where 8-bit weights are gathered through the gradients' memory, these are overwritten
    reused = getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False)
    decoupled = getattr(config, "decoupled_weight_decay", True)
    beta1, beta2 = group["betas"]
    return AdamState(
        weight=main.detach(),
        gradient=None if reused or main.grad is None else main.grad.detach(),
        m=state["exp_avg"],
        v=state["exp_avg_sq"],
        made=AdamStep(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=weight_decay if decoupled else 0.0,
            step=step,
        ),
    )
