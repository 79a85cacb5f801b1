"""Views of Megatron's routers: weight, expert bias and rule of the choice."""

from __future__ import annotations

from typing import Any

from ...views import Replica, RouterView, RoutingRule
from .main_weights import MainWeights

#: ways of choosing that go by more than a token's own scores
_BY_HOST = ("sinkhorn", "quantile_balancing")


def router_view(router: Any, layer: int, replica: Replica, main: MainWeights) -> RouterView:
    """A view on a Megatron router.

    The directions of its rows are far larger than bfloat16's rounding, so flat pieces of the
    distributed optimizer are not gathered for it.
    """
    return RouterView(
        layer=layer,
        read=lambda: main.local(router.weight),
        rule=routing_rule(router),
        bias=lambda: getattr(router, "expert_bias", None),
        replica=replica,
    )


def routing_rule(router: Any) -> RoutingRule:
    """How a Megatron router chooses."""
    config = router.config
    score = config.moe_router_score_function
    balancing = config.moe_router_load_balancing_type
    kinds = balancing if isinstance(balancing, list | tuple) else [balancing]
    by_logits = score == "softmax" and not config.moe_router_pre_softmax
    chooses_by = "logits" if by_logits else "scores"
    if any(kind in _BY_HOST for kind in kinds) or getattr(router, "router_replay", None):
        chooses_by = "host"
    top_k, top_groups = config.moe_router_topk, config.moe_router_group_topk
    if not top_groups:
        return RoutingRule(score=score, top_k=top_k, chooses_by=chooses_by)
    return RoutingRule(
        score=score,
        top_k=top_k,
        chooses_by=chooses_by,
        groups=config.moe_router_num_groups,
        top_groups=top_groups,
        group_sum=top_k // top_groups,
    )
