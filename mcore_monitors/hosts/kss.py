"""Koopman spectral shaping in a training: hooks at the layers, the same on every host.

Every ``interval`` iterations a random share of the layers gets the term of :mod:`..signals.kss`.
Its gradient joins that of the layer's output, as Megatron's auxiliary losses do: it needs no place
in the loss function, so it works on every pipeline stage, and the host's loss scale and number of
micro-batches are asked for in the backward pass, when they are known.

What it differentiates by hand is small: the sums over tokens (2r² + 2r numbers). The slope of the
term by them is found in the forward pass, where an error can still be caught, and a slope that is
not finite is replaced by zero and counted. Where ranks share a sequence the sums are added up over
them; each rank then has the whole slope, and its own tokens take their own part of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError

from .. import parallel
from ..config import KssConfig
from ..errors import ConfigError
from ..messages import say
from ..monitors.base import StepState
from ..parallel import GroupSum
from ..signals.kss import directions, moments_of, operator_from, shaping_loss
from ..views import ModelView

#: Shaped iterations in a row without a layer that ran, after which the hooks are taken for dead.
_PATIENCE = 3


class _Pull(torch.autograd.Function):
    """The states as they are; in the backward pass the slope times a factor goes to the moments.

    The result is no view: Megatron frees the memory behind a pipeline stage's output, which it
    can't do with a view.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, moments: Tensor, slope: Tensor, factor: Callable[[], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.factor = factor
        same = torch.empty((1,), dtype=states.dtype, device=states.device)
        same.data = states.data
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient, slope * ctx.factor(), None, None


def refuse_hidden(view: ModelView) -> None:
    """See that hooks at the layers reach the residual stream, on some rank.

    Raises:
        ConfigError: they don't; the term would silently be left out.
    """
    reachable = view.residual is not None and bool(view.residual.layers)
    if not parallel.any_rank(reachable, view.device):
        why = [text for text in view.left_out if text.startswith("residual stream")]
        raise ConfigError("kss", "its settings", "null for this model", " ".join(why) + ".")


class Shaping:
    """Adds the term to a model's layers and says when it fails.

    Args:
        settings: ``kss`` of the configuration.
        layers: numbers of the whole model's layers, the same on every rank.
        state: the step in progress, which the runtime writes.
        device: where the model's parameters live.
        scale: asked in the backward pass with the number of tokens of the term: what the host
            multiplies the gradient of one micro-batch's mean loss with.
        total: adds up over the ranks that hold the rest of each sequence.
    """

    def __init__(
        self,
        settings: KssConfig,
        layers: Iterable[int],
        state: StepState,
        device: torch.device,
        *,
        scale: Callable[[Tensor], Tensor | float],
        total: GroupSum | None = None,
    ) -> None:
        self.settings, self._state, self._scale = settings, state, scale
        self.layers = sorted(layers)
        self._total = GroupSum(None) if total is None else total
        self._per_step = max(1, round(settings.share * len(self.layers)))
        self._error: str | None = None
        self._empty = 0
        self.off = False
        self._sums = parallel.Packed({"errors": (), "zeroed": (), "terms": (), "value": ()}, device)

    def chosen(self, iteration: int) -> set[int]:
        """The layers that are shaped in an iteration; the same on every rank."""
        if self.off or iteration % self.settings.interval:
            return set()
        drawn = random.Random(f"{self.settings.seed}/{iteration}")
        return set(drawn.sample(self.layers, self._per_step))

    def attach(self, layer: int, module: nn.Module, width: int) -> None:
        """Shape a layer whose first argument and (first) result are the residual stream.

        Raises:
            ConfigError: more modes than the stream has channels.
        """
        if self.settings.rank > width:
            raise ConfigError("kss.rank", self.settings.rank, f"2 to the hidden size {width}")
        module.register_forward_hook(partial(self._after, layer), with_kwargs=True)

    def _after(
        self, layer: int, module: nn.Module, args: tuple, keywords: dict, output: Any
    ) -> Any:
        """Forward hook; idle without gradients (evaluation, first pass of a recomputed layer)."""
        if not module.training or not torch.is_grad_enabled():
            return None
        if layer not in self.chosen(self._state.iteration):
            return None
        before = args[0] if args else keywords["hidden_states"]
        if isinstance(output, tuple):
            return (self._shaped(layer, before, output[0]), *output[1:])
        return self._shaped(layer, before, output)

    def _shaped(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        rank = self.settings.rank
        try:
            moments = moments_of(before, after, self._along(layer, before))
            whole = moments.detach().clone()
        except Exception as error:  # shaping never breaks a run
            self._fail(error)
            size = 1 + 2 * rank + 2 * rank * rank
            moments = None
            whole = torch.full((size,), torch.nan, dtype=torch.float64, device=after.device)
        # also after an error: ranks that share the sequence wait here
        self._total(whole)
        if moments is None:
            return after
        try:
            slope = self._slope(whole)
            return _Pull.apply(after, moments, slope, partial(self._factor, whole[0]))
        except Exception as error:  # shaping never breaks a run
            self._fail(error)
            return after

    def _factor(self, tokens: Tensor) -> Tensor:
        """What the slope is multiplied with, asked in the backward pass."""
        try:
            scale = torch.as_tensor(self._scale(tokens), dtype=torch.float64, device=tokens.device)
            return scale.reshape(())
        except Exception as error:  # shaping never breaks a run
            self._fail(error)
            return torch.zeros_like(tokens)

    def _along(self, layer: int, states: Tensor) -> Tensor:
        """The directions: the same on every rank, in every micro-batch and when recomputed."""
        seed = random.Random(f"{self.settings.seed}/{self._state.iteration}/{layer}")
        generator = torch.Generator().manual_seed(seed.getrandbits(63))
        return directions(states.shape[-1], self.settings.rank, generator).to(states.device)

    def _slope(self, moments: Tensor) -> Tensor:
        """Gradient of this layer's part of the loss by the moments, zero where it is not finite."""
        s = self.settings
        known = moments.isfinite().all()
        # an eigensolver may not return on NaN: it is given the moments of white noise instead
        eye = torch.eye(2 * s.rank, s.rank, dtype=moments.dtype, device=moments.device).flatten()
        white = torch.cat([moments.new_ones(1), moments.new_zeros(2 * s.rank), eye])
        moments = torch.where(known, moments, white).requires_grad_()
        with torch.enable_grad():
            operator = operator_from(moments, s.rank)
            term = shaping_loss(
                operator, beta=s.beta, gamma=s.gamma, temperature=s.temperature
            )
        (slope,) = torch.autograd.grad(term, moments)
        good = known & slope.isfinite().all()
        sums = self._sums.fields
        sums["zeroed"] += (~good).double()
        sums["terms"] += 1
        sums["value"] += torch.where(good, term.detach(), 0.0)
        return torch.where(good, slope, 0.0) * (s.alpha / self._per_step)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, _StopRecomputationError):
            raise error  # how PyTorch ends the recomputation of a layer, whoever happens to run
        self._error = f"{type(error).__name__}: {error}"
        self._sums.fields["errors"] += 1

    def on_step(self, iteration: int) -> list[dict[str, Any]]:
        """A step is done, on every rank: after a shaped one, agree on how it went.

        Returns:
            Events, the same on every rank: ``monitor_disabled`` where shaping failed on a rank and
            is off from now on, ``message`` where gradients were not finite and left out.
        """
        if self.off or iteration % self.settings.interval:
            return []
        sums = {name: float(value) for name, value in self._sums.reduce().items()}
        self._empty = 0 if sums["terms"] else self._empty + 1
        if sums["errors"]:
            return [self._turn_off(iteration, self._error or "see the other ranks' output")]
        if self._empty == _PATIENCE:
            return [self._turn_off(iteration, "no layer called its hooks")]
        if not sums["zeroed"]:
            return []
        text = (
            f"Koopman spectral shaping: {sums['zeroed']:.0f} of {sums['terms']:.0f} gradients at "
            f"iteration {iteration} were not finite and were left out"
        )
        if parallel.rank() == 0:
            say(f"{text}.")
        return [{"kind": "message", "text": text}]

    def _turn_off(self, iteration: int, error: str) -> dict[str, Any]:
        self.off = True
        if self._error is not None or parallel.rank() == 0:
            say(
                f"Koopman spectral shaping failed at iteration {iteration} and is off on all ranks "
                f"from now on; training goes on without it. {error}"
            )
        return {"kind": "monitor_disabled", "monitor": "kss", "error": error}
