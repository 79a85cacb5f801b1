"""Walk the module that DeepSpeed trains and describe it to the monitors.

Attention and routers are found by structure (:mod:`..huggingface`), DeepSpeed's own gates by their
class. DeepSpeed numbers no layers: numbers come from the modules' paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import nn

from ...catalogue.conservation import NORMS
from ...monitors.base import StepState
from ...views import ActivityView, AttentionView, Conserved, ModelView, Replica, RouterView
from ..huggingface.attention import FoundAttention, find_attention
from ..huggingface.blocks import attention_width, find_blocks
from ..huggingface.kernels import breaks_key_shift, hides_logits, logit_scale
from ..huggingface.layers import number_layers
from ..huggingface.norms import find_norms, find_output
from ..huggingface.observed_attention import observe_attention, why_not_observed
from ..huggingface.observed_router import observe_router
from ..huggingface.routers import FoundRouter, find_routers
from ..huggingface.stub import norm_scale
from ..observed_norm import norm_form
from .gates import GateTap, gate_rule, noisy
from .weights import gathers, whole, whole_shape


@dataclass(kw_only=True)
class ModuleDescription:
    """What monitors may see of a module, and its observed parts by layer number.

    Every module in ``attentions`` and ``routers`` carries its tap as ``mcore_monitors_tap``: an
    :class:`AttentionTap`, and a :class:`RouterTap` with no listeners yet. Add listeners to these
    taps; don't replace them.
    """

    view: ModelView
    attentions: dict[int, nn.Module] = field(default_factory=dict)
    routers: dict[int, nn.Module] = field(default_factory=dict)
    #: norms by layer number and place in ``NORMS``, and the output layer under the last layer: they
    #: carry no tap, see :func:`..observed_norm.observe_norm` and :mod:`..observed_output`
    norms: dict[tuple[int, int], nn.Module] = field(default_factory=dict)
    outputs: dict[int, nn.Module] = field(default_factory=dict)
    #: layer number to the whole layer
    layers: dict[int, nn.Module] = field(default_factory=dict)
    #: hidden size; None where it is not the same everywhere
    width: int | None = None


def describe(
    module: nn.Module,
    *,
    device: torch.device,
    zero_stage: int,
    replica: Replica,
    data: Replica,
    state: StepState,
    activation_dtype: torch.dtype | None = None,
) -> ModuleDescription:
    """Find what can be watched in a module and put taps there.

    Args:
        module: the engine's module, after ``deepspeed.initialize`` has sharded it.
        device: where its parameters live.
        zero_stage: 0 to 3.
        replica: this rank among those that hold the same non-expert weights.
        data: this rank among those that train on other sequences.
        state: the step in progress, which the runtime writes.
        activation_dtype: of the activations where it is not that of the parameters (autocast).
    """
    attentions, unknown = find_attention(module, whole_shape)
    gates = {p: m for p, m in module.named_modules() if isinstance(m, TopKGate)}
    routers, unknown_routers = find_routers(module, whole_shape, skip=(TopKGate,))
    numbers, layers = number_layers(
        [a.path for a in attentions], _in_order(module, [*gates, *(r.path for r in routers)])
    )
    experts = [g.wg.out_features for g in gates.values()] + [r.experts for r in routers]
    view = ModelView(
        layers=layers,
        heads=max((a.heads for a in attentions), default=1),
        groups=max((a.groups for a in attentions), default=1),
        experts=max(experts, default=1),
        device=device,
        activation_dtype=activation_dtype or next(module.parameters()).dtype,
        sequence_length=0,
        data=data,
        head_dim=max((a.head_dim for a in attentions), default=0),
    )
    found = ModuleDescription(view=view)
    left_out = {("attention", reason): paths for reason, paths in unknown.items()}
    left_out |= {("router", reason): paths for reason, paths in unknown_routers.items()}
    for attention in attentions:
        for what, reason in _take_attention(
            found, attention, numbers[attention.path], replica, state
        ):
            left_out.setdefault((what, reason), []).append(attention.path)
    view.left_out += [f"{what} {_listed(ps)}: {why}" for (what, why), ps in left_out.items()]
    for path, gate in gates.items():
        _take_gate(found, gate, numbers[path], replica, state)
    for router in routers:
        _take_router(found, router, numbers[router.path], replica, state)
    found.layers = find_blocks(module, numbers)
    _take_norms(found, module, {numbers[a.path]: a for a in attentions})
    _take_output(found, module)
    widths = {attention_width(a, whole_shape) for a in attentions}
    widths |= {g.wg.in_features for g in gates.values()}
    found.width = widths.pop() if len(widths) == 1 else None
    # all ranks read collective views in one order
    view.attention.sort(key=lambda v: v.layer)
    view.routers.sort(key=lambda v: v.layer)
    return found


def _in_order(module: nn.Module, paths: list[str]) -> list[str]:
    order = {path: i for i, (path, _) in enumerate(module.named_modules())}
    return sorted(paths, key=order.__getitem__)


def _listed(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} like it"


def _take_attention(
    found: ModuleDescription, a: FoundAttention, layer: int, replica: Replica, state: StepState
) -> Iterator[tuple[str, str]]:
    """Enter an attention; yields (what is left out of it, why)."""
    view = found.view
    view.attention.append(
        AttentionView(
            layer=layer,
            first_group=0,
            groups=a.groups,
            heads_per_group=a.heads // a.groups,
            read=_reader(a),
            collective=any(gathers(p) for p in _weights(a)),
            replica=replica,
        )
    )
    reason = why_not_observed(a.module)
    if reason is not None:
        yield "kernel of", reason
        return
    observe_attention(a.module, a.groups, state)
    found.attentions[layer] = a.module
    broken = breaks_key_shift(a.module)
    if broken is not None:
        yield "key shift of", broken
    view.conserves_attention(
        layer, 0, a.groups, but=() if broken is None else ("attention/key_shift",)
    )
    reason = broken or hides_logits(a.module)
    if reason is None:
        scale = logit_scale(a.module, a.head_dim)
        view.activity[layer] = ActivityView(first_head=0, heads=a.heads, scale=scale)
    else:
        yield "attention activity of", reason


def _weights(a: FoundAttention) -> list[nn.Parameter]:
    norms = [n for n in (a.query_norm, a.key_norm) if n is not None]
    return [a.query, a.key, *(p for n in norms for p in n.parameters(recurse=False))]


def _reader(a: FoundAttention) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        query = whole(a.query)
        query, key = a.split(query, query if a.fused else whole(a.key))
        return (
            _scaled(query, a.query_norm, a.heads, a.head_dim),
            _scaled(key, a.key_norm, a.groups, a.head_dim),
        )

    return read


def _scaled(
    rows: torch.Tensor, norm: nn.Module | None, heads: int, head_dim: int
) -> torch.Tensor:
    """Rows [heads, d, D] with a norm's learned scale folded in, one a channel or one a row."""
    scale = None if norm is None else norm_scale(norm, whole)
    if scale is None:
        return rows
    if scale.numel() == head_dim:
        return rows * scale[:, None]
    return rows * scale.unflatten(0, (heads, head_dim))[:, :, None]


def _take_norms(
    found: ModuleDescription, module: nn.Module, attentions: dict[int, FoundAttention]
) -> None:
    view = found.view
    found.norms, unknown = find_norms(module, found.layers, attentions)
    view.left_out += unknown
    if not found.norms:
        return
    # the fewest channels of all norms, for the floor is theirs; 0 where none has a weight
    weights = [getattr(norm, "weight", None) for norm in found.norms.values()]
    channels = min((whole_shape(w).numel() for w in weights if w is not None), default=0)
    for (layer, _), norm in found.norms.items():
        centred = norm_form(norm)[1]
        for signal in ("norm/scale", "norm/shift") if centred else ("norm/scale",):
            if signal not in view.conserved:
                view.conserved[signal] = Conserved(
                    units=len(NORMS), dtype=view.activation_dtype, channels=channels
                )
            view.conserved[signal].places[layer] = (0, len(NORMS))


def _take_output(found: ModuleDescription, module: nn.Module) -> None:
    view = found.view
    output, reason = find_output(module)
    if reason is not None:
        view.left_out.append(reason)
    weight = getattr(output, "weight", None)
    if weight is None:
        return
    found.outputs = {view.layers: output}
    view.conserved["output/vocabulary_shift"] = Conserved(
        units=1,
        dtype=view.activation_dtype,
        channels=whole_shape(weight)[0],
        places={view.layers: (0, 1)},
    )


def _take_gate(
    found: ModuleDescription, gate: TopKGate, layer: int, replica: Replica, state: StepState
) -> None:
    gate.mcore_monitors_tap = GateTap(gate, state)
    found.routers[layer] = gate
    if not noisy(gate):
        found.view.conserved["router/shift"].places[layer] = (0, 1)
    found.view.routers.append(
        RouterView(
            layer=layer,
            read=lambda: whole(gate.wg.weight),
            rule=gate_rule(gate),
            collective=gathers(gate.wg.weight),
            replica=replica,
        )
    )


def _take_router(
    found: ModuleDescription, router: FoundRouter, layer: int, replica: Replica, state: StepState
) -> None:
    observe_router(router, state)
    found.routers[layer] = router.module
    config = getattr(router.module, "config", None)
    if router.rule.score == "softmax" and not getattr(config, "router_z_loss_coef", 0):
        found.view.conserved["router/shift"].places[layer] = (0, 1)
    found.view.routers.append(
        RouterView(
            layer=layer,
            read=lambda: whole(router.weight),
            rule=router.rule,
            bias=router.bias,
            collective=gathers(router.weight),
            replica=replica,
        )
    )
