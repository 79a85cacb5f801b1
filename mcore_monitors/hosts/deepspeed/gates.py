"""DeepSpeed's own mixture-of-experts gate, ``TopKGate``: what it hands over, and its rule.

The gate computes its logits inside ``forward``; the patch hands them over there, after the jitter
of the input and before any noise, on the dense, the sparse and the Tutel path alike. Without the
patch they are taken from the first argument of the function that ``forward`` gives them to. These
are the logits that weigh the experts' outputs, so they are the ones to watch: the router's scores
are a softmax of them.

The *choice* follows from them too, except with noise: ``RSample`` (top-1) and the sampled second
expert (top-2, DeepSpeed's default) choose by scores plus Gumbel noise. Then the choice is taken
from the gate itself. The sampled second expert is found from the noisy logits, before capacity is
enforced; for ``RSample`` it is what the gate returns, after tokens over the capacity are dropped.

Shape names: ``T`` tokens, ``E`` experts, ``C`` capacity, ``k`` chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from ...monitors.base import StepState
from ...views import RoutingRule
from ..taps import Passes, RouterTap


def gate_rule(gate: TopKGate) -> RoutingRule:
    """How a gate chooses."""
    return RoutingRule(
        score="softmax", top_k=gate.k, chooses_by="host" if noisy(gate) else "scores"
    )


def noisy(gate: TopKGate) -> bool:
    """Whether a gate chooses by more than its scores."""
    if gate.k == 1:
        return gate.noisy_gate_policy == "RSample"
    return gate.k == 2 and gate.top2_2nd_expert_sampling


class GateTap(RouterTap):
    """The tap of one ``TopKGate``: the patch calls it with the logits of each forward.

    A micro-batch is told once, in training only. A noisy gate's logits are told as a copy, since
    DeepSpeed adds the noise in place, and after the choice, so they carry no gradient.
    """

    def __init__(self, gate: TopKGate, state: StepState) -> None:
        super().__init__()
        self._gate, self._passes = gate, Passes(state)
        self._after = noisy(gate)
        self.tells_choice = self._after
        self._padding: Tensor | None = None
        # (as they were, the tensor that DeepSpeed may add noise to)
        self._logits: tuple[Tensor, Tensor] | None = None
        self._patched = hasattr(TopKGate, "mcore_monitors_tap")
        if not self._patched:
            _watch_gating()
        gate.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        if self._after:
            gate.register_forward_hook(self._after_forward)

    def __call__(self, logits: Tensor) -> None:
        """The logits of a forward pass, [T, E]."""
        if not (self.is_heard and self._gate.training and self._passes.counts()):
            return
        if self._after:
            self._logits = (logits.detach().clone(), logits.detach())
        else:
            self.tell(logits, self._padding)

    def _before_forward(
        self, gate: TopKGate, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        used = kwargs.get("used_token", args[1] if len(args) > 1 else None)
        self._padding = None if used is None else used == 0
        self._logits = None
        if not self._patched:
            _in_forward[:] = [self]

    def _after_forward(self, gate: TopKGate, args: tuple[Any, ...], output: Any) -> None:
        if self._logits is None:
            return
        (clean, noisy), self._logits = self._logits, None
        self.tell(clean, self._padding, _choice(gate, clean, noisy, output))


#: the tap whose gate is in its forward; for DeepSpeed without the patch
_in_forward: list[GateTap] = []


@cache
def _watch_gating() -> None:
    """Look at the logits that a gate hands to ``top1gating`` and its like. Once a process."""
    for name in ("top1gating", "top2gating", "topkgating"):
        setattr(sharded_moe, name, _watched(getattr(sharded_moe, name)))


def _watched(gating: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(gating)
    def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _in_forward:
            _in_forward.pop()(logits)
        return gating(logits, *args, **kwargs)

    return watched


@torch.no_grad()
def _choice(gate: TopKGate, clean: Tensor, noisy: Tensor, output: Any) -> Tensor:
    """Map [T, E] of a noisy gate's choice."""
    if gate.k == 2:
        first = F.one_hot(clean.argmax(dim=1), clean.shape[1]).bool()
        second = noisy.masked_fill(first, float("-inf")).argmax(dim=1)
        return first | F.one_hot(second, clean.shape[1]).bool()
    if len(output) == 4:  # dense: (auxiliary loss, weights [T, E, C], map [T, E, C], counts)
        return output[2].any(dim=2)
    # sparse: (auxiliary loss, C, E, experts [k, T] or −1, places, weights, counts)
    experts = output[3].long()
    chosen = torch.zeros_like(clean, dtype=torch.bool)
    return chosen.scatter_(1, experts.clamp_min(0).T, (experts >= 0).T)
