"""Small routed models and logits for the tests of the router monitor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mcore_monitors.views import ModelView, Replica, RoutingRule

from .models import TinyModel

E = 8
SOFTMAX = RoutingRule(top_k=2, chooses_by="logits")
RULES = {
    "softmax": (SOFTMAX, False),
    "softmax first": (RoutingRule(top_k=2), False),
    "sigmoid": (RoutingRule(score="sigmoid", top_k=3), False),
    "sigmoid with bias": (RoutingRule(score="sigmoid", top_k=3), True),
    "groups": (
        RoutingRule(score="sigmoid", top_k=3, groups=4, top_groups=2, group_sum=2), True
    ),
    "groups by logits": (
        RoutingRule(top_k=3, chooses_by="logits", groups=4, top_groups=2), False
    ),
    "√softplus": (RoutingRule(score="sqrtsoftplus", top_k=2), True),
}  # fmt: skip
BIAS = torch.linspace(-0.3, 0.3, E)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(
    rule: RoutingRule = SOFTMAX, bias: Any = None, replica: Replica | None = None
) -> ModelView:
    """A view of two layers whose routers of eight experts follow a rule."""
    view = TinyModel(experts=E).view(replica or Replica())
    view.routers = [replace(v, rule=rule, bias=bias) for v in view.routers]
    return view


def value(readings: dict[str, dict[int, list[float]]], name: str, layer: int = 1) -> float:
    (number,) = readings[f"router/{name}"][layer]
    return number
