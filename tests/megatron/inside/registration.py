"""``register``: every kind of layer spec in, the same with observed routers and attentions out."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mcore_monitors.errors import HostError
from mcore_monitors.hosts.megatron.observed import is_observed
from mcore_monitors.hosts.megatron.registration import register

from . import build


class FusedAttention(DotProductAttention):
    """Stands where Transformer Engine's attention does: own arguments, own extra state."""

    def __init__(self, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.channels = (k_channels, v_channels)

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing in it."""


def fused(**submodules: Any) -> ModuleSpec:
    """A layer as the Transformer Engine specs lay it out: norms fused into the linear layers."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=FusedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=WrappedTorchNorm,
        k_layernorm=WrappedTorchNorm,
    )
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        mlp=get_gpt_layer_local_spec().submodules.mlp,
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"mlp.0.weight": "mlp.linear_fc1.layer_norm_weight"},
        **submodules,
    )
    return ModuleSpec(module=TransformerLayer, submodules=layer)


def by_path() -> ModuleSpec:
    """Modules given as (place, name), which Megatron imports when it builds a layer."""
    spec = get_gpt_layer_local_spec()
    attention = spec.submodules.self_attention
    attention.module = ("megatron.core.transformer.attention", "SelfAttention")
    place = "megatron.core.transformer.dot_product_attention"
    attention.submodules.core_attention = ModuleSpec(module=(place, "DotProductAttention"))
    return spec


def by_partial() -> ModuleSpec:
    """Builders with arguments of their own."""
    spec = get_gpt_layer_local_spec(num_experts=build.EXPERTS)
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = partial(DotProductAttention, softmax_scale=0.5)
    moe = spec.submodules.mlp
    moe.keywords["submodules"].router = partial(TopKRouter)
    return spec


def block(**more: Any) -> TransformerBlockSubmodules:
    settings = build.config(experts=True, **more)
    return get_gpt_decoder_block_spec(settings, use_transformer_engine=False)


#: name -> (spec, whether the model has experts, routers in it, further settings)
SPECS: dict[str, tuple[Any, bool, int, dict[str, Any]]] = {
    "dense": (get_gpt_layer_local_spec, False, 0, {}),
    "experts": (lambda: get_gpt_layer_local_spec(num_experts=build.EXPERTS), True, 2, {}),
    "block": (block, True, 2, {}),
    "mixed block": (
        lambda: block(moe_layer_freq=[0, 1]), True, 1, {"moe_layer_freq": [0, 1]},
    ),
    "fused": (fused, False, 0, {"qk_layernorm": True}),
    "by path": (by_path, False, 0, {}),
    "by partial": (by_partial, True, 2, {}),
}  # fmt: skip


def shape(node: Any, without: tuple[str, ...] = ()) -> Any:
    """A spec as nested tuples that can be compared, without some of its fields."""
    if is_dataclass(node) and not isinstance(node, type):
        kept = [f.name for f in fields(node) if f.name not in without]
        return type(node), tuple((name, shape(getattr(node, name), without)) for name in kept)
    if isinstance(node, partial):
        return node.func, shape(node.args, without), shape(node.keywords, without)
    if isinstance(node, dict):
        return tuple((key, shape(value, without)) for key, value in node.items())
    if isinstance(node, list | tuple):
        return tuple(shape(item, without) for item in node)
    return node


@pytest.fixture(params=SPECS)
def case(request: pytest.FixtureRequest) -> tuple[Any, bool, int, dict[str, Any]]:
    make, *rest = SPECS[request.param]
    return make(), *rest


def test_every_attention_and_router_is_observed(case) -> None:
    spec, experts, routers, more = case
    model = build.gpt(register(spec), build.config(experts, **more))
    attentions = [a.core_attention for a in build.modules(model, SelfAttention)]
    assert [is_observed(a) for a in attentions] == [True, True]
    assert [is_observed(r) for r in build.modules(model, Router)] == [True] * routers
    assert [a.softmax_scale for a in attentions] == [
        a.core_attention.softmax_scale
        for a in build.modules(build.gpt(spec, build.config(experts, **more)), SelfAttention)
    ]


def test_the_given_spec_is_unchanged(case) -> None:
    spec, experts, _, more = case
    before = shape(copy.deepcopy(spec))
    register(spec)
    assert shape(spec) == before
    model = build.gpt(spec, build.config(experts, **more))
    assert not any(is_observed(module) for module in model.modules())


def test_registering_twice_is_the_same_as_once(case) -> None:
    spec = case[0]
    once = register(spec)
    assert shape(once) != shape(spec)
    assert shape(register(once)) == shape(once)


def test_nothing_but_the_two_is_replaced(case) -> None:
    spec, replaced = case[0], ("core_attention", "router")
    assert shape(register(spec), replaced) == shape(spec, replaced)


def test_the_state_dict_has_the_same_keys(case) -> None:
    spec, experts, _, more = case
    plain = build.gpt(spec, build.config(experts, **more))
    observed = build.gpt(register(spec), build.config(experts, **more))
    assert list(observed.state_dict()) == list(plain.state_dict())
    sharded, wanted = observed.sharded_state_dict(), plain.sharded_state_dict()
    assert {k: getattr(v, "key", None) for k, v in sharded.items()} == {
        k: getattr(v, "key", None) for k, v in wanted.items()
    }
    observed.load_state_dict(plain.state_dict())


def test_a_list_of_layers() -> None:
    specs = register([get_gpt_layer_local_spec(), get_gpt_layer_local_spec(num_experts=4)])
    assert isinstance(specs, list) and len(specs) == 2
    for spec in specs:
        attention = spec.submodules.self_attention.submodules
        assert issubclass(attention.core_attention, DotProductAttention)
        assert hasattr(attention.core_attention, "mcore_monitors_tap")
    assert hasattr(specs[1].submodules.mlp.keywords["submodules"].router, "mcore_monitors_tap")


def test_submodules_and_a_partial_over_them() -> None:
    layer = get_gpt_layer_local_spec(num_experts=4)
    moe = register(layer.submodules.mlp)
    assert isinstance(moe, partial) and moe.func is layer.submodules.mlp.func
    assert hasattr(moe.keywords["submodules"].router, "mcore_monitors_tap")
    submodules = register(layer.submodules)
    assert hasattr(submodules.self_attention.submodules.core_attention, "mcore_monitors_tap")


def test_latent_attention() -> None:
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    attention = register(spec).submodules.self_attention
    assert attention.module is MLASelfAttention
    assert hasattr(attention.submodules.core_attention, "mcore_monitors_tap")


def test_no_attention_stays_none() -> None:
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = IdentityOp
    assert register(spec).submodules.self_attention.submodules.core_attention is IdentityOp


def test_a_function_that_builds_is_left_as_it_is() -> None:
    def make(*args: Any, **kwargs: Any) -> DotProductAttention:
        return DotProductAttention(*args, **kwargs)

    spec = get_gpt_layer_local_spec()
    for builder in (make, ModuleSpec(module=make), partial(make)):
        spec.submodules.self_attention.submodules.core_attention = builder
        kept = register(spec).submodules.self_attention.submodules.core_attention
        assert shape(kept) == shape(builder)


@pytest.mark.parametrize(
    "wrong", [None, "local", 3, TransformerLayer, {}], ids=lambda wrong: str(wrong)[:20]
)
def test_what_is_no_spec_is_refused(wrong: Any) -> None:
    with pytest.raises(HostError, match=r"register\(\) was given .*allowed: a Megatron layer spec"):
        register(wrong)


def test_a_configuration_is_no_spec() -> None:
    with pytest.raises(HostError, match="TransformerConfig"):
        register(build.config())
