"""Conservation monitor on norms, routers and the output, and the evidence of a bias."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS, EVIDENCE, NORMS
from mcore_monitors.hosts.observed_norm import norm_form, observe_norm
from mcore_monitors.hosts.taps import Tap
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import TOKENS, ConservationMonitor
from mcore_monitors.monitors.conservation.evidence import Directions, Spread
from mcore_monitors.monitors.conservation.limits import residual_limits, smallest_bias
from mcore_monitors.monitors.conservation.turns import stride_of
from mcore_monitors.parallel import GroupSum, Packed
from mcore_monitors.views import Conserved, ModelView

from .. import distributed
from .borders import attention, cross
from .models import CPU, TinyModel, reduced, sample

ROUTER, OUTPUT, SCALE, SHIFT = (
    "router/shift",
    "output/vocabulary_shift",
    "norm/scale",
    "norm/shift",
)
SPREAD = EVIDENCE[1]


def view() -> ModelView:
    """All residuals, in layer 2."""
    model = TinyModel().view()
    model.conserved[ROUTER].places[2] = (0, 1)
    for name, units, channels in ((SCALE, 5, 16), (SHIFT, 5, 16), (OUTPUT, 1, 32)):
        model.conserved[name] = Conserved(
            units=units, dtype=torch.float32, channels=channels, places={2: (0, units)}
        )
    return model


def monitor(vocabulary: GroupSum | None = None) -> ConservationMonitor:
    return ConservationMonitor(view(), GroupSum(None), vocabulary, whole=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def give(hook, x: torch.Tensor, gradient: torch.Tensor) -> None:
    """Let a listener watch a tensor of a graph, and send it a gradient."""
    inner = x.clone().requires_grad_() * 1
    hook(inner)
    inner.backward(gradient)


# ---- router and output ----


@pytest.mark.parametrize(("name", "listener"), [(ROUTER, "on_router"), (OUTPUT, "on_output")])
def test_rows_are_pooled_over_all_tokens_of_all_micro_batches(name: str, listener: str) -> None:
    watched = monitor()
    gradients = [normal(6, 2, 8), normal(3, 1, 8, seed=1)]
    for gradient in gradients:
        give(partial(getattr(watched, listener), 2), torch.zeros_like(gradient), gradient)
    rows = torch.cat([g.flatten(0, 1) for g in gradients]).double()
    wanted = rows.sum(-1).abs().sum() / rows.abs().sum()
    readings = sample([watched], 10)
    assert readings[name] == {2: [pytest.approx(wanted.item(), rel=1e-5)]}
    assert sample([watched], 20) == {}


@pytest.mark.parametrize(("name", "listener"), [(ROUTER, "on_router"), (OUTPUT, "on_output")])
def test_a_softmax_keeps_its_shift_and_a_lost_column_does_not(name: str, listener: str) -> None:
    for lost in (False, True):
        watched = monitor()
        logits = normal(16, 8).requires_grad_()
        inner = logits * 1
        if lost:
            inner.register_hook(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], dim=-1))
        # a hook that changes the gradient comes before the one that looks
        getattr(watched, listener)(2, inner)
        (inner.softmax(-1) * normal(16, 8, seed=1)).sum().backward()
        (value,) = sample([watched], 10)[name][2]
        assert value > 0.01 if lost else value < 1e-6


def test_no_gradient_is_no_reading_and_a_broken_one_is_nan() -> None:
    watched = monitor()
    give(partial(watched.on_router, 2), torch.zeros(4, 8), torch.zeros(4, 8))
    assert ROUTER not in sample([watched], 10)
    broken = normal(4, 8)
    broken[0, 0] = math.nan
    give(partial(watched.on_router, 2), torch.zeros(4, 8), broken)
    readings = watched.read(reduced([watched], 20))
    assert math.isnan(readings[ROUTER][2][0])
    watched.on_router(2, torch.zeros(4, 8))  # frozen: nothing to hook


def _half_a_vocabulary_each(rank: int) -> dict:
    """Two tensor-parallel ranks; micro-batches need not be of one size."""
    watched = monitor(GroupSum(dist.group.WORLD))
    assert watched.collective
    packed = Packed(watched.schema(), CPU)
    for i, tokens in enumerate((6, 4)):
        shard = normal(tokens, 1, 32, seed=i)[..., 16 * rank : 16 * rank + 16]
        give(partial(watched.on_output, 2), torch.zeros_like(shard), shard)
    watched.collect(10, packed.fields)
    return watched.read(packed.reduce())


def test_a_vocabulary_over_two_ranks_equals_a_whole_one() -> None:
    alone = monitor()
    for i, tokens in enumerate((6, 4)):
        give(partial(alone.on_output, 2), torch.zeros(tokens, 1, 32), normal(tokens, 1, 32, seed=i))
    wanted = sample([alone], 10)[OUTPUT][2]
    for readings in distributed.run(2, _half_a_vocabulary_each):
        assert readings[OUTPUT][2] == pytest.approx(wanted, rel=1e-5)


# ---- norms ----


class Residual(nn.Module):
    """A pre-norm block: the input of the norm goes round it as well."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.inside = norm, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inside(self.norm(x)).tanh()


class _Careless(torch.autograd.Function):
    """RMSNorm whose backward leaves the projection term out."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class CarelessRMSNorm(nn.Module):
    eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Careless.apply(x)


def built(
    norm: nn.Module, *, whole: bool = True
) -> tuple[Residual, ConservationMonitor, StepState]:
    torch.manual_seed(0)
    block, state = Residual(norm), StepState(iteration=10, armed=True)
    watched = ConservationMonitor(view(), GroupSum(None), whole=whole, interval=10, state=state)
    tap = Tap(state)
    tap.listeners.append(partial(watched.on_norm, 2, NORMS.index("pre-MLP")))
    observe_norm(block.norm, tap)
    return block, watched, state


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
def test_a_right_norm_keeps_its_identities_whatever_its_epsilon(make, scale: float) -> None:
    block, watched, _ = built(make(16, eps=1e-5))
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.copy_(normal(16, seed=5))
    for seed in range(2):
        (block(scale * normal(6, 2, 16, seed=seed)).square().sum()).backward()
    # without an input that wants a gradient there is none to look at
    assert sample([watched], 10) == {}
    for seed in range(2):
        x = (scale * normal(6, 2, 16, seed=seed)).requires_grad_()
        block(x).square().sum().backward()
    readings = sample([watched], 10)
    assert set(readings) == {SCALE, SHIFT} if make is nn.LayerNorm else {SCALE}
    for layers in readings.values():
        values = layers[2]
        assert [math.isnan(value) for value in values] == [True, False, True, True, True]
        assert values[1] < 2e-6


def test_a_norm_without_its_projection_is_seen() -> None:
    block, watched, _ = built(CarelessRMSNorm())
    block(normal(6, 2, 16).requires_grad_()).square().sum().backward()
    assert sample([watched], 10)[SCALE][2][1] > 0.1


@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_that_is_watched_computes_the_same(make) -> None:
    """Bit for bit, although the residual connection's gradient is added to the norm's."""
    plain = Residual(make(16, eps=1e-5))
    block, _, _ = built(make(16, eps=1e-5))
    block.load_state_dict(plain.state_dict())
    x = [normal(64, 2, 16).requires_grad_() for _ in range(2)]
    out = [module(each) for module, each in zip((plain, block), x, strict=True)]
    for each in out:
        each.square().sum().backward()
    assert torch.equal(out[0], out[1]) and torch.equal(x[0].grad, x[1].grad)
    weights = zip(plain.parameters(), block.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in weights)


@pytest.mark.parametrize("case", ["not sampled", "evaluation", "no gradient"])
def test_what_does_not_count_is_not_told(case: str) -> None:
    block, watched, state = built(nn.RMSNorm(16, eps=1e-5))
    state.armed = case != "not sampled"
    block.train(case != "evaluation")
    with torch.set_grad_enabled(case != "no gradient"):
        out = block(normal(6, 2, 16).requires_grad_())
    if case != "no gradient":
        out.sum().backward()
    assert sample([watched], 10) == {}


def test_a_recomputed_norm_counts_once() -> None:
    readings = []
    for reentrant in (None, True, False):
        block, watched, _ = built(nn.RMSNorm(16, eps=1e-5))
        x = normal(6, 2, 16).requires_grad_()
        if reentrant is None:
            out = block(x)
        else:
            out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        out.square().sum().backward()
        readings.append(watched.sums_of(SCALE, reduced([watched], 10)))
    torch.testing.assert_close(readings[0][1], readings[1][1])
    torch.testing.assert_close(readings[0][1], readings[2][1])


def test_the_input_may_go_into_a_norm_by_many_ways_and_elsewhere_too() -> None:
    """The parts of the norm's gradient are added up, and nothing else is: leaf or not."""

    class LongRMSNorm(nn.Module):
        eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            square = (x * x).mean(-1, keepdim=True)
            return (x.double() / (square + self.eps).sqrt().double()).float()

    for leaf in (True, False):
        block, watched, _ = built(LongRMSNorm())
        x = normal(6, 2, 16).requires_grad_()
        block(x if leaf else x * 1).square().sum().backward()
        assert sample([watched], 10)[SCALE][2][1] < 1e-6


def test_what_waits_of_a_norm_keeps_no_activation_alive() -> None:
    """Not even where all that is kept is a few tokens of it."""
    block, watched, state = built(nn.RMSNorm(16, eps=1e-5), whole=False)
    state.iteration = 30  # the norm is due
    seen = []
    block.norm.register_forward_hook(
        lambda _, x, y: seen.extend(weakref.ref(t.untyped_storage()) for t in (*x, y))
    )
    gc.disable()  # what only a cycle keeps would stay
    try:
        block(normal(4 * TOKENS, 1, 16).requires_grad_() * 1).square().sum().backward()
        assert len(seen) == 2 and all(ref() is None for ref in seen)
    finally:
        gc.enable()
    assert 0 < sample([watched], 30)[SCALE][2][1] < 1e-6


def test_a_check_looks_at_every_token() -> None:
    block, watched, _ = built(CarelessRMSNorm())
    x = normal(4 * TOKENS, 1, 16).requires_grad_()
    before = block.norm(x * 1)
    before.square().sum().backward()
    every = watched.sums_of(SCALE, reduced([watched], 10))
    dx = 2 * before.detach() * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-5)
    assert every[1, 1, 1].item() > (x.detach() * dx).abs().sum().item()


def test_a_norm_that_hands_the_residual_on_is_left_alone() -> None:
    class TwoRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    norm, watched = TwoRMSNorm(16, eps=1e-5), monitor()
    tap = Tap(StepState(iteration=10, armed=True))
    tap.listeners.append(partial(watched.on_norm, 2, 0))
    observe_norm(norm, tap)
    out, residual = norm(normal(3, 16).requires_grad_())
    (out.sum() + residual.sum()).backward()
    assert sample([watched], 10) == {}


def test_forms_that_are_known() -> None:
    assert norm_form(nn.LayerNorm(4, eps=1e-6)) == (1e-6, True)
    assert norm_form(CarelessRMSNorm()) == (1e-5, False)
    assert "does not say its epsilon" in norm_form(nn.RMSNorm(4))
    assert "no norm that is known" in norm_form(nn.Linear(4, 4))


# ---- evidence of a bias ----


def direction_sums(mean: float, seed: int, sequences: int = 8) -> torch.Tensor:
    """[layers 2, directions 2, groups 2, 4] of signed residuals around ``mean`` ± 1."""
    r = mean + normal(sequences, 2, 2, 2, seed=seed).double()
    count = torch.full_like(r[0], sequences)
    return torch.stack([r.sum(0), r.abs().sum(0), r.square().sum(0), count], dim=-1)


def test_rounding_gives_little_evidence_and_a_bias_much() -> None:
    limit = residual_limits(TinyModel().view())["attention/key_shift_bias"]
    for mean, biased in ((0.0, False), (1.0, True)):
        watched = Directions(2, 2, least=0.1)
        evidence = np.stack([watched.add(direction_sums(mean, seed).numpy()) for seed in range(30)])
        assert evidence.shape == (30, 2, 2)
        assert (evidence.max().item() > limit) is biased


def test_a_bias_that_is_small_beside_the_floor_is_no_evidence() -> None:
    watched = Directions(2, 2, least=2.0)
    assert not [watched.add(direction_sums(1.0, seed).numpy()) for seed in range(20)][-1].any()


def test_layers_and_directions_are_apart() -> None:
    sums = direction_sums(0.0, 0)
    sums[0, 1] = direction_sums(3.0, 1)[0, 1]
    evidence = Directions(2, 2, least=2.0).add(sums.numpy())
    assert evidence[0, 1] > 1
    evidence[0, 1] = 0
    assert not evidence.any()


def test_an_overflow_does_not_blind_the_window_and_a_restart_empties_it() -> None:
    watched = Directions(2, 2, least=0.1)
    for seed in range(5):
        watched.add(direction_sums(1.0, seed).numpy())
    assert watched.add(np.full((2, 2, 2, 4), math.nan)).min() > 5
    watched.clear()
    assert not watched.add(np.zeros((2, 2, 2, 4))).any()


def test_the_monitor_gives_evidence_of_a_wrong_row_term() -> None:
    """All sequences of a sample push the same way, and samples add up."""
    model = TinyModel().view()
    limit = residual_limits(model)["attention/key_shift_bias"]
    for strength, biased in ((0.0, False), (0.03, True)):
        state = StepState()
        watched = ConservationMonitor(model, GroupSum(None), state=state)
        for step in range(8):
            state.iteration = step
            cross(watched, 1, attention(strength=strength, seed=step, batch=8))
            readings = sample([watched], step)
        assert (max(readings["attention/key_shift_bias"][1]) > limit) is biased
        assert set(readings["attention/key_shift_bias"]) == {1}


def test_the_monitor_gives_evidence_of_two_scores_in_one_kernel() -> None:
    """One group's dK is too long by a little: not a sample's size says so, but its spread does."""
    model = view()
    for name in ATTENTION_RESIDUALS:
        model.conserved[name].dtype = torch.bfloat16
    limits = residual_limits(model)
    for off in (0.0, 0.02):
        state = StepState()
        watched = ConservationMonitor(model, GroupSum(None), state=state)
        for step in range(0, 3 * stride_of("attention"), stride_of("attention")):
            state.iteration = step + 1
            parts = attention(seed=step, batch=32, length=64, channels=16, dtype=torch.bfloat16)
            parts["dk"][:, :, 1] *= 1 + off
            cross(watched, 1, parts)
            readings = sample([watched], step)
        evidence = [x / limits[SPREAD] for x in readings[SPREAD][1]]
        assert evidence[0] == 0 and (evidence[1] > 1) is (off > 0), evidence
        assert all(x < limits[ATTENTION_RESIDUALS[2]] for x in readings[ATTENTION_RESIDUALS[2]][1])


def test_the_spread_forgets_and_passes_over_what_is_broken() -> None:
    watched = Spread(1, 2, sigma=1.0)
    loud = np.array([[[90.0, 10.0], [0.0, 0.0]]])
    evidence = watched.add(loud)[0]
    assert evidence[0] > 20 and math.isnan(evidence[1])
    assert np.isnan(watched.add(loud * math.nan)).all()
    quiet = np.array([[[5.0, 10.0], [0.0, 0.0]]])
    assert watched.add(quiet)[0, 0] > 10  # the loud one is among the last three
    watched.clear()
    assert watched.add(quiet)[0, 0] == 0


def test_limits_follow_the_format_and_need_a_sequence_length() -> None:
    model = view()
    fine = residual_limits(model)
    assert set(fine) == {*model.conserved, *EVIDENCE}
    model.conserved["attention/key_shift"].dtype = torch.bfloat16
    coarse = residual_limits(model)
    assert coarse["attention/key_shift"] > 10 * fine["attention/key_shift"]
    assert coarse[SCALE] == fine[SCALE]
    assert smallest_bias(model) < coarse["attention/key_shift"]
    model.sequence_length = 0
    assert residual_limits(model) == {}
    assert smallest_bias(model) == math.inf
