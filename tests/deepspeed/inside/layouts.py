"""The layouts that the walks go through."""

from __future__ import annotations

from itertools import product
from typing import Any


def layout(model: str, stage: int, ep_size: int, accumulate: int, **more: Any) -> dict[str, Any]:
    """One engine; its name tells all of it."""
    name = f"{model}-zero{stage}-ep{ep_size}-micro{accumulate}"
    name += "".join(f"-{value}" for value in more.values())
    return dict(
        name=name, model=model, stage=stage, ep_size=ep_size, accumulate=accumulate, **more
    )


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
#: in four processes
FOUR = [
    layout("deepspeed", 0, 2, 4),
    layout("deepspeed", 2, 2, 1),
    layout("huggingface", 1, 1, 4),
    layout("huggingface", 3, 1, 1),
]
