"""Train in bfloat16 and in fp32 from the same weights, and read the updates in several ways.

Imported in started processes only, after the CPU stand-in. See ``tests/megatron/test_precision``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from mcore_monitors.hosts.megatron.model import MegatronModel
from mcore_monitors.hosts.megatron.registration import register
from mcore_monitors.signals.spectra import effective_rank
from mcore_monitors.signals.update_spectra import update_spectra

from . import attentions, build

STEPS, LEARNING_RATE = 50, 3e-6
HIDDEN = 64

Weights = list[tuple[torch.Tensor, torch.Tensor]]


class Run:
    """A model with Megatron's own wrappers and optimizer.

    Args:
        bf16: mixed precision; else fp32.
        distributed: the distributed optimizer.
        overlap: its parameters are gathered in the next forward only.
    """

    def __init__(self, *, bf16: bool, distributed: bool, overlap: bool = False) -> None:
        dtype = torch.bfloat16 if bf16 else torch.float32
        settings = build.config(
            hidden_size=HIDDEN,
            ffn_hidden_size=HIDDEN,
            bf16=bf16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            persist_layer_norm=False,
        )
        model = build.gpt(register(get_gpt_layer_local_spec()), settings)
        with torch.no_grad():  # both kinds of run start from what bfloat16 can hold
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        if bf16:
            model = Float16Module(settings, model)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            grad_reduce_in_fp32=True,
            overlap_param_gather=overlap,
            overlap_grad_reduce=overlap,
        )
        self.model = DistributedDataParallel(settings, ddp, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                weight_decay=0.1,
                bf16=bf16,
                params_dtype=dtype,
                use_distributed_optimizer=distributed,
                overlap_param_gather=overlap,
                clip_grad=1.0,
            ),
            [self.model],
        )
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.best = MegatronModel([self.model], self.optimizer).view
        self.plain = MegatronModel([self.model]).view

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            # the same batch on every rank, so that runs of any number of ranks are one
            build.losses(self.model, seed=step).float().mean().backward()
            finalize_model_grads([self.model])
            done, _, _ = self.optimizer.step()
            assert done


def weights(view: Any) -> Weights:
    """W_q, W_k of all layers as they are now."""
    return [tuple(w.detach().clone() for w in v.read()) for v in view.attention]


def ranks(old: Weights, new: Weights) -> list[float]:
    """Effective rank of Δ2 of every head of all layers."""
    values = [effective_rank(update_spectra(*o, *n).delta2) for o, n in zip(old, new, strict=True)]
    return torch.cat(values).tolist()


def both_ways(**settings: bool) -> dict[str, Any]:
    """One training, read from the optimizer's main weights and from the model's own."""
    attentions.start(1)
    run = Run(**settings)
    best, plain = weights(run.best), weights(run.plain)
    run.train(STEPS)
    return {
        "best": ranks(best, weights(run.best)),
        "plain": ranks(plain, weights(run.plain)),
        "collective": [v.collective for v in run.best.attention],
        "left_out": [run.best.left_out, run.plain.left_out],
        "formats": sorted({str(w.dtype) for pair in weights(run.best) for w in pair}),
    }


def pieces() -> dict[str, Any]:
    """What each way of reading sees after one step of an optimizer that gathers late."""
    attentions.start(1)
    run = Run(bf16=False, distributed=True, overlap=True)
    run.train(1)
    best, plain = weights(run.best), weights(run.plain)
    whole = Run(bf16=False, distributed=False)
    whole.train(1)
    reference = weights(whole.best)

    def furthest(mine: Weights) -> float:
        pairs = zip(mine, reference, strict=True)
        return max((a - b).abs().max().item() for m, r in pairs for a, b in zip(m, r, strict=True))

    return {
        "best": furthest(best),
        "plain": furthest(plain),
    }
