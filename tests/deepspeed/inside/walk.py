"""One process that trains one engine after another; for test_router_signals.py and test_zero.py.

    python -m tests.deepspeed.inside.walk FOLDER

``FOLDER/layouts.json`` is a list of layouts: name, model, stage, ep_size, accumulate and, if it has
to be, dtype and steps. Each is trained with monitors and without. Rank 0 leaves the history in
``FOLDER/NAME``, every rank its losses in ``FOLDER/NAME.RANK.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from .models import DeepSpeedModel, HuggingFaceModel, batch, initialise

#: sequences of a step, whatever the layout
BATCH = 16
STEPS = 3


def monitors(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """The key of the DeepSpeed JSON."""
    return {
        "run_dir": str(folder / layout["name"]),
        "interval": 1,
        "strict": True,
        "console": False,
        "wandb": {"enabled": False},
        "monitors": {"attention_update": {"windows": [1, 2]}},
        "detection": {"windows": [1, 2]},
    }


def train(layout: dict[str, Any], settings: dict[str, Any] | None) -> list[str]:
    """Train and return the losses of this rank, exactly."""
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    ep_size, accumulate = layout["ep_size"], layout["accumulate"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // world // accumulate,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": layout["stage"], "stage3_param_persistence_threshold": 40},
        "steps_per_print": 1_000_000,
    }
    if layout.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    if settings is not None:
        config["mcore_monitors"] = settings
    torch.manual_seed(0)
    moe = layout["model"] == "deepspeed"
    if moe or layout["model"] == "dense":
        model = DeepSpeedModel(ep_size, moe)
    else:
        model = HuggingFaceModel()
    initialise(model, rank % ep_size, ep_size)
    parameters: Any = list(model.parameters())
    if moe:
        parameters = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    losses = []
    for step in range(layout.get("steps", STEPS)):
        pieces = batch(step, BATCH).chunk(world * accumulate)
        for micro in range(accumulate):
            loss = engine(pieces[rank * accumulate + micro])
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()).hex())
    return losses


def main() -> None:
    """Walk through the layouts."""
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = deepspeed.comm.get_rank()
    for layout in json.loads((folder / "layouts.json").read_text()):
        losses = {
            "with": train(layout, monitors(folder, layout)),
            "without": train(layout, None),
        }
        (folder / f"{layout['name']}.{rank}.json").write_text(json.dumps(losses))
        print("DONE", layout["name"], flush=True)


if __name__ == "__main__":
    main()
