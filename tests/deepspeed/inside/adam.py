"""What an engine's steps did, by definition, from whole tensors; for test_optimizer_state.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from mcore_monitors.hosts.deepspeed.attach import monitors_of
from mcore_monitors.signals.optimizer import SPIKE

from .models import LAYERS

#: weight, first and second moment of a parameter, whole
Whole = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sums_of(engine: Any) -> list[list[list[float]]]:
    """A list that fills with what the optimizer monitor reads: [sample][layer][sum]."""
    seen: list[list[list[float]]] = []
    monitor = next(
        (m for m in monitors_of(engine).runtime.crew.monitors if m.name == "optimizer"), None
    )
    if monitor is None:
        return seen
    read: Callable[..., Any] = monitor.read

    def also_keep(fields: dict[str, torch.Tensor]) -> Any:
        seen.append(fields["sums"].tolist())
        return read(fields)

    monitor.read = also_keep
    return seen


class Followed:
    """Follows all parameters of an engine's layers; nothing is read off gradients.

    Args:
        engine: fresh.
        split: experts are split over all ranks; else each rank has them all.
        before: steps that the wrapped optimizer has taken already, with gradients of zero.
        searched: whether the gradients are searched for spikes.

    Attributes:
        steps: [step][layer][sum] as ``signals.optimizer.SUMS``; None for a step that was skipped.
    """

    def __init__(self, engine: Any, *, split: bool, before: int, searched: bool) -> None:
        self._engine, self._taken, self._split = engine, before, split
        self._search_after = before + 1 if searched else math.inf
        self._skipped = 0
        self._last = {
            name: (weight, torch.zeros_like(weight), torch.zeros_like(weight))
            for name, (weight, *_) in self._whole(first=True).items()
        }
        self.steps: list[list[list[float]] | None] = []

    def after_step(self) -> None:
        """The engine has stepped, or has skipped the step."""
        now = self._whole()
        if self._engine.skipped_steps > self._skipped:
            self._skipped = self._engine.skipped_steps
            assert all(torch.equal(now[n][0], w) for n, (w, *_) in self._last.items())
            self.steps.append(None)
            return
        self._taken += 1
        group = self._engine.optimizer.param_groups[0]
        total = torch.zeros(LAYERS, 6, dtype=torch.float64)
        for name, parameter in self._engine.module.named_parameters():
            layer = re.search(r"layers\.(\d+)\.", name)
            expert = is_moe_param(parameter) and self._split
            if layer and (expert or dist.get_rank() == 0):
                total[int(layer[1])] += self._sums(self._last[name], now[name], group)
        dist.all_reduce(total)
        self.steps.append(total.tolist())
        self._last = now

    def _sums(self, before: Whole, now: Whole, group: dict[str, Any]) -> torch.Tensor:
        (w0, m0, v0), (w1, m1, v1) = before, now
        (beta1, beta2), t = group["betas"], self._taken
        update = m1 / (1 - beta1**t) / ((v1 / (1 - beta2**t)).sqrt() + group["eps"])
        gradient = (m1 - beta1 * m0) / (1 - beta1)
        spikes = searched = 0
        if t > self._search_after:
            searched = w1.numel()
            spikes = int((gradient**2 > SPIKE * v0 / (1 - beta2 ** (t - 1))).sum())
        found = (update.square().sum(), (w1 - w0).square().sum(), w1.square().sum())
        return torch.tensor([*map(float, found), w1.numel(), spikes, searched]).double()

    def _whole(self, first: bool = False) -> dict[str, Whole]:
        out = {}
        for name, parameter in self._engine.module.named_parameters():
            if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
                tensors = [safe_get_full_fp32_param(parameter)]
                if self._engine.global_steps > self._engine.skipped_steps:
                    tensors += [
                        safe_get_full_optimizer_state(parameter, key)
                        for key in ("exp_avg", "exp_avg_sq")
                    ]
            else:
                main, cut = self._copy(parameter)
                state = self._engine.optimizer.state[main] if not first else {}
                tensors = [main, *(state[k] for k in ("exp_avg", "exp_avg_sq") if k in state)]
                tensors = [cut(x) for x in tensors]
            whole = [x.detach().double().flatten().clone() for x in tensors]
            out[name] = tuple(whole + [torch.zeros_like(whole[0])] * (3 - len(whole)))
        return out

    def _copy(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, Callable[..., Any]]:
        """The tensor that stage 0 steps on, and what cuts the parameter out of its like."""
        optimizer = self._engine.optimizer
        for number, group in enumerate(getattr(optimizer, "fp16_groups", [])):
            place = next((i for i, p in enumerate(group) if p is parameter), None)
            if place is None:
                continue
            if hasattr(optimizer, "fp32_groups"):
                return optimizer.fp32_groups[number][place], lambda x: x
            sizes = [p.numel() for p in group]
            return optimizer.fp32_groups_flat[number], lambda x, s=sizes, i=place: x.split(s)[i]
        return parameter, lambda x: x
