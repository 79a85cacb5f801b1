"""Adam's state of every layer's parameters under DeepSpeed, each element on one rank only.

DeepSpeed wraps the optimizer and lets it step on main weights of its own:

===============================  ==================================  ==========================
training in                      main weights                        counted by
===============================  ==================================  ==========================
fp32, stage 0                    the parameters                      data replicas in turn
bf16 or fp16, stage 0            whole fp32 copies, flat or not      data replicas in turn
stages 1, 2 and BF16_Optimizer   a flat piece on each data replica   the replica that has it
stage 3                          a flat shard on each data replica   the replica that has it
===============================  ==================================  ==========================

Data replicas of an expert are those of its expert data-parallel group. Padding counts nowhere.

The gradient as Adam took it (unscaled, clipped) is gone when the engine's step ends, and learning
rates have moved on. So a hook after the wrapped optimizer's own step keeps what made the step, with
copies of the gradients of those layers that are about to be read. A step that is skipped for
overflow never gets there: its sample has no reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups

from ... import parallel
from ...monitors.base import StepState
from ...runtime import Runtime
from ...signals.optimizer import AdamStep
from ...views import AdamState, ModelView, OptimizerView
from .describe import ModuleDescription

_ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")


@dataclass(eq=False, kw_only=True)
class Piece:
    """The elements of one parameter that this rank counts: ``size`` of a main weight's."""

    layer: int
    main: torch.Tensor
    start: int
    size: int
    #: what made the step in progress, and the gradient; None where it made none
    noted: tuple[AdamStep, torch.Tensor | None] | None = None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """These elements of a tensor with the main weight's shape, [size]."""
        return whole.detach().reshape(-1).narrow(0, self.start, self.size)


class AdamSteps:
    """Notes of an Adam's steps what is gone when the engine's step ends.

    Args:
        optimizer: the optimizer that DeepSpeed wraps.
        pieces: what this rank counts.
        state: the step in progress, which the runtime writes.
        searched_from: number of the first step with a history of gradients, to find spikes by.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        pieces: list[Piece],
        state: StepState,
        *,
        searched_from: int,
    ) -> None:
        self._optimizer, self._pieces, self._state = optimizer, pieces, state
        self._searched_from = searched_from
        self._by_main: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._by_main.setdefault(id(piece.main), []).append(piece)
        #: whether a layer is read at the sample of an iteration
        self._reads: Callable[[int, int], bool] = lambda layer, iteration: False

    def views(self) -> list[OptimizerView]:
        """What the monitor reads; each once a sample."""
        return [OptimizerView(layer=p.layer, read=partial(self._read, p)) for p in self._pieces]

    def listen(self, runtime: Runtime) -> None:
        """Take notes from here on, where the monitor is on, of what it is about to read."""
        monitor = next((m for m in runtime.crew.monitors if m.name == "optimizer"), None)
        if monitor is not None:
            self._reads = monitor.reads
            self._optimizer.register_step_post_hook(runtime.crew.guarded(monitor, self._note))

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The wrapped optimizer has stepped on all or, under ZeRO, some of its main weights."""
        for group in optimizer.param_groups:
            stepped = [main for main in group["params"] if main.grad is not None]
            for main in stepped:
                pieces = [
                    piece
                    for piece in self._by_main.get(id(main), ())
                    if self._reads(piece.layer, self._state.iteration)
                ]
                if not pieces:
                    continue
                # FusedAdam counts the steps of a group with the last of its tensors
                fused = type(optimizer).__name__ == "FusedAdam"
                made = _made(optimizer, group, optimizer.state[stepped[-1] if fused else main])
                # where decay is a part of the gradient, what Adam took is nowhere whole
                mixed = group["weight_decay"] and not made.weight_decay
                searched = made.step >= self._searched_from and not mixed
                for piece in pieces:
                    piece.noted = (made, piece.of(main.grad).clone() if searched else None)

    def _read(self, piece: Piece) -> AdamState | None:
        noted, piece.noted = piece.noted, None
        if noted is None:
            return None
        state = self._optimizer.state[piece.main]
        return AdamState(
            weight=piece.of(piece.main),
            gradient=noted[1],
            m=piece.of(state["exp_avg"]),
            v=piece.of(state["exp_avg_sq"]),
            made=noted[0],
        )


def take_optimizer(found: ModuleDescription, engine: Any, state: StepState) -> AdamSteps | None:
    """Enter what this rank is to count of the optimizer's state, or say why it can't be read.

    Args:
        found: the engine's module as described.
        engine: the engine.
        state: the step in progress, which the runtime writes.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if optimizer is None:
        return None
    reason = _why_not(engine, optimizer)
    if reason is None and not found.layers:
        reason = "no layers were found in a list of modules"
    if reason is not None:
        found.view.left_out.append(f"optimizer signals: {reason}")
        return None
    places = {id(parameter): place for parameter, place in _places(engine)}
    pieces = []
    for number, (layer, parameter) in enumerate(_parameters(found)):
        place = places.get(id(parameter))
        if place is None or not (place.partitioned or _is_my_turn(parameter, number, engine)):
            continue
        reason = _why_not_main(place.main, found.view)
        if reason is None:
            pieces.append(
                Piece(layer=layer, main=place.main, start=place.start, size=place.size)
            )
        elif reason not in found.view.left_out:
            found.view.left_out.append(reason)
    # where it keeps whole copies, DeepSpeed begins with a step on gradients of zero
    begun = 1 if type(engine.optimizer).__name__ in _COPIES else 0
    steps = AdamSteps(optimizer, pieces, state, searched_from=begun + 2)
    found.view.optimizer = steps.views()
    return steps


def _parameters(found: ModuleDescription) -> Iterator[tuple[int, torch.nn.Parameter]]:
    for layer, module in sorted(found.layers.items()):
        for parameter in module.parameters():
            if parameter.requires_grad:
                yield layer, parameter


def _is_my_turn(parameter: torch.nn.Parameter, number: int, engine: Any) -> bool:
    """Whether a parameter that all its data replicas have whole is this one's to count."""
    if is_moe_param(parameter):
        replicas = groups._get_expert_data_parallel_group(parameter.group_name)
    else:
        replicas = engine.seq_data_parallel_group
    return number % dist.get_world_size(replicas) == dist.get_rank(replicas)


def _why_not(engine: Any, optimizer: torch.optim.Optimizer) -> str | None:
    wrapper, name = engine.optimizer, type(optimizer).__name__
    if name not in _ADAMS:
        return f"{name} is not an Adam that is known"
    if wrapper is not optimizer and type(wrapper).__name__ not in _WRAPPERS:
        return f"{type(wrapper).__name__} keeps the state in a way that is not known"
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("fused"):
            return "this Adam counts its steps on the device, where nobody may wait for it"
        if group.get("amsgrad") or group.get("maximize") or not group.get("bias_correction", True):
            return "with amsgrad, maximize or without bias correction Adam's rule is another one"
    if getattr(wrapper, "swap_optimizer", False):
        return "its state is kept on NVMe"
    if getattr(wrapper, "backup_optimizer", None) is not None:
        return "its state is divided between host and device"
    if dist.get_world_size(engine.seq_data_parallel_group) != parallel.world_size():
        return "ranks hold different parts of a layer, and which is not known"
    return None


def _why_not_main(main: torch.Tensor, view: ModelView) -> str | None:
    if main.device.type != view.device.type:
        return "optimizer signals: the state is offloaded to the host, where reading it is slow"
    if main.dtype != torch.float32:
        return f"optimizer signals: the main weights are {str(main.dtype).removeprefix('torch.')}"
    return None


def _made(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> AdamStep:
    # decoupled: torch says it of each group since its AdamW is an Adam, DeepSpeed's of the whole
    decoupled = group.get("decoupled_weight_decay", getattr(optimizer, "adam_w_mode", False))
    beta1, beta2 = group["betas"]
    return AdamStep(
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"] if decoupled else 0.0,
        # a number, or torch's tensor on the host; Apex counts for a group
        step=int(state["step"] if "step" in state else group["step"]),
    )


@dataclass(frozen=True)
class _Place:
    """Where the main weight of a parameter is on this rank."""

    main: torch.Tensor
    start: int
    size: int
    #: no other rank has these elements
    partitioned: bool = False


_Places = Iterator[tuple[torch.nn.Parameter, _Place]]


def _places(engine: Any) -> _Places:
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        for group in wrapper.param_groups:
            for parameter in group["params"]:
                yield parameter, _Place(parameter, 0, parameter.numel())
    else:
        yield from _WRAPPERS[type(wrapper).__name__](wrapper)


def _flat_copies(wrapper: Any) -> _Places:
    for parameters, main in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
        start = 0
        for parameter in parameters:
            yield parameter, _Place(main, start, parameter.numel())
            start += parameter.numel()


def _copies(wrapper: Any) -> _Places:
    for parameters, mains in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for parameter, main in zip(parameters, mains, strict=True):
            yield parameter, _Place(main, 0, main.numel())


def _flat_pieces(of_model: str, of_rank: str, wrapper: Any) -> _Places:
    for parameters, main in zip(
        getattr(wrapper, of_model), getattr(wrapper, of_rank), strict=True
    ):
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                here = parameter._hp_mapping.hp_fragment_address
                yield parameter, _Place(main, here.start, here.numel, partitioned=True)


def _shards(wrapper: Any) -> _Places:
    for parameters, main in zip(
        wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True
    ):
        start = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            rank = dist.get_rank(getattr(parameter, "ds_process_group", wrapper.dp_process_group))
            # the last shards are filled up to the size of the others
            own = min(size, parameter.ds_numel - rank * size)
            if own > 0:
                yield parameter, _Place(main, start, own, partitioned=True)
            start += size


_COPIES: dict[str, Callable[[Any], _Places]] = {
    "FP16_Optimizer": _flat_copies,
    "FP16_UnfusedOptimizer": _copies,
}
_WRAPPERS = _COPIES | {
    "BF16_Optimizer": partial(_flat_pieces, "bf16_groups", "fp32_groups_flat_partition"),
    "DeepSpeedZeroOptimizer": partial(
        _flat_pieces, "bit16_groups", "single_partition_of_fp32_groups"
    ),
    "DeepSpeedZeroOptimizer_Stage3": _shards,
}
