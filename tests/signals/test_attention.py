"""Attention activity against the dense S × S matrix."""

from __future__ import annotations

import math

import pytest
import torch

from mcore_monitors.signals import attention
from mcore_monitors.signals.attention import attention_activity, sampled_positions

S, B, d = 13, 3, 8


def tensors(heads: int, groups: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads + 10 * groups)
    query = torch.randn(S, B, heads, d, generator=generator) * size
    return query, torch.randn(S, B, groups, d, generator=generator)


def dense(
    query: torch.Tensor, key: torch.Tensor, scale: float, rows: slice, causal: bool
) -> tuple[list[float], list[float]]:
    """Largest logit and entropy of each head from whole float64 matrices, sequence by sequence."""
    heads, groups = query.shape[2], key.shape[2]
    largest, entropy = [], []
    for head in range(heads):
        tops, means = [], []
        for b in range(B):
            q, k = query[:, b, head].double(), key[:, b, head // (heads // groups)].double()
            logits = scale * q @ k.T
            if causal:
                logits = logits.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
            p = logits.softmax(-1)
            tops.append(logits[rows].max().item())
            means.append(torch.special.entr(p)[rows].sum(-1).mean().item())
        largest.append(sum(tops))
        entropy.append(sum(means))
    return largest, entropy


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [4, 13, 50])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_against_the_dense_matrix(heads: int, groups: int, queries: int, causal: bool) -> None:
    query, key = tensors(heads, groups)
    found = attention_activity(query, key, scale=0.3, queries=queries, causal=causal)
    rows = slice(12 % 4, S, 4) if queries == 4 else slice(None)
    largest, entropy = dense(query, key, 0.3, rows, causal)
    assert found.max_logit.tolist() == pytest.approx(largest, rel=1e-5)
    assert found.entropy.tolist() == pytest.approx(entropy, rel=1e-5)


def test_pieces_of_sequences_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors(4, 2)
    whole = attention_activity(query, key, scale=1.0, queries=4)
    monkeypatch.setattr(attention, "_PIECE", 1)
    for a, b in zip(whole, attention_activity(query, key, scale=1.0, queries=4), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 64, 100, 4096])
def test_sampled_positions_end_with_the_last(length: int) -> None:
    chosen = list(range(length))[sampled_positions(length, 32)]
    assert chosen[-1] == length - 1
    assert min(length, 16) <= len(chosen) <= 32
    assert len({b - a for a, b in zip(chosen, chosen[1:], strict=False)}) <= 1


def test_known_values() -> None:
    """Equal keys: entropy ln of their number; huge logits: one key, entropy zero, no NaN."""
    query = torch.ones(8, 1, 1, 4)
    found = attention_activity(query, torch.ones(8, 1, 1, 4), scale=0.5, queries=8)
    assert found.max_logit.item() == pytest.approx(2.0)
    assert found.entropy.item() == pytest.approx(sum(math.log(i) for i in range(1, 9)) / 8)
    spread = torch.randn(8, 1, 1, 4, generator=torch.Generator().manual_seed(1))
    extreme = attention_activity(query * 1e6, spread, scale=1.0, queries=8)
    assert 0 <= extreme.entropy.item() < 1e-3
    assert extreme.max_logit.item() > 1e6


def test_bfloat16_is_widened() -> None:
    query, key = (x.bfloat16() for x in tensors(2, 2))
    low = attention_activity(query, key, scale=1.0, queries=50)
    high = attention_activity(query.float(), key.float(), scale=1.0, queries=50)
    assert torch.equal(low.entropy, high.entropy)
