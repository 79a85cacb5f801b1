"""One process that trains shaped engines and the same models by hand; for test_kss.py.

    python -m tests.deepspeed.inside.kss FOLDER

Leaves ``FOLDER/losses.json``: name of a training to the loss of every micro-batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from mcore_monitors.config import KssConfig
from mcore_monitors.hosts.kss import Shaping
from mcore_monitors.monitors.base import StepState

from .models import LAYERS, WIDTH, DeepSpeedModel, batch, huggingface_model, initialise, loss_of

KSS = {"alpha": 3.0, "beta": 5.0, "interval": 2, "rank": 8}
ADAMW = {"lr": 0.01, "eps": 1e-3}
STEPS, MICRO_BATCHES, BATCH = 6, 2, 8


def model_of(kind: str) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    model = huggingface_model() if kind == "huggingface" else DeepSpeedModel(1, moe=False)
    initialise(model, 0, 1)
    return model.train()


def pieces(step: int) -> tuple[torch.Tensor, ...]:
    return batch(step, BATCH).chunk(MICRO_BATCHES)


def by_hand(kind: str, kss: dict[str, Any] | None) -> list[float]:
    """PyTorch alone, but for the hooks."""
    model = model_of(kind)
    state = StepState()
    if kss is not None:
        blocks = model.model.layers if kind == "huggingface" else model.layers
        shaping = Shaping(
            KssConfig(**kss), range(1, LAYERS + 1), state, torch.device("cpu"),
            scale=lambda _: 1 / MICRO_BATCHES,
        )  # fmt: skip
        for number, block in enumerate(blocks, start=1):
            shaping.attach(number, block, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses = []
    for step in range(STEPS):
        state.iteration = step + 1
        for piece in pieces(step):
            loss = loss_of(model, piece)
            (loss / MICRO_BATCHES).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def by_engine(kind: str, stage: int, folder: Path, script_divides: bool = False) -> list[float]:
    """A DeepSpeed engine with the key in its settings."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {
            "type": "AdamW", "params": ADAMW | {"weight_decay": 0.01, "torch_adam": True}
        },
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000,
        "mcore_monitors": {
            "run_dir": str(folder / f"{kind}{stage}{script_divides}"),
            "strict": True,
            "console": False,
            "wandb": {"enabled": False},
            "kss": KSS,
        },
    }  # fmt: skip
    model = model_of(kind)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    losses = []
    for step in range(STEPS):
        for piece in pieces(step):
            loss = loss_of(engine, piece)
            if script_divides:
                engine.backward(loss / MICRO_BATCHES, scale_wrt_gas=False)
            else:
                engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    found = {
        "huggingface by hand": by_hand("huggingface", KSS),
        "huggingface unshaped": by_hand("huggingface", None),
        "huggingface ZeRO 0": by_engine("huggingface", 0, folder),
        "huggingface ZeRO 3": by_engine("huggingface", 3, folder),
        "dense by hand": by_hand("dense", KSS),
        "dense ZeRO 2, divided by the script": by_engine("dense", 2, folder, True),
    }
    (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
