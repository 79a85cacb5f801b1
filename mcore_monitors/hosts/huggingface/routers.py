"""Mixture-of-experts routers found by their structure, and the rule by which they choose.

A router is a module ``gate``, ``router`` or ``wg`` beside ``experts``, with one weight [E, D]: a
linear layer, a module around one, or a module with the parameter itself. The last kind gives a
tuple, and what stands where in it differs between models and releases. So the router's own forward
is tried once at the start, on a copy with made-up weights: one output has to be the logits, and the
experts that it names tell the rule. Nothing of the model is touched by that, and no generator.

Shape names: ``E`` experts, ``D`` hidden size, ``T`` tokens, ``k`` chosen experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...signals.router import choose, log_scores
from ...views import RoutingRule
from .attention import ShapeOf
from .stub import with_tensors

_NAMES = ("gate", "router", "wg")
_TOP_K = ("top_k", "num_experts_per_tok", "moe_top_k", "num_selected_experts")
_GROUPS = ("num_expert_groups", "num_group", "n_group", "num_expert_group")
_TOP_GROUPS = ("num_limited_groups", "topk_group", "n_limited_groups")
#: tokens of a trial
_TOKENS = 64
#: logits are those if they agree to this
_CLOSE = 1e-4
#: mixing weights follow a score function if the logarithms of their ratios do to this, on average
_FITS = 0.01


@dataclass(frozen=True, kw_only=True)
class FoundRouter:
    """A router module, its weight, and where its logits can be seen."""

    path: str
    module: nn.Module
    weight: nn.Parameter
    experts: int
    #: the module whose forward gives the logits: the router, or a linear layer in it
    source: nn.Module
    #: place of the logits in the source's output; None: the output itself
    logits_at: int | None
    #: place of the chosen experts [T, k] in the router's output, or None
    chosen_at: int | None
    rule: RoutingRule
    #: what is added to the scores [E] for the choice only, or None
    bias: Callable[[], Tensor | None] | None = None


def find_routers(
    model: nn.Module, shape_of: ShapeOf, skip: tuple[type, ...] = ()
) -> tuple[list[FoundRouter], dict[str, list[str]]]:
    """All routers of a model, in its order.

    Args:
        shape_of: a parameter's shape as it is when no shard of it is elsewhere.
        skip: router classes that someone else takes.

    Returns:
        what can be watched, and the rest: reason (one sentence) to paths.
    """
    found, unknown = [], {}
    for path, block in model.named_modules():
        children = dict(block.named_children())
        if "experts" not in children:
            continue
        for name in _NAMES:
            router = children.get(name)
            if router is None or isinstance(router, skip):
                continue
            result = _examine(f"{path}.{name}".lstrip("."), router, block, shape_of)
            if isinstance(result, FoundRouter):
                found.append(result)
            else:
                unknown.setdefault(result, []).append(path)
            break
    return found, unknown


def _examine(
    path: str, router: nn.Module, block: nn.Module, shape_of: ShapeOf
) -> FoundRouter | str:
    name = type(router).__name__
    source = router
    weight = getattr(router, "weight", None)
    if weight is None:
        linears = [c for c in router.children() if isinstance(c, nn.Linear)]
        if len(linears) != 1:
            return f"{name} has no weight [experts, hidden] and no single linear layer"
        source, weight = linears[0], linears[0].weight
    shape = shape_of(weight)
    if len(shape) != 2 or shape[0] < 1:
        return f"{name} has a weight of shape {tuple(shape)}, not [experts, hidden]"
    top_k = _number((router, block), _TOP_K)
    bias = _bias(router, block)
    common = dict(
        path=path, module=router, weight=weight, experts=shape[0], source=source, bias=bias
    )
    if type(source).forward is nn.Linear.forward:
        rule = _stated_rule(router, block, top_k, shape[0])
        return FoundRouter(logits_at=None, chosen_at=None, rule=rule, **common)
    tried = _try(router, shape)
    if isinstance(tried, str):
        return f"{name}: {tried}"
    return FoundRouter(
        logits_at=tried.logits_at,
        chosen_at=tried.chosen_at,
        rule=_tried_rule(tried, router, block),
        **common,
    )


def _number(owners: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _bias(router: nn.Module, block: nn.Module) -> Callable[[], Tensor | None] | None:
    """Reads what is added to the scores for the choice: a correction bias, a balancing bias."""
    places = [(router, "e_score_correction_bias"), (block, "e_score_correction_bias")]
    places += [(router, "expert_bias"), (block, "expert_bias")]
    places = [(o, n) for o, n in places if isinstance(getattr(o, n, None), Tensor)]
    if not places:
        return None

    def read() -> Tensor | None:
        # buffers, or parameters that nothing shards: a few numbers each
        return sum(getattr(owner, name).detach() for owner, name in places)

    return read


def _stated_rule(
    router: nn.Module, block: nn.Module, top_k: int | None, experts: int
) -> RoutingRule:
    """The rule of a plain linear router, from what it or the block around it says."""
    score = getattr(router, "score_func", None) or getattr(block, "scoring_func", None)
    groups = _number((router,), _GROUPS)
    grouped = groups is not None and groups > 1 and experts % groups == 0
    return RoutingRule(
        score="sigmoid" if score == "sigmoid" else "softmax",
        top_k=top_k,
        groups=groups if grouped else None,
        top_groups=_number((router,), _TOP_GROUPS) if grouped else None,
        group_sum=2 if getattr(router, "group_score_func", "max") == "top2_sum" else 1,
    )


# ---- a trial of a router's forward ----


@dataclass(frozen=True)
class _Trial:
    """What a router gave for made-up hidden states and weights."""

    logits: Tensor
    logits_at: int | None
    #: chosen experts [T, k], their place and their weights, where the router gives them
    chosen: Tensor | None
    chosen_at: int | None
    weights: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def _try(router: nn.Module, shape: torch.Size) -> _Trial | str:
    """Run the router's forward on a copy that shares nothing with it."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden = shape
    weight = torch.randn(experts, hidden, generator=generator) / math.sqrt(hidden)
    x = torch.randn(_TOKENS, hidden, generator=generator)
    try:
        with torch.random.fork_rng(devices=[]):
            stub = _stub(router, weight, generator)
            output = stub.forward(x)
    except Exception as error:  # a router of a kind that needs more than hidden states
        return f"its forward could not be tried ({type(error).__name__}: {error})"
    outputs = output if isinstance(output, tuple | list) else (output,)
    offset = stub._parameters.get("bias")
    wanted = x @ weight.T if offset is None else x @ weight.T + offset
    at = next(
        (
            i
            for i, o in enumerate(outputs)
            if isinstance(o, Tensor)
            and o.numel() == wanted.numel()
            and o.is_floating_point()
            and torch.allclose(o.float().reshape(wanted.shape), wanted, atol=_CLOSE)
        ),
        None,
    )
    if at is None:
        return "none of its outputs are the logits"
    chosen_at = next(
        (i for i, o in enumerate(outputs) if isinstance(o, Tensor) and _names_experts(o, experts)),
        None,
    )
    chosen = None if chosen_at is None else outputs[chosen_at].reshape(_TOKENS, -1)
    return _Trial(
        logits=wanted,
        logits_at=at if isinstance(output, tuple | list) else None,
        chosen=chosen,
        chosen_at=chosen_at,
        weights=None if chosen is None else _weights(outputs, chosen, at),
        bias=stub._buffers.get("e_score_correction_bias"),
    )


def _stub(router: nn.Module, weight: Tensor, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU, in evaluation, with the given weight and made-up other tensors."""
    return with_tensors(
        router,
        lambda name, p: weight if name == "weight" else _made_up(p, len(weight), generator),
        lambda name, b: _made_up(b, len(weight), generator),
        lambda name, m: copy.deepcopy(m).cpu().float().eval(),
    )


def _made_up(tensor: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return 0.05 * torch.randn(shape or (experts,), generator=generator)


def _names_experts(x: Tensor, experts: int) -> bool:
    return (
        not x.is_floating_point()
        and x.dtype != torch.bool
        and x.numel() % _TOKENS == 0
        and 0 < x.numel() // _TOKENS <= experts
        and 0 <= int(x.min()) <= int(x.max()) < experts
    )


def _weights(outputs: tuple[Any, ...], chosen: Tensor, logits_at: int) -> Tensor | None:
    """The chosen experts' mixing weights, where they are given expert for expert."""
    for i, o in enumerate(outputs):
        if i != logits_at and isinstance(o, Tensor) and o.is_floating_point():
            if o.numel() == chosen.numel():
                return o.float().reshape(chosen.shape)
    return None


def _tried_rule(trial: _Trial, router: nn.Module, block: nn.Module) -> RoutingRule:
    """The first rule that gives the trial's choice and weights; else the choice is the host's."""
    if trial.chosen is None:
        return _stated_rule(router, block, _number((router, block), _TOP_K), trial.logits.shape[1])
    experts, k = trial.logits.shape[1], trial.chosen.shape[1]
    groups, top = _number((router,), _GROUPS), _number((router,), _TOP_GROUPS)
    limits: list[dict[str, int]] = [{}]
    if groups and top and 1 < groups < experts and experts % groups == 0 and top < groups:
        limits += [dict(groups=groups, top_groups=top, group_sum=s) for s in (2, 1)]
    wanted = trial.chosen.sort(-1).values
    names = _scores_by_fit(trial)
    for score, limit in product(names, limits):
        scores = log_scores(trial.logits, score)
        scores = scores.softmax(-1) if score == "softmax" else scores.exp()
        if trial.bias is not None:
            scores = scores + trial.bias
        if torch.equal(choose(scores, k, **limit)[1][:, :k].sort(-1).values, wanted):
            return RoutingRule(score=score, top_k=k, **limit)
    return RoutingRule(score=names[0] if names else "softmax", top_k=k, chooses_by="host")


def _scores_by_fit(trial: _Trial) -> list[str]:
    """Score functions that fit the mixing weights, the best first; all where nothing tells."""
    names = ["softmax", "sigmoid", "sqrtsoftplus"]
    if trial.weights is None or trial.chosen.shape[1] < 2:
        return names
    given = trial.weights.clamp_min(1e-30).log()

    def misfit(name: str) -> float:
        expected = log_scores(trial.logits, name).gather(-1, trial.chosen)
        gap = (given - given[:, :1]) - (expected - expected[:, :1])
        return float(gap.abs().mean())

    return sorted((n for n in names if misfit(n) < _FITS), key=misfit)
