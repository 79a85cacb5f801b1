"""Views of Megatron's weights: rows of the fused QKV weight, and fp32 main weights."""

from __future__ import annotations

import pytest
import torch

from mcore_monitors.hosts.megatron.main_weights import MainWeights
from mcore_monitors.hosts.megatron.weights_fused import split_qkv

D, d = 6, 3  # hidden size, head dimension


def fused(groups: int, heads_per_group: int, gated: bool) -> tuple[torch.Tensor, ...]:
    """Megatron's rows, written down one by one; each row's first number says what it is.

    Returns:
        The fused weight, the query rows [H, d, D] and the key rows [G, d, D].
    """
    rows, queries, keys = [], [], []

    def add(kind: int, head: int, channel: int) -> torch.Tensor:
        row = torch.tensor([kind, head, channel] + [len(rows)] * (D - 3), dtype=torch.float32)
        rows.append(row)
        return row

    for group in range(groups):
        heads = range(group * heads_per_group, (group + 1) * heads_per_group)
        for head in heads:
            queries.append(torch.stack([add(1, head, channel) for channel in range(d)]))
        for head in heads if gated else ():
            for channel in range(d):
                add(2, head, channel)
        keys.append(torch.stack([add(3, group, channel) for channel in range(d)]))
        for channel in range(d):
            add(4, group, channel)
    return torch.stack(rows), torch.stack(queries), torch.stack(keys)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize(
    ("groups", "heads_per_group"), [(4, 1), (2, 2), (2, 3), (1, 4)], ids=["MHA", "GQA", "3", "MQA"]
)
def test_rows(groups: int, heads_per_group: int, gated: bool) -> None:
    weight, queries, keys = fused(groups, heads_per_group, gated)
    got_queries, got_keys = split_qkv(weight, groups, heads_per_group, d, gated)
    assert torch.equal(got_queries, queries)
    assert torch.equal(got_keys, keys)


def test_the_split_is_a_view_on_the_live_weight() -> None:
    weight, _, _ = fused(4, 1, False)
    queries, keys = split_qkv(weight, 4, 1, d)
    weight += 100
    assert keys.min() >= 100
    assert queries[:, :, 0].eq(101).all()


def test_the_main_weight_is_read_where_it_has_the_same_shape() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    main = MainWeights(None)
    assert main.local(parameter).dtype == torch.bfloat16
    assert main.rounded([parameter])
    parameter.main_param = torch.nn.Parameter(torch.full((4, 6), 1.001))
    for read in (main.local(parameter), *main([parameter])):
        assert read.dtype == torch.float32
        assert read.eq(1.001).all()
        assert not read.requires_grad
    assert not main.rounded([parameter])
    assert not main.gathers([parameter])


def test_a_flat_shard_without_its_optimizer_is_not_read() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    parameter.main_param_sharded = True
    for shard in (torch.zeros(12), torch.zeros(24), torch.zeros(4, 6), None):
        parameter.main_param = shard
        for read in (MainWeights(None).local(parameter), *MainWeights(None)([parameter])):
            assert read.eq(1).all() and tuple(read.shape) == (4, 6)
            assert not read.requires_grad


def test_a_whole_fp32_weight_is_not_called_rounded() -> None:
    assert not MainWeights(None).rounded([torch.nn.Parameter(torch.ones(2, 2))])
