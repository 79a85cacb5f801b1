"""The layouts that the walks go through."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import get_default_build_root


def layout(model: str, stage: int, ep_size: int, accumulate: int, **more: Any) -> dict[str, Any]:
    """One engine; its name tells all of it."""
    name = f"{model}-zero{stage}-ep{ep_size}-micro{accumulate}"
    name += "".join(f"-{value}" for value in more.values())
    return dict(
        name=name, model=model, stage=stage, ep_size=ep_size, accumulate=accumulate, **more
    )


def followed(
    name: str, model: str, stage: int, *, ep_size: int = 1, accumulate: int = 1, before: int = 0,
    kind: str = "AdamW", adam: dict[str, Any] | None = None, zero: dict[str, Any] | None = None,
    **config: Any,
) -> dict[str, Any]:  # fmt: skip
    """One engine whose steps are worked out a second time, with all that changes a step.

    Args:
        before: steps with gradients of zero that DeepSpeed takes at the start.
        kind, adam: of the optimizer, and what is set for it.
        zero, config: more of DeepSpeed's settings, the first for ZeRO.
    """
    params = {"lr": 0.01, "eps": 1e-15, "weight_decay": 0.1, "torch_adam": True} | (adam or {})
    config |= {
        "gradient_clipping": 0.05,
        "optimizer": {"type": kind, "params": params},
        "scheduler": {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.002, "warmup_max_lr": 0.01, "warmup_num_steps": 9,
                "warmup_type": "linear",
            },
        },
        "zero_optimization": zero or {},
    }  # fmt: skip
    more = {
        "config": config,
        "followed": {"before": before, "searched": params.get("adam_w_mode", True)},
        "steps": 6 if "fp16" in config else 4,
    }
    return layout(model, stage, ep_size, accumulate) | {"name": name} | more


def compiled(operator: str) -> bool:
    """Whether an operator of DeepSpeed's is there already; to make one takes more than a minute."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return any(Path(folder).glob(f"**/{operator}.so"))


#: DeepSpeed's own Adam
OWN = {"torch_adam": False}
#: of the stages above 0 the first steps overflow
FP16 = {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}

#: in one process: the reference
ALONE = [layout(model, 0, 1, 1) for model in ("deepspeed", "huggingface")]
#: in two processes
TWO = [
    # DeepSpeed refuses its own MoE under stage 3 and offers expert parallelism of the model's
    *(layout("deepspeed", z, ep, n) for z, ep, n in product((0, 1, 2), (1, 2), (1, 4))),
    *(layout("huggingface", z, 1, n) for z, n in product((0, 1, 2, 3), (1, 4))),
    *(layout("autoep", z, 2, n) for z, n in ((0, 4), (2, 1), (3, 1))),
    *(layout("huggingface", z, 1, 1, dtype="bf16") for z in (1, 2, 3)),
]
#: in two processes as well; the optimizer's state is followed step by step
FOLLOWED = [
    followed("fp32, whole", "huggingface", 0),
    followed("fp32, pieces in turn", "huggingface", 2, zero={"round_robin_gradients": True}),
    followed("fp32, sub-groups", "huggingface", 3, accumulate=4, zero={"sub_group_size": 500}),
    followed("fp32, offloaded", "huggingface", 2, zero={"offload_optimizer": {"device": "cpu"}}),
    followed("bf16, copies", "deepspeed", 0, ep_size=2, before=1, bf16={"enabled": True}),
    followed(
        "bf16, pieces", "deepspeed", 1, ep_size=2, bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
    ),
    followed("bf16, shards", "huggingface", 3, bf16={"enabled": True}),
    followed(
        "fp32, decay in the gradient", "huggingface", 1, kind="Adam", adam={"adam_w_mode": False}
    ),
    followed("fp16, copies", "huggingface", 0, before=1, fp16=FP16),
    followed("fp16, pieces", "huggingface", 1, fp16=FP16),
    followed("fp16, shards", "huggingface", 3, fp16=FP16),
]  # fmt: skip
#: the same with operators that DeepSpeed has to compile first, by operator
COMPILED = {
    "fused_adam": [
        followed("FusedAdam, fp32, whole", "huggingface", 0, adam=OWN),
        followed("FusedAdam, fp16", "huggingface", 0, before=1, adam=OWN, fp16=FP16),
    ],
    "cpu_adam": [
        followed(
            "DeepSpeedCPUAdam, offloaded", "huggingface", 2, adam=OWN,
            zero={"offload_optimizer": {"device": "cpu"}},
        ),
    ],
}  # fmt: skip
#: in four processes: their shards of 10 weights are 3, 3, 3 and 1 with two more to fill it up
PADDED = followed("fp32, padded shards", "huggingface", 3) | {"head_dim": 10, "steps": 2}
#: optimizers whose state is left out, with the reason
LEFT_OUT = {
    "SGD is not an Adam that is known": layout("dense", 0, 1, 1)
    | {"name": "SGD", "config": {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}}},
    "with amsgrad, maximize or without bias correction Adam's rule is another one": layout(
        "dense", 1, 1, 1
    )
    | {
        "name": "amsgrad",
        "config": {
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}}
        },
    },
}
#: in four processes
FOUR = [
    layout("deepspeed", 0, 2, 4),
    layout("deepspeed", 2, 2, 1),
    layout("huggingface", 1, 1, 4),
    layout("huggingface", 3, 1, 1),
]
