"""Watched things: a pre-norm block, a norm with a wrong backward, all residuals of a layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from mcore_monitors.catalogue.conservation import NORMS
from mcore_monitors.hosts.observed_norm import observe_norm
from mcore_monitors.hosts.taps import Tap
from mcore_monitors.monitors.base import StepState
from mcore_monitors.monitors.conservation import ConservationMonitor
from mcore_monitors.parallel import GroupSum
from mcore_monitors.views import Conserved, ModelView

from .models import TinyModel

ROUTER, OUTPUT, SCALE, SHIFT = (
    "router/shift",
    "output/vocabulary_shift",
    "norm/scale",
    "norm/shift",
)


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
