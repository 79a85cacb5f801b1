"""What a plan or a drill changes in a DeepSpeed run: attention kernels and the learning rate."""

from __future__ import annotations

from typing import Any

from ...config import DrillConfig
from ...errors import ConfigError, HostError
from ...runtime import Runtime
from ..huggingface.kernels import faulty_kernel, safe_kernel, why_not_faulty, why_not_safe
from ..orders import put_fault
from .describe import ModuleDescription


def use_safe_attention(model: ModuleDescription) -> None:
    """Let every attention run the trusted kernel from here on.

    Raises:
        HostError: it can't replace that of a layer; nothing was changed.
    """
    reasons = [why_not_safe(module) for module in model.attentions.values()]
    if not model.attentions:
        reasons = ["a model in which no attention was found"]
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise HostError(
            f"the recovery plan orders the safe attention path, which does not support {reason}. "
            "Set recovery.remedies for this cause to another remedy, or repair the kernel."
        )
    for module in model.attentions.values():
        module.mcore_monitors_tap.safe = safe_kernel


def start_drill(drill: DrillConfig, model: ModuleDescription, runtime: Runtime) -> None:
    """Switch the faulty kernel on in the layers of a drill.

    Raises:
        ConfigError: a layer does not exist, has no attention that is watched, or one that the
            kernel can't replace.
    """
    layers = drill.layers or sorted(model.attentions)
    if not layers:
        raise ConfigError("drill", drill.fault, "a model in which attention was found")
    for layer in layers:
        if layer not in model.attentions:
            known = ", ".join(map(str, sorted(model.attentions))) or "none"
            raise ConfigError("drill.layers", layer, f"layers with attention: {known}")
        reason = why_not_faulty(model.attentions[layer])
        if reason is not None:
            raise ConfigError("drill.layers", layer, f"layers without {reason}")
    taps = [model.attentions[layer].mcore_monitors_tap for layer in layers]
    put_fault(drill, layers, taps, faulty_kernel(drill.strength), runtime)


class LearningRate:
    """A factor on the learning rates with which an engine's optimizer steps.

    The rates are multiplied for the time of a step only: what schedules compute with, and what
    checkpoints hold, stays as it is, so that no schedule compounds the factor and a restart applies
    it once. ``engine.get_lr`` gives the rates with it.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._factor, self._wrapped = 1.0, False

    @property
    def factor(self) -> float:
        """The factor in force."""
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        if factor != 1.0 and not self._wrapped:
            self._wrap()
            self._wrapped = True
        self._factor = factor

    def _wrap(self) -> None:
        engine, optimizer = self._engine, self._engine.optimizer
        get_lr, step = engine.get_lr, optimizer.step

        def scaled_step(*args: Any, **kwargs: Any) -> Any:
            rates = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = self._factor * rate
            try:
                return step(*args, **kwargs)
            finally:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate

        optimizer.step = scaled_step
        engine.get_lr = lambda: [self._factor * rate for rate in get_lr()]
