"""The weights as Megatron's optimizer keeps them: fp32 also where the model's own are bfloat16.

An update of a few steps at a small learning rate is smaller than half a bfloat16 step, so that
differences of bfloat16 weights are mostly rounding. Three keepings are known:

- no mixed precision: the parameter itself;
- ``Float16OptimizerWithFloat16Params``: ``parameter.main_param``, of the same shape;
- the distributed optimizer: a flat piece of each parameter on each data-parallel rank, cut without
  regard to rows. A read adds the pieces up over that group, so all its ranks read together.

The precision-aware optimizer keeps its main weights inside Transformer Engine's Adam, and
Megatron's FSDP shards the model itself; there the model's own weights are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...parallel import GroupSum


def chained(optimizer: Any) -> Iterator[Any]:
    """Megatron's optimizers one by one: the dense parameters', the experts', of every chunk."""
    for inner in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        if inner is not None and not getattr(inner, "is_stub_optimizer", False):
            yield inner


def is_distributed(optimizer: Any) -> bool:
    """Whether an optimizer keeps flat pieces of parameters (Megatron's DistributedOptimizer)."""
    return hasattr(optimizer, "model_param_gbuf_map")


def keeps_its_own(optimizer: Any) -> bool:
    """Whether main weights are inside Transformer Engine's Adam, where nobody else reads them."""
    config = optimizer.config
    return bool(getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


def piece_of(optimizer: Any, parameter: torch.nn.Parameter) -> tuple[slice, torch.Tensor] | None:
    """A rank's piece of a parameter: its place in the flat parameter, and the main weight.

    Args:
        optimizer: a distributed optimizer.

    Returns:
        None where all of the parameter belongs to other ranks.
    """
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    where = optimizer._get_model_param_range_map(parameter)["param"]
    group, order = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    return slice(where.start, where.end), main


class MainWeights:
    """Reads parameters in the best precision that there is.

    Args:
        optimizer: Megatron's optimizer, chained or not; None reads the model's own weights.
    """

    def __init__(self, optimizer: Any = None) -> None:
        self._sharded: list[tuple[Any, GroupSum]] = []
        for one in chained(optimizer):
            if is_distributed(one) and not keeps_its_own(one):
                self._sharded.append((one, GroupSum(one.data_parallel_group)))

    def _keeper(self, parameter: torch.nn.Parameter) -> tuple[Any, GroupSum] | None:
        """The distributed optimizer that has the only good copy of a parameter, and its ranks."""
        for optimizer, total in self._sharded:
            if any(parameter in buffer.param_to_bucket for buffer in optimizer.buffers):
                stale = optimizer.ddp_config.overlap_param_gather  # complete in the next forward
                return (optimizer, total) if _is_rounded(parameter) or stale else None
        return None

    def gathers(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether reading these parameters waits for other ranks; the same on all of those."""
        keepers = (self._keeper(p) for p in parameters)
        return any(k is not None and k[1].size > 1 for k in keepers)

    def rounded(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether some of these parameters exist in 16 bits only."""
        return any(
            _is_rounded(p) and _whole(p) is None and self._keeper(p) is None for p in parameters
        )

    def local(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A parameter in the best precision that this rank holds whole; waits for nobody."""
        main = _whole(parameter)
        return parameter.detach() if main is None else main

    def __call__(self, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
        """The weights of some parameters, through one collective where any has to be gathered.

        Every data-parallel rank gives the same parameters in the same order.
        """
        if not self._sharded:
            return [self.local(p) for p in parameters]
        whole = {i: w for i, p in enumerate(parameters) if (w := _whole(p)) is not None}
        found: dict[int, torch.Tensor] = {}
        for optimizer, total in self._sharded:
            kept = [
                i
                for i, p in enumerate(parameters)
                if i not in whole and (k := self._keeper(p)) is not None and k[0] is optimizer
            ]
            if kept:
                gathered = _gather(optimizer, [parameters[i] for i in kept], total)
                found |= dict(zip(kept, gathered, strict=True))
        return [
            whole.get(i, found.get(i, p.detach())) for i, p in enumerate(parameters)
        ]


def _is_rounded(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    main = getattr(parameter, "main_param", None)
    sharded = getattr(parameter, "main_param_sharded", False)
    if main is None or sharded or main.shape != parameter.shape:
        return None
    return main.detach()


def _gather(
    optimizer: Any, parameters: list[torch.nn.Parameter], total: GroupSum
) -> list[torch.Tensor]:
    """Parameters put together from all ranks' pieces: zeros with the own piece, added up."""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    parts = flat.split(sizes)
    for parameter, part in zip(parameters, parts, strict=True):
        piece = piece_of(optimizer, parameter)
        if piece is not None:
            part[piece[0]] = piece[1].detach().view(-1)
    total(flat)
    return [part.view(p.shape) for p, part in zip(parameters, parts, strict=True)]
