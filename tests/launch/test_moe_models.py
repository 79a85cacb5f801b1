"""The small models that DeepSpeed trains, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from moe_models import DEVIATION, HEADS, LAYERS, WIDTH, DeepSpeedModel, rotary, rotate  # noqa: E402


def test_rotary_positions_make_logits_depend_on_distance_alone():
    size = WIDTH // HEADS
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, size, generator=generator).double()
    places = tuple(x.double() for x in rotary(40))
    queries, keys = (rotate(x.expand(1, 1, 40, size), places)[0, 0] for x in (query, key))
    logits = queries @ keys.T
    for distance in (0, 3, 17):
        along = logits.diagonal(-distance)
        # the angles are float32: at position 40 they are known to 40 units in the seventh place
        assert along.max() - along.min() < 1e-4
    assert queries.norm(dim=-1) == pytest.approx([query.norm().item()] * 40, rel=1e-6)
    assert logits.diagonal(0)[0] == pytest.approx((query @ key).item())


def test_what_writes_to_the_residual_stream_begins_small():
    torch.manual_seed(0)
    model = DeepSpeedModel(16, expert_parallel=1)
    found = {True: [], False: []}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            found[".o_proj." in name or ".down." in name].append(weight.std().item())
    assert len(found[True]) == LAYERS * (1 + 8)
    for writes, expected in ((True, DEVIATION / (2 * LAYERS) ** 0.5), (False, DEVIATION)):
        assert found[writes] == pytest.approx([expected] * len(found[writes]), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotated_queries_keep_the_format_of_the_values(dtype: torch.dtype):
    x = torch.randn(1, 2, 5, WIDTH // HEADS).to(dtype)
    assert rotate(x, rotary(5)).dtype == dtype
