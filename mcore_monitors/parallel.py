"""The one place where ranks talk.

A sample costs one all-reduce: each monitor adds into named fields of one flat float64 buffer whose
layout is fixed when the run starts and is the same on every rank. Fields hold sums (a numerator
and its count), so that tensor, sequence, expert, pipeline, context and data parallelism all reduce
by the same addition, and a rank that owns nothing of a field leaves zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist


def in_use() -> bool:
    """Whether there is more than this one process to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Global rank, 0 where there is one process only."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Packed:
    """Named float64 fields in one flat buffer, added up over all ranks in one collective.

    Args:
        schema: field name to shape; must be the same, in the same order, on every rank.
        device: where the model's parameters live; the collective runs there too.
    """

    def __init__(self, schema: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self.schema = dict(schema)
        self._sizes = [math.prod(shape) for shape in schema.values()]
        self._flat = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self.fields = self._views(self._flat)
        # views are made once: for a small model they cost as much as the collective
        self._host = torch.empty(self._flat.shape, dtype=torch.float64, device="cpu")
        self._reduced = self._views(self._host)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split_with_sizes(self._sizes)
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.schema.items(), parts, strict=True)
        }

    @property
    def nbytes(self) -> int:
        """Size of the collective in bytes."""
        return self._flat.numel() * self._flat.element_size()

    def reduce(self) -> dict[str, torch.Tensor]:
        """Add up over all ranks and bring the result to the host.

        The copy to the host is the one synchronisation of a sample. The buffer is zero afterwards.

        Returns:
            field name to float64 CPU tensor, the same on every rank. They hold until the next call,
            which writes into them.
        """
        if in_use():
            dist.all_reduce(self._flat)
        self._host.copy_(self._flat)
        self._flat.zero_()
        return self._reduced


def broadcast_code(code: int, device: torch.device) -> int:
    """Give every rank the decision of rank 0, so that no two ranks act differently."""
    if not in_use():
        return code
    carrier = torch.tensor([code], dtype=torch.int64, device=device)
    dist.broadcast(carrier, src=0)
    return int(carrier.item())


def from_rank_0(thing: Any) -> Any:
    """Give every rank the object of rank 0 (pickled). For start-up and rollbacks only."""
    if not in_use():
        return thing
    carrier = [thing]
    dist.broadcast_object_list(carrier, src=0)
    return carrier[0]


def union_of_texts(texts: list[str]) -> list[str]:
    """All ranks' texts, each once, the same list on every rank. For start-up only."""
    gathered = [texts]
    if in_use():
        gathered = [[] for _ in range(world_size())]
        dist.all_gather_object(gathered, texts)
    return list(dict.fromkeys(text for part in gathered for text in part))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank. Waits for the device."""
    if not in_use():
        return flag
    carrier = torch.tensor([int(flag)], dtype=torch.int64, device=device)
    dist.all_reduce(carrier, op=dist.ReduceOp.MAX)
    return bool(carrier.item())


class GroupReduce:
    """Adds a tensor up over one process group, onto one of its ranks.

    For what is too large for the packed buffer and is needed on one rank only.

    Attributes:
        size: ranks of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self._rank = dist.get_rank(group) if group is not None else 0

    def __call__(self, tensor: torch.Tensor, owner: int) -> bool:
        """Add up, in place; every rank of the group calls it, in the same order.

        Args:
            owner: rank in the group that gets the sum; on the others the tensor is undefined then.

        Returns:
            whether this rank is the owner.
        """
        if self.size > 1:
            dist.reduce(tensor, dist.get_global_rank(self._group, owner), group=self._group)
        return self._rank == owner


class GroupSum:
    """Adds a tensor up over one process group; nothing where the group is one rank.

    Monitors get this for context parallelism, where a sequence is spread over ranks and a sum over
    the whole sequence has to be complete before its norm may be taken.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor
