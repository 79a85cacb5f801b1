"""Walk all attention layouts in one group of processes. Started by ``tests/megatron/test_layouts``.

Imported in the started processes only, after the CPU stand-in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.signals.spectra import effective_rank
from mcore_monitors.signals.update_spectra import update_spectra
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr

from . import attentions

Weights = tuple[torch.Tensor, torch.Tensor]


def walk(tensor_parallel: int) -> tuple[dict[str, list[Any]], list[str]]:
    """All layouts under one split of the ranks.

    Returns:
        Per layout a row for each head that this rank computed:
        ``(part, head, dense, QR route in fp64, Gram route in fp32)``; and what was left out.
    """
    attentions.start(tensor_parallel)
    rows: dict[str, list[Any]] = {}
    left_out: list[str] = []
    for name, layout in attentions.LAYOUTS.items():
        model = attentions.build(layout, torch.float64)
        attention = next(
            m for m in model.modules() if isinstance(m, SelfAttention | MLASelfAttention)
        )
        described = MegatronModel([model]).view
        left_out += [s for s in described.left_out if s.startswith("attention updates")]
        attentions.move(attention, 0.3, seed=1)
        before = copy.deepcopy(attention.state_dict())
        old, old_dense = _read(described), attentions.dense(attention)
        attentions.move(attention, 0.01, seed=2)
        new, new_dense = _read(described), attentions.dense(attention)
        after = copy.deepcopy(attention.state_dict())
        attention.float()
        attention.load_state_dict(before)
        old_fp32 = _read(described)
        attention.load_state_dict(after)
        new_fp32 = _read(described)
        exact = _ranks(update_spectra_qr, old, new)
        fast = _ranks(update_spectra, old_fp32, new_fp32)
        parts = ["nope", "rope"] if layout.latent else [""]
        rows[name] = []
        for (part, head), value in exact.items():
            update = attentions.dense_delta2(old_dense[head], new_dense[head])[parts.index(part)]
            wanted = attentions.effective_rank(update)
            rows[name].append((part, head, wanted, value, fast[part, head]))
    return rows, left_out


def _read(described: Any) -> dict[tuple[str, tuple[int, ...]], Weights]:
    """This rank's share of every view: (part, heads) to its weights, group by group."""
    read, piece = {}, 0
    for view in described.attention:
        mine = [g for g in range(view.groups) if view.replica.owns(piece + g)]
        piece += view.groups
        # a collective view is read by every rank, and a plain one costs nothing
        query, key = view.take(mine)
        whole_query, whole_key = view.read()
        n = view.heads_per_group
        for i, group in enumerate(mine):
            own = query[i * n : (i + 1) * n], key[i : i + 1]
            assert torch.equal(own[0], whole_query[group * n : (group + 1) * n])
            assert torch.equal(own[1], whole_key[group : group + 1])
            heads = tuple(range(view.head(group), view.head(group) + n))
            read[view.part, heads] = own[0].clone(), own[1].clone()
    return read


def _ranks(spectra: Any, old: dict, new: dict) -> dict[tuple[str, int], float]:
    found = {}
    for (part, heads), weights in old.items():
        values = effective_rank(spectra(*weights, *new[part, heads]).delta2)
        found |= {(part, head): v for head, v in zip(heads, values.tolist(), strict=True)}
    return found


def norms() -> dict[str, list[float]]:
    """Megatron's real norms: a view's queries and keys over the plain weight's, per channel."""
    attentions.start(1)
    found = {}
    for kind in ("LayerNorm", "RMSNorm"):
        settings = {"num_query_groups": 2, "qk_layernorm": True, "normalization": kind}
        model = attentions.build(attentions.Layout(settings), torch.float32)
        attention = next(m for m in model.modules() if isinstance(m, SelfAttention))
        with torch.no_grad():
            attention.q_layernorm.weight.copy_(torch.arange(1, attentions.HEAD + 1))
            attention.k_layernorm.weight.fill_(3.0)
        (view,) = MegatronModel([model]).view.attention
        query, key = view.read()
        plain = attention.linear_qkv.weight.unflatten(0, (2, 4, attentions.HEAD))
        scales = torch.cat([query[0] / plain[0, 0], key[1] / plain[1, 2]])
        found[kind] = scales[:, 0].tolist()
    return found


def counted_once(rows: dict[str, list[Any]]) -> dict[str, list[tuple[str, int]]]:
    """Which (part, head) all ranks together computed, layout by layout."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {n: [(r[0], r[1]) for r in v] for n, v in rows.items()})
    return {name: sorted(key for part in everyone for key in part[name]) for name in rows}
