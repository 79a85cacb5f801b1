"""Putting the data back when a run goes back in place.

Only the training script knows its data. It is asked through ``on_rollback``; DeepSpeed's own loader
(``training_data`` of ``deepspeed.initialize``) can be put back without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from torch.utils.data import DistributedSampler, Sampler, SequentialSampler


def data_way(
    engine: Any, on_rollback: Callable[[int], None] | None
) -> Callable[[int], None] | None:
    """A function that lets the data go on from a position in sequences; None where there is none.

    Args:
        on_rollback: the training script's own, which goes first.
    """
    if on_rollback is not None:
        return on_rollback
    loader = engine.training_dataloader
    if not isinstance(loader, DeepSpeedDataLoader) or loader.data is None:
        return None  # there is none, or the script doesn't draw from it
    if not isinstance(loader.data_sampler, (DistributedSampler, SequentialSampler)):
        return None  # whether its order can be drawn again is not known
    before = engine.global_samples

    def put_back(position: int) -> None:
        _put_back(engine, loader, before, position)

    return put_back


def _put_back(engine: Any, loader: DeepSpeedDataLoader, before: int, position: int) -> None:
    """Let the iterator over DeepSpeed's loader that the script holds go on from another batch.

    Where the script numbers its epochs for the sampler, the sampler gets the number that belongs
    to the position; the script's own loop over epochs is not moved.
    """
    batch = engine.train_batch_size() // engine.gradient_accumulation_steps()
    epoch, first = divmod(-(-position // batch), len(loader))
    sampler = loader.data_sampler
    numbered = getattr(sampler, "epoch", None) == (before - 1) // batch // len(loader)
    if numbered:
        sampler.set_epoch(epoch)
    loader.data_sampler = _From(sampler, first * loader.batch_size)
    try:
        iter(loader)
    finally:
        loader.data_sampler = sampler


class _From(Sampler):
    """A sampler without its first indices; they are drawn and thrown away, not loaded."""

    def __init__(self, sampler: Sampler, first: int) -> None:
        self._sampler, self._first = sampler, first

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self._sampler), self._first, None)

    def __len__(self) -> int:
        return len(self._sampler) - self._first
