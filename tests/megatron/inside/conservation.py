"""Conservation residuals on a built model: every site found, healthy ones quiet, faults named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.identity_op import IdentityOp

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, NORMS
from mcore_monitors.detection.localise import localise
from mcore_monitors.hosts.megatron.kernels import faulty_kernel
from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.hosts.observed_norm import observe_norm
from mcore_monitors.hosts.observed_output import observe_output
from mcore_monitors.hosts.taps import AttentionTap, RouterTap, Tap
from mcore_monitors.hosts.wiring import wire
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.monitors.conservation.limits import residual_limits
from mcore_monitors.parallel import Packed

from . import attentions, build

KEY, VALUE, QUERY = ATTENTION_RESIDUALS
INPUT, MLP, Q, K, FINAL = range(5)


class Watched:
    """A model with the residuals watched, every step sampled.

    Args:
        model: built from a registered spec.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.described = MegatronModel([model])
        self.view = self.described.view
        self.view.sequence_length = build.SEQUENCE
        self.monitor = ConservationMonitor(
            self.view, self.described.context, self.described.vocabulary, whole=True
        )
        self.state = StepState(iteration=1, armed=True)
        self._packed = Packed(self.monitor.schema(), self.view.device)
        self.attentions = {n: AttentionTap(self.state) for n in self.described.attentions}
        self.routers = {n: RouterTap() for n in self.described.routers}
        self.norms = {place: Tap(self.state) for place in self.described.norms}
        self.outputs = {n: Tap(self.state) for n in self.described.outputs}
        for layer, tap in self.attentions.items():
            self.described.attentions[layer].mcore_monitors_tap = tap
        for layer, tap in self.routers.items():
            self.described.routers[layer].mcore_monitors_tap = tap
        for place, tap in self.norms.items():
            observe_norm(self.described.norms[place], tap)
        for layer, tap in self.outputs.items():
            observe_output(self.described.outputs[layer], tap)

    def wire(self) -> Watched:
        # hooks unguarded: an error in one is to be seen
        crew = SimpleNamespace(monitors=[self.monitor], guarded=lambda _, call, **__: call)
        runtime = SimpleNamespace(crew=crew, state=self.state)
        wire(runtime, self.view, self.attentions, self.routers, self.norms, self.outputs)
        return self

    def step(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Token losses and all gradients of one step."""
        self.model.zero_grad()
        losses = build.losses(self.model)
        losses.mean().backward()
        named = self.model.named_parameters()
        return losses.detach(), {n: p.grad for n, p in named if p.grad is not None}

    def sizes(self) -> dict[str, dict[int, list[float]]]:
        """Residuals over their limits."""
        limits = residual_limits(self.view)
        return {
            signal: {n: [x / limits[signal] for x in values] for n, values in layers.items()}
            for signal, layers in self.monitor.read(self.collected()).items()
        }

    def collected(self) -> dict[str, torch.Tensor]:
        self.monitor.collect(1, self._packed.fields)
        return self._packed.reduce()


def gpt(experts: bool = True, **more: Any) -> torch.nn.Module:
    settings = build.config(experts=experts, **more)
    spec = get_gpt_layer_local_spec(
        num_experts=build.EXPERTS if experts else None,
        qk_layernorm=more.get("qk_layernorm", False),
        normalization=more.get("normalization"),
    )
    return build.gpt(register(spec), settings)


def worst(sizes: dict[str, dict[int, list[float]]]) -> float:
    values = [x for layers in sizes.values() for xs in layers.values() for x in xs]
    return max(x for x in values if x == x)


SETTINGS: dict[str, dict[str, Any]] = {
    "RMSNorm": {"normalization": "RMSNorm"},
    "LayerNorm": {},
    "QK norm": {"normalization": "RMSNorm", "qk_layernorm": True},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "attention recomputed": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn"],
    },
    "experts recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_healthy_step_is_quiet_complete_and_bitwise_the_same(name: str) -> None:
    more = SETTINGS[name]
    plain, watched = Watched(gpt(**more)), Watched(gpt(**more)).wire()
    losses, gradients = plain.step()
    got, got_gradients = watched.step()
    assert torch.equal(got, losses)
    assert got_gradients.keys() == gradients.keys()
    assert all(torch.equal(got_gradients[n], g) for n, g in gradients.items())

    fields = watched.collected()
    for signal in ATTENTION_RESIDUALS:
        seen = watched.monitor.sums_of(signal, fields)[1].tolist()
        assert seen == [[build.BATCH] * build.GROUPS] * build.LAYERS
    layernorm = more.get("normalization") != "RMSNorm"
    qk = [Q, K] if more.get("qk_layernorm") else []
    for signal in ("norm/scale", "norm/shift") if layernorm else ("norm/scale",):
        seen = (watched.monitor.sums_of(signal, fields)[1] > 0).tolist()
        for layer in range(build.LAYERS):
            final = [FINAL] if layer == build.LAYERS - 1 else []
            wanted = [INPUT, MLP, *qk, *final]
            assert [i for i, here in enumerate(seen[layer]) if here] == wanted, (signal, layer)
    seen = watched.monitor.sums_of("router/shift", fields)[1]
    assert (seen > 0).tolist() == [[True]] * build.LAYERS
    seen = watched.monitor.sums_of("output/vocabulary_shift", fields)[1]
    assert (seen > 0).tolist() == [[False], [True]]

    watched.step()
    assert worst(watched.sizes()) < 0.3
    assert watched.view.left_out == []


def test_dense_models_have_no_router() -> None:
    watched = Watched(gpt(experts=False)).wire()
    watched.step()
    assert "router/shift" not in {n for n, layers in watched.sizes().items() if layers}


def test_recomputing_gives_the_same_sums() -> None:
    plain, again = (Watched(gpt(**SETTINGS[n])).wire() for n in ("LayerNorm", "full recompute"))
    for watched in (plain, again):
        watched.step()
    wanted, got = plain.collected(), again.collected()
    for name in wanted:
        count = (..., slice(-1, None)) if name.endswith("bias") else 1
        torch.testing.assert_close(got[name][count], wanted[name][count])


def test_nothing_is_told_on_steps_that_are_not_sampled() -> None:
    watched = Watched(gpt()).wire()
    watched.state.armed = False
    watched.step()
    fields = watched.collected()
    assert not any(watched.monitor.sums_of(n, fields).any() for n in watched.view.conserved)


def test_latent_attention_keeps_its_identities() -> None:
    build.config()  # starts the process groups
    watched = Watched(attentions.build(attentions.LAYOUTS["latent"], torch.float32)).wire()
    watched.step()
    sizes = watched.sizes()
    for signal in ATTENTION_RESIDUALS:
        assert {len(v) for v in sizes[signal].values()} == {attentions.HEADS}
        assert all(x < 0.3 for v in sizes[signal].values() for x in v)


# ---- faults: the hook that spoils a gradient comes before the one that looks ----


def spoil(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def listener(x: torch.Tensor, *_: Any, **__: Any) -> None:
        x.register_hook(change)

    return listener


def lose_a_column(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[..., 1] = 0
    return gradient


def lose_a_block(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:4] = 0
    return gradient


def kernel(watched: Watched) -> None:
    tap = watched.attentions[2]
    tap.faulty, tap.faulty_from = faulty_kernel(0.03), 1


def dk(watched: Watched) -> None:
    change = spoil(lose_a_block)
    watched.attentions[1].listeners.append(lambda call: change(call.key))


def dq(watched: Watched) -> None:
    change = spoil(lose_a_block)
    watched.attentions[1].listeners.append(lambda call: change(call.query))


def dv(watched: Watched) -> None:
    change = spoil(lose_a_block)
    watched.attentions[1].listeners.append(lambda call: change(call.value))


def router(watched: Watched) -> None:
    watched.routers[2].listeners.append(spoil(lose_a_column))


def output(watched: Watched) -> None:
    watched.outputs[2].listeners.append(spoil(lose_a_column))


def norm(watched: Watched) -> None:
    module = watched.described.norms[1, MLP]

    def without_projection(x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.detach().var(-1, keepdim=True, correction=0) + module.eps)
        return (x - x.mean(-1, keepdim=True)) * scale * module.weight + module.bias

    module.forward = without_projection


FAULTS: dict[str, tuple[Callable[[Watched], None], tuple[int, ...], str, tuple[str, ...]]] = {
    "row term": (kernel, (2,), "attention", (KEY,)),
    "block left out of dK": (dk, (1,), "attention", (KEY, QUERY)),
    "block left out of dQ": (dq, (1,), "attention", (QUERY,)),
    "block left out of dV": (dv, (1,), "attention", (VALUE,)),
    "column lost in a router": (router, (2,), "router", ("router/shift",)),
    "part of the vocabulary lost": (output, (2,), "output layer", ("output/vocabulary_shift",)),
    "norm without projection": (norm, (1,), "pre-MLP norm", ("norm/scale",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_where_it_is_and_nowhere_else(fault: str) -> None:
    spoils, layers, place, broken = FAULTS[fault]
    watched = Watched(gpt())
    spoils(watched)
    watched.wire().step()
    (site,) = localise(watched.sizes())
    assert (site.layers, site.place, site.broken) == (layers, place, broken)


# ---- what does not hold is left out and said ----


@pytest.mark.parametrize(
    ("more", "without", "reason"),
    [
        ({"softmax_type": "learnable"}, (KEY,), "softmax_type 'learnable'"),
        ({"fp8_dot_product_attention": True}, ATTENTION_RESIDUALS, "8-bit"),
        ({"moe_z_loss_coeff": 1e-3}, ("router/shift",), "z-loss"),
        ({"moe_router_score_function": "sigmoid"}, ("router/shift",), "sigmoid"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, ("router/shift",), "sinkhorn"),
    ],
)
def test_what_does_not_hold_is_left_out(more, without, reason) -> None:
    view = MegatronModel([gpt(**{"moe_aux_loss_coeff": 0.0, **more})]).view
    for name, residual in view.conserved.items():
        assert bool(residual.places) is (name not in without), name
    assert view.left_out and all(reason in sentence for sentence in view.left_out)


def test_a_norm_inside_a_linear_layer_is_left_out_once() -> None:
    model = gpt(experts=False)
    for layer in model.decoder.layers:
        layer.input_layernorm = IdentityOp()
        layer.self_attention.linear_qkv.layer_norm_weight = torch.nn.Parameter(torch.ones(32))
    described = MegatronModel([model])
    assert {unit for _, unit in described.norms} == {NORMS.index("pre-MLP"), FINAL}
    assert set(described.view.left_out) == {
        "input norms: ColumnParallelLinear doesn't show what the norm inside it gives out"
    }


def test_formats_and_sizes_of_the_residuals() -> None:
    settings = build.config(experts=True, moe_router_dtype="fp32", params_dtype=torch.bfloat16)
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    conserved = MegatronModel([build.gpt(register(spec), settings)]).view.conserved
    assert conserved["router/shift"].dtype == torch.float32
    assert conserved[KEY].dtype == conserved["norm/scale"].dtype == torch.bfloat16
    assert conserved["output/vocabulary_shift"].channels == build.WORDS
    assert conserved["router/shift"].channels == build.EXPERTS
    assert conserved["norm/scale"].channels == 32
