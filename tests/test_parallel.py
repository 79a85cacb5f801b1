"""Ranks talk in one place: the packed collective and the few words at start-up."""

from __future__ import annotations

import pytest
import torch

from mcore_monitors import parallel
from mcore_monitors.parallel import GroupSum, Packed
from mcore_monitors.views import Replica

from . import distributed

SCHEMA = {"loss": (3,), "router/entropy": (2, 1), "attention/rank": (2, 4), "none": (0, 4)}
CPU = torch.device("cpu")


def test_layout() -> None:
    packed = Packed(SCHEMA, CPU)
    assert {name: tuple(f.shape) for name, f in packed.fields.items()} == SCHEMA
    assert all(f.dtype == torch.float64 for f in packed.fields.values())
    assert packed.nbytes == 8 * (3 + 2 + 8)
    packed.fields["router/entropy"][1] += 2.5
    packed.fields["attention/rank"][0, 3] += 7
    reduced = packed.reduce()
    assert reduced["loss"].tolist() == [0, 0, 0]
    assert reduced["router/entropy"].tolist() == [[0], [2.5]]
    assert reduced["attention/rank"].tolist() == [[0, 0, 0, 7], [0, 0, 0, 0]]


def test_what_was_reduced_stays_while_the_buffer_starts_anew() -> None:
    packed = Packed(SCHEMA, CPU)
    packed.fields["loss"] += 1
    reduced = packed.reduce()
    assert reduced["loss"].tolist() == [1, 1, 1]
    assert not any(f.any() for f in packed.fields.values())
    packed.fields["loss"] += 5
    assert reduced["loss"].tolist() == [1, 1, 1]
    assert packed.reduce()["loss"].tolist() == [5, 5, 5]


def test_alone_nothing_is_sent() -> None:
    assert (parallel.rank(), parallel.world_size(), parallel.in_use()) == (0, 1, False)
    assert parallel.broadcast_code(85, CPU) == 85
    assert parallel.union_of_texts(["b", "a", "b"]) == ["b", "a"]
    assert parallel.any_rank(True, CPU) and not parallel.any_rank(False, CPU)
    alone = GroupSum(None)
    assert alone.size == 1
    assert alone(torch.tensor([2.0])).tolist() == [2.0]


def _share(rank: int, round: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * round + rank)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SCHEMA.items()
    }


def _talk(rank: int, world: int) -> dict:
    packed = Packed(SCHEMA, CPU)
    rounds = []
    for round in range(2):
        for name, value in _share(rank, round).items():
            packed.fields[name] += value
        rounds.append({n: f.tolist() for n, f in packed.reduce().items()})
        assert not any(f.any() for f in packed.fields.values())
    whole = torch.distributed.new_group(range(world))
    mine = [torch.distributed.new_group([r]) for r in range(world)][rank]
    return {
        "rounds": rounds,
        "code": parallel.broadcast_code(85 if rank == 0 else rank, CPU),
        "texts": parallel.union_of_texts(["on all", f"on {rank}"]),
        "last only": parallel.any_rank(rank == world - 1, CPU),
        "nobody": parallel.any_rank(False, CPU),
        "place": (parallel.rank(), parallel.world_size(), parallel.in_use()),
        "sum": GroupSum(whole)(torch.tensor([1.0 + rank])).item(),
        "own": (GroupSum(mine).size, GroupSum(mine)(torch.tensor([1.0 + rank])).item()),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world: int) -> None:
    results = distributed.run(world, _talk, world)
    for round in range(2):
        shares = [_share(rank, round) for rank in range(world)]
        for name in SCHEMA:
            total = sum(share[name] for share in shares)
            for result in results:
                got = torch.tensor(result["rounds"][round][name], dtype=torch.float64)
                torch.testing.assert_close(got.view(total.shape), total)
    assert all(r["rounds"] == results[0]["rounds"] for r in results)  # bit for bit on every rank
    for rank, result in enumerate(results):
        assert result["code"] == 85
        assert result["texts"] == ["on all", *(f"on {r}" for r in range(world))]
        assert result["last only"] and not result["nobody"]
        assert result["place"] == (rank, world, True)
        assert result["sum"] == sum(range(1, world + 1))
        assert result["own"] == (1, 1.0 + rank)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_piece_of_work_has_one_owner(size: int) -> None:
    owners = [
        [rank for rank in range(size) if Replica(rank=rank, size=size).owns(piece)]
        for piece in range(13)
    ]
    assert all(len(owner) == 1 for owner in owners)
    shares = [sum(owner == [rank] for owner in owners) for rank in range(size)]
    assert max(shares) - min(shares) <= 1
