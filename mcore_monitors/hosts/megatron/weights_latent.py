"""Query and key factors of Megatron's latent attention (MLA), per head.

Query and key pass through a narrow latent, W = up-projection · γ · down-projection with γ the
learned scale of the norm between the two, and a head has two kinds of channels:

- without position (``nope``): W_q and W_k [d_nope, D] of each head;
- rotary (``rope``): W_q [d_rope, D] of each head, and one W_k [d_rope, D] that all heads share,
  straight from the key's down-projection, without up-projection or norm.

Without a query latent (``q_lora_rank`` None) W_q is the plain projection. Tensor parallelism cuts
up-projections by heads. Down-projections are on every rank (``TELinear``) or cut by rows
(``ColumnParallelLinear``); then they are gathered, and all tensor-parallel ranks read together.
"""

from __future__ import annotations

from typing import Any

import torch

from ...parallel import GroupSum
from ...views import AttentionView, Replica
from .main_weights import MainWeights
from .weights_fused import gathered_rows, learned_scale


def latent_views(
    attention: Any, layer: int, replica: Replica, main: MainWeights
) -> list[AttentionView]:
    """The ``nope`` and the ``rope`` view of a latent attention."""
    latent = _Latent(attention, main)
    heads, first = latent.heads, latent.rank * latent.heads
    common: dict[str, Any] = {
        "layer": layer,
        "replica": replica,
        "first_head": first,
        "collective": latent.collective,
    }
    return [
        AttentionView(
            **common,
            part="nope",
            first_group=first,
            groups=heads,
            heads_per_group=1,
            read=lambda: latent.nope(list(range(heads))),
            read_groups=latent.nope,
        ),
        AttentionView(
            **common,
            part="rope",
            first_group=0,
            groups=1,
            heads_per_group=heads,
            read=lambda: latent.rope([0]),
            read_groups=latent.rope,
        ),
    ]


class _Latent:
    """Reads the factors of one layer.

    Attributes:
        heads: query heads of this tensor-parallel rank; ``rank`` is its number.
        collective: whether a read waits for other ranks.
    """

    def __init__(self, attention: Any, main: MainWeights) -> None:
        config, tp = attention.config, attention.pg_collection.tp
        self.rank, self._ranks, self._total = tp.rank(), tp.size(), GroupSum(tp)
        self.heads = config.num_attention_heads // tp.size()
        self._nope, self._rope = config.qk_head_dim, config.qk_pos_emb_head_dim
        self._q_rank, self._kv_rank = config.q_lora_rank or 0, config.kv_lora_rank
        self._main, self._config = main, config

        self._down: dict[str, torch.nn.Parameter] = {}
        both = getattr(attention, "linear_qkv_down_proj", None)
        if both is not None:
            self._down["qkv"] = both.weight
        else:
            self._down["kv"] = attention.linear_kv_down_proj.weight
            if self._q_rank:
                self._down["q"] = attention.linear_q_down_proj.weight
        query = attention.linear_q_up_proj if self._q_rank else attention.linear_q_proj
        key = attention.linear_kv_up_proj
        self._up = {"q": query.weight, "kv": key.weight}
        gammas = {
            "q": _gamma(getattr(attention, "q_layernorm", None), query),
            "kv": _gamma(attention.kv_layernorm, key),
        }
        self._gammas = {name: g for name, g in gammas.items() if g is not None}
        self.collective = self._cut() or main.gathers(
            [*self._down.values(), *self._up.values(), *self._gammas.values()]
        )

    def _rows(self, name: str) -> int:
        """Rows of a down-projection over all ranks."""
        rows = {"q": self._q_rank, "kv": self._kv_rank + self._rope}
        return rows[name] if name in rows else sum(rows.values())

    def _cut(self) -> bool:
        return any(w.shape[0] < self._rows(name) for name, w in self._down.items())

    def _read(self, *names: str) -> dict[str, torch.Tensor]:
        """Down- and up-projections and scales of ``q``, ``kv`` or both, widened, down ones whole.

        Returns:
            Keys ``down q`` [r_q, D] (with a query latent), ``down kv`` [r_kv + d_rope, D], ``up q``
            and ``up kv`` [heads, channels, r] with the scale multiplied in.
        """
        down = dict(self._down)
        parameters = [*down.values()]
        parameters += [self._up[n] for n in names]
        parameters += [self._gammas[n] for n in names if n in self._gammas]
        weights = [_widened(w) for w in self._main(parameters)]
        found = iter(weights)
        read = self._whole_downs({name: next(found) for name in down})
        ups = {n: next(found) for n in names}
        for name, up in ups.items():
            if name in self._gammas:
                up = up * learned_scale(self._config, next(found))
            read[f"up {name}"] = up.unflatten(0, (self.heads, -1))
        return read

    def _whole_downs(self, pieces: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = {}
        for name, piece in pieces.items():
            ranks = self._rows(name) // piece.shape[0]
            if ranks > 1:
                piece = gathered_rows(piece, self.rank, self._ranks, self._total)
            if name == "qkv":  # each rank's rows are [its part of q | its part of kv]
                rows = [self._q_rank // ranks, self._rows("kv") // ranks]
                q, kv = piece.unflatten(0, (ranks, -1)).split(rows, dim=1)
                whole |= {"down q": q.flatten(0, 1), "down kv": kv.flatten(0, 1)}
            else:
                whole[f"down {name}"] = piece
        return whole

    def nope(self, heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q, W_k [len(heads), d_nope, D] of some local heads."""
        read = self._read("q", "kv")
        query = _chosen(read["up q"][:, : self._nope], heads)
        if self._q_rank:
            query = query @ read["down q"]
        key = _chosen(read["up kv"][:, : self._nope], heads)
        return query, key @ read["down kv"][: self._kv_rank]

    def rope(self, groups: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q [heads, d_rope, D] and the shared W_k [1, d_rope, D]; none for no group."""
        read = self._read("q")
        query = read["up q"][:, self._nope :][: self.heads * len(groups)]
        if self._q_rank:
            query = query @ read["down q"]
        return query, read["down kv"][self._kv_rank :].unsqueeze(0)[: len(groups)]


def _gamma(norm: Any, projection: Any) -> torch.nn.Parameter | None:
    """The scale of the norm before an up-projection: a module of its own, or fused with it."""
    own = getattr(norm, "weight", None)
    return own if own is not None else getattr(projection, "layer_norm_weight", None)


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """Wide enough that a product of two carries no rounding worth the name into a difference."""
    if weight.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return weight.double()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _chosen(rows: torch.Tensor, heads: list[int]) -> torch.Tensor:
    # slices: a list as an index would sync a GPU
    return torch.cat([rows[h : h + 1] for h in heads] or [rows[:0]])
