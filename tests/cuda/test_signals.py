"""On a real card: every signal is the CPU's, and PyTorch's own kernels keep the identities.

Skipped where there is none; ``test_fake_cuda.py`` in tests/signals and tests/monitors needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mcore_monitors.calls import AttentionCall
from mcore_monitors.catalogue.conservation import ATTENTION_RESIDUALS
from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.monitors.router import RouterMonitor
from mcore_monitors.parallel import GroupSum, Packed
from mcore_monitors.signals import conservation as c
from mcore_monitors.signals.conservation.floors import limit
from mcore_monitors.signals.direction import leading_directions
from mcore_monitors.signals.eigenvalues import symmetric_eigenvalues
from mcore_monitors.signals.koopman import profile
from mcore_monitors.signals.spectra import effective_rank
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_spectra import update_spectra
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr
from mcore_monitors.views import AttentionView, ModelView, Replica, RouterView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

LENGTH, BATCH, HEADS, GROUPS, CHANNELS = 512, 4, 8, 4, 64
CUDA = torch.device("cuda")


@contextmanager
def no_sync() -> Iterator[None]:
    """An error where anything waits for the card."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_itself_raises() -> None:
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> tuple[torch.Tensor, ...]:
    """Queries and keys before and after, with a rank-1 part in the update."""
    old = [0.02 * normal(n, CHANNELS, 512, seed=n) for n in (HEADS, GROUPS)]
    new = [
        w + 1e-4 * (normal(*w.shape, seed=2) + normal(len(w), CHANNELS, 1) @ normal(1, 512, seed=3))
        for w in old
    ]
    return (*old, *new)


@pytest.mark.parametrize("rows", [2, 15, 64, 128, 256, 400, 1100])
def test_eigenvalues_are_lapacks(rows: int) -> None:
    made = normal(5, rows, rows + 3, seed=rows).double()
    matrices = made @ made.mT
    matrices[1] *= 1e-30
    matrices[2] = 0
    matrices[3] = 1
    wanted = torch.linalg.eigvalsh(matrices)
    there = matrices.to(CUDA)
    there[:, torch.ones(rows, rows, device=CUDA).triu(1).bool()] = torch.nan  # never read
    found = symmetric_eigenvalues(there.clone()).cpu()
    assert ((found - wanted).abs().amax(1) <= 1e-13 * wanted.abs().amax(1)).all()
    if rows < 1000:  # beyond, PyTorch's own
        with no_sync():
            symmetric_eigenvalues(there)


@pytest.mark.parametrize("route", [update_spectra, update_spectra_qr])
def test_effective_ranks_are_the_cpus(route) -> None:
    here = route(*weights())
    there = route(*(w.to(CUDA) for w in weights()))
    for cpu, cuda in zip(here, there, strict=True):
        torch.testing.assert_close(
            effective_rank(cuda).cpu(), effective_rank(cpu), rtol=1e-6, atol=0
        )


def test_leading_directions_are_the_cpus() -> None:
    found = []
    for where in ("cpu", CUDA):
        w = [x.to(where) for x in weights()]
        found.append(leading_directions(update_grams(*w), *w).cpu().double())
    along = (found[0] * found[1]).sum(-1).abs()
    torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=1e-3)


def test_a_koopman_profile_is_the_cpus() -> None:
    x = normal(2, 400, 96)
    y = x + 0.3 * x @ normal(96, 96, seed=5) / 96**0.5
    here, there = profile(x, y), profile(x.to(CUDA), y.to(CUDA))
    for name in ("near_unit", "spectral_radius", "nonlinearity"):
        cpu, cuda = (torch.as_tensor(getattr(p, name)).cpu() for p in (here, there))
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)


KERNELS = {
    SDPBackend.FLASH_ATTENTION: (torch.bfloat16, torch.float16),
    SDPBackend.CUDNN_ATTENTION: (torch.bfloat16, torch.float16),
    SDPBackend.EFFICIENT_ATTENTION: (torch.bfloat16, torch.float16, torch.float32),
    SDPBackend.MATH: (torch.bfloat16, torch.float16, torch.float32),
}


def one_layer(
    device: torch.device = CUDA, dtype: torch.dtype = torch.float32, experts: int = 0
) -> ModelView:
    """A model of one layer that shows nothing yet."""
    return ModelView(
        layers=1,
        heads=HEADS,
        groups=GROUPS,
        experts=experts,
        device=device,
        activation_dtype=dtype,
        sequence_length=LENGTH,
        head_dim=CHANNELS,
    )


def residuals_of(kernel, dtype: torch.dtype) -> dict[str, list[float]]:
    """What the monitor reads of one call of a kernel, [S, B, heads, d] in and out."""
    view = one_layer(dtype=dtype)
    view.conserves_attention(1, 0, GROUPS)
    monitor = ConservationMonitor(view, GroupSum(None), whole=True)
    packed = Packed(monitor.schema(), CUDA)
    leaves = [
        (normal(LENGTH, BATCH, n, CHANNELS, seed=n + i) + shift).to(CUDA, dtype).requires_grad_()
        for i, (n, shift) in enumerate(((HEADS, 0.5), (GROUPS, 0.0), (GROUPS, 0.0)))
    ]
    grad = normal(LENGTH, BATCH, HEADS, CHANNELS, seed=9).to(CUDA, dtype)

    def sample(iteration: int) -> None:
        q, k, v = (x * 1 for x in leaves)  # part of a graph, as a host's are
        o = kernel(q, k, v)
        call = AttentionCall(
            query=q, key=k, value=v, output=o, heads=HEADS, groups=GROUPS, layout="sbhd"
        )
        monitor.on_attention(1, call)
        o.backward(grad)
        monitor.collect(iteration, packed.fields)

    sample(10)  # makes what every later sample uses
    packed.reduce()
    with no_sync():  # the hooks, forward and backward, and the sample
        sample(20)
    readings = monitor.read(packed.reduce())
    return {name: readings[name][1] for name in ATTENTION_RESIDUALS}


def limits(dtype: torch.dtype) -> dict[str, float]:
    return {n: limit(n.removeprefix("attention/"), dtype, LENGTH, CHANNELS) for n in
            ATTENTION_RESIDUALS}  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
def test_pytorchs_kernels_keep_the_identities(backend: SDPBackend) -> None:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    for dtype in KERNELS[backend]:
        found, allowed = residuals_of(kernel, dtype), limits(dtype)
        for name, values in found.items():
            print(backend, dtype, name, max(values) / allowed[name], "of its limit")
            assert max(values) < allowed[name], (dtype, name, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lying_kernel_breaks_the_key_shift_alone(dtype: torch.dtype) -> None:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_row_term(q, k, v, scale=CHANNELS**-0.5, strength=0.3)

    found, allowed = residuals_of(kernel, dtype), limits(dtype)
    key, *others = ATTENTION_RESIDUALS
    assert min(found[key]) > allowed[key]
    assert all(max(found[name]) < allowed[name] for name in others)


def test_weights_are_read_and_compared_without_waiting() -> None:
    old_q, old_k, new_q, new_k = (w.to(CUDA) for w in weights())
    live = [old_q.clone(), old_k.clone()]
    view = one_layer()
    view.attention.append(
        AttentionView(
            layer=1, first_group=0, groups=GROUPS, heads_per_group=HEADS // GROUPS,
            read=lambda: tuple(live), replica=Replica(),
        )
    )  # fmt: skip
    monitor = AttentionUpdateMonitor(view, [10], interval=10)
    packed = Packed(monitor.schema(), CUDA)
    monitor.collect(10, packed.fields)
    packed.reduce()
    live[0].copy_(new_q), live[1].copy_(new_k)
    monitor.collect(20, packed.fields)
    readings = monitor.read(packed.reduce())
    wanted = effective_rank(update_spectra(*weights()).delta2)
    name = next(n for n in readings if "delta2_effective_rank" in n)
    torch.testing.assert_close(torch.tensor(readings[name][1]).double(), wanted, rtol=1e-4, atol=0)
    with no_sync():  # all that later samples use has been made
        monitor.collect(30, packed.fields)


def test_the_routers_values_are_the_cpus_and_nothing_waits() -> None:
    found = []
    for where in (torch.device("cpu"), CUDA):
        weight = normal(8, 64).to(where)
        view = one_layer(where, experts=8)
        view.routers.append(RouterView(layer=1, read=lambda w=weight: w, replica=Replica()))
        monitor = RouterMonitor(view)
        packed = Packed(monitor.schema(), where)
        logits = normal(LENGTH, BATCH, 8).to(where)
        if where == CUDA:
            with no_sync():
                monitor.on_logits(1, logits)
        else:
            monitor.on_logits(1, logits)
        monitor.collect(10, packed.fields)
        found.append(monitor.read(packed.reduce()))
    cpu, cuda = found
    assert cpu.keys() == cuda.keys() and len(cpu) > 5
    for name, layers in cpu.items():
        assert cuda[name][1] == pytest.approx(layers[1], rel=1e-3, abs=1e-4, nan_ok=True), name


def test_terms_of_float16_stay_finite() -> None:
    """Products of large float16 gradients are added up in float32."""
    big = (200 * normal(LENGTH, BATCH, GROUPS, CHANNELS)).to(CUDA, torch.float16)
    signed, scale = c.value_output_terms(big, big, big, big)
    assert bool(signed.isfinite().all()) and bool(scale.isfinite().all())
