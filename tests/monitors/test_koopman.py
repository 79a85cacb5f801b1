"""The Koopman monitor: the same tokens on every layout, the formulas' values, no host sync."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mcore_monitors.hosts.observed_layer import LayerTap, observe_layer
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.koopman import KoopmanMonitor, modes_of
from mcore_monitors.monitors.koopman_tokens import TokenChoice
from mcore_monitors.parallel import GroupReduce, Packed
from mcore_monitors.signals.koopman import Profile, decompose, features, profile, whiten
from mcore_monitors.views import ModelView, Replica, ResidualStream

LENGTH, SEQUENCES, WIDTH = 16, 8, 6


def view(stream: ResidualStream, device: str = "cpu") -> ModelView:
    return ModelView(
        layers=3,
        heads=1,
        groups=1,
        experts=1,
        device=torch.device(device),
        activation_dtype=torch.float32,
        sequence_length=LENGTH,
        residual=stream,
    )


def stream(**more: object) -> ResidualStream:
    given = {"width": WIDTH, "sequences": SEQUENCES, "micro_batch": SEQUENCES, "layers": (1, 3)}
    return ResidualStream(**given | {"length": LENGTH} | more)


def whole(seed: int = 0) -> Tensor:
    """A batch of all sequences, [S, B, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTH, SEQUENCES, WIDTH, generator=generator)


def readings(monitor: KoopmanMonitor, iteration: int = 1) -> dict:
    packed = Packed(monitor.schema(), torch.device("cpu"))
    monitor.collect(iteration, packed.fields)
    return monitor.read(packed.reduce())


# ---- which tokens ----


def shares(dp: int, micro: int, cp: int, sp: int) -> list[tuple[ResidualStream, Tensor]]:
    """Each rank's stream and token numbers [micro-batches, S, B, 1] of a layout."""
    numbers = torch.arange(LENGTH * SEQUENCES).view(SEQUENCES, LENGTH).T  # [S, B]
    of = (2 * cp if cp > 1 else 1) * sp
    found = []
    for rank in range(dp):
        for c in range(cp):
            chunks = [c, 2 * cp - 1 - c] if cp > 1 else [0]
            fine = [chunk * sp + part for chunk in chunks for part in range(sp)]
            for s in range(sp):
                own = len(fine) // sp
                pieces = tuple(fine[s * own : (s + 1) * own])
                size = LENGTH // of
                rows = torch.cat([numbers[p * size : (p + 1) * size] for p in pieces])
                # Megatron's sampler: replicas take micro-batches in turn
                batches = rows.unflatten(1, (-1, dp, micro))[:, :, rank].movedim(1, 0)
                one = stream(
                    micro_batch=micro,
                    replica=Replica(rank=rank, size=dp),
                    pieces=pieces,
                    pieces_of=of,
                )
                found.append((one, batches.unsqueeze(-1)))
    return found


@pytest.mark.parametrize("tokens", [1000, 128, 64, 40, 24, 7, 1])
@pytest.mark.parametrize("layout", [(1, 2, 1, 1), (2, 2, 1, 1), (4, 1, 1, 2), (1, 8, 2, 2)])
def test_every_layout_chooses_the_same_tokens(tokens: int, layout: tuple[int, ...]) -> None:
    def chosen(dp: int, micro: int, cp: int, sp: int) -> list[int]:
        table, ranks = None, 0
        for one, batches in shares(dp, micro, cp, sp):
            choice = TokenChoice(one, tokens)
            if table is None:
                table = torch.full((choice.sequences, choice.columns, 1), -1.0)
            mine = torch.full((choice.rows, choice.own_columns, 1), -1.0)
            for number, batch in enumerate(batches):
                choice.take(number, batch.float(), mine)
            choice.spread(mine, table)
            ranks += 1
        assert ranks == dp * cp * sp
        return table.flatten().int().tolist()

    alone = chosen(1, SEQUENCES, 1, 1)
    assert chosen(*layout) == alone
    assert -1 not in alone and len(set(alone)) == len(alone)  # each once, none empty
    assert min(tokens, 64) // 2 < len(alone) <= min(tokens, LENGTH * SEQUENCES)


def test_shorter_sequences_than_expected_leave_columns_empty() -> None:
    choice = TokenChoice(stream(length=None), tokens=64)
    assert (choice.sequences, choice.columns) == (1, 64)
    mine = torch.zeros(choice.rows, choice.own_columns, WIDTH)
    ((rows, columns),) = choice.take(0, whole(), mine)
    assert (columns.start, columns.stop) == (0, LENGTH)
    assert torch.equal(mine[0, :LENGTH], whole()[:, 0]) and not mine[0, LENGTH:].any()


def test_more_micro_batches_than_expected_are_passed_over() -> None:
    choice = TokenChoice(stream(micro_batch=4), tokens=1000)
    mine = torch.zeros(choice.rows, choice.own_columns, WIDTH)
    assert choice.take(1, whole()[:, :4], mine) and not choice.take(2, whole()[:, :4], mine)
    assert choice.take(0, whole()[:, :3], mine)[0][0] == slice(0, 3)  # a smaller one
    assert choice.take(0, whole(), mine)[0][0] == slice(0, 4)  # a larger one


# ---- values ----


def test_readings_are_the_formulas_values() -> None:
    monitor = KoopmanMonitor(view(stream()), every=2, rank="full", tokens=LENGTH * SEQUENCES)
    x = whole()
    made = {1: 1.1 * x + 0.1 * torch.tanh(whole(1)), 3: x + 0.2 * whole(2)}
    for layer, y in made.items():
        monitor.on_layer(layer, x, y)
    found = readings(monitor, iteration=2)
    assert set(found) == {
        f"koopman/{name}"
        for name in (
            *Profile._fields, "tokens", "eigenvalue_real", "eigenvalue_imaginary", "mode_residual",
        )
    }  # fmt: skip
    for layer, y in made.items():
        flat = x.transpose(0, 1).flatten(0, 1), y.transpose(0, 1).flatten(0, 1)
        for name, value in profile(*flat)._asdict().items():
            assert found[f"koopman/{name}"][layer] == pytest.approx([float(value)], rel=1e-5)
        modes = decompose(*whiten(*flat))
        read = [
            complex(*z)
            for z in zip(
                found["koopman/eigenvalue_real"][layer],
                found["koopman/eigenvalue_imaginary"][layer],
                strict=True,
            )
        ]
        assert sorted(map(abs, read), reverse=True) == pytest.approx([abs(z) for z in read])
        assert sorted(map(abs, read)) == pytest.approx(
            sorted(modes.eigenvalues.abs().tolist()), rel=1e-5
        )
        assert found["koopman/tokens"][layer] == [LENGTH * SEQUENCES]
    assert readings(monitor, iteration=4) == {}  # nothing of it is left for the next time


def test_a_layer_that_is_not_finite() -> None:
    monitor = KoopmanMonitor(view(stream()), every=1, rank=3, tokens=64)
    broken = whole()
    broken[2, 1, 0] = math.inf
    monitor.on_layer(1, whole(), broken)
    monitor.on_layer(3, whole(), whole(1))
    found = readings(monitor)["koopman/near_unit"]
    assert math.isnan(found[1][0]) and found[3][0] >= 0


def test_only_when_its_turn_has_come() -> None:
    monitor = KoopmanMonitor(view(stream()), every=4, rank=3, tokens=64)
    monitor.on_layer(1, whole(), 2 * whole())
    assert readings(monitor, iteration=2) == {}
    assert readings(monitor, iteration=4)["koopman/spectral_radius"][1] == pytest.approx([2.0])


def test_empty_rows_change_nothing() -> None:
    x, y = whole().flatten(0, 1), whole(1).flatten(0, 1)
    there = torch.cat([torch.ones(len(x)), torch.zeros(50)])
    more = [torch.cat([t, torch.zeros(50, WIDTH)]) for t in (x, y)]
    plain, padded = profile(x, y), features(decompose(*whiten(*more, present=there)))
    for a, b in zip(plain, padded, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_how_many_modes() -> None:
    assert [modes_of("auto", w) for w in (16, 256, 257, 8192)] == [16, 256, 32, 32]
    assert [modes_of("full", 300), modes_of(32, 16), modes_of(8, 16)] == [300, 16, 8]


def test_states_that_are_no_stream_are_refused() -> None:
    monitor = KoopmanMonitor(view(stream()), every=1, rank=2, tokens=64)
    with pytest.raises(ValueError, match="no residual stream of width 6"):
        monitor.on_layer(1, whole(), whole()[:, :, :3])


def test_a_rank_without_layers_takes_part() -> None:
    with_layers = KoopmanMonitor(view(stream()), every=1)
    without = KoopmanMonitor(view(stream(layers=())), every=1)
    assert with_layers.schema() == without.schema()
    assert readings(without) == {}
    assert not with_layers.collective  # alone there is nobody to wait for


# ---- taps ----


class Layer(torch.nn.Module):
    """Returns what Megatron's layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return hidden_states + self.linear(hidden_states), None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_tells_each_micro_batch_once(reentrant: bool) -> None:
    state, layer, told = StepState(iteration=4, armed=True), Layer(), []
    tap = LayerTap(state, every=4)
    tap.listeners.append(lambda *pair: told.append(pair))
    observe_layer(layer, tap, batch_first=False)
    x = whole().requires_grad_()
    layer(hidden_states=x)[0].sum().backward()
    assert len(told) == 1 and torch.equal(told[0][0], x) and not told[0][1].requires_grad
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)[0].sum().backward()
    assert len(told) == 2
    layer.eval()
    layer(x)
    layer.train()
    state.iteration = 6
    layer(x)
    state.iteration, state.armed = 8, False
    layer(x)
    assert len(told) == 2


def test_batch_first_states_are_turned() -> None:
    state, layer, told = StepState(iteration=1, armed=True), torch.nn.Linear(WIDTH, WIDTH), []
    tap = LayerTap(state, every=1)
    tap.listeners.append(lambda *pair: told.append(pair))
    observe_layer(layer, tap, batch_first=True, evaluation=True)
    layer.eval()(whole().transpose(0, 1))
    layer(whole()[0])  # without a batch
    assert torch.equal(told[0][0], whole())
    assert told[1][0].shape == (SEQUENCES, 1, WIDTH)


# ---- on a card ----


@pytest.mark.parametrize("rank", [3, "full"])
def test_no_sync_and_no_mix_on_a_card(rank: int | str) -> None:
    with FakeTensorMode():
        one = replace(stream(), onto=GroupReduce(None))
        monitor = KoopmanMonitor(view(one, "cuda"), every=10, rank=rank, tokens=64)
        packed = Packed(monitor.schema(), torch.device("cuda"))
        for iteration in (10, 15, 20):
            x = torch.empty(LENGTH, SEQUENCES, WIDTH, device="cuda", dtype=torch.bfloat16)
            for layer in (1, 3):
                monitor.on_layer(layer, x, x)
            monitor.collect(iteration, packed.fields)
            assert all(f.device.type == "cuda" for f in packed.fields.values())
        assert all(f.device.type == "cpu" for f in packed.reduce().values())
