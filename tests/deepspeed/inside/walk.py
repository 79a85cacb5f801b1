"""One process that trains one engine after another; for test_router_signals.py and test_zero.py.

    python -m tests.deepspeed.inside.walk FOLDER

``FOLDER/layouts.json`` is a list of layouts: name, model, stage, ep_size, accumulate and, if it has
to be, dtype, steps, and more of DeepSpeed's settings. Each is trained with monitors and without.
Rank 0 leaves the history in ``FOLDER/NAME``, every rank in ``FOLDER/NAME.RANK.json`` its losses,
what the views of the attention layers read at the end beside the model's own weights, the sums of
the optimizer monitor and, where the layout is followed, what they are to be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from mcore_monitors.hosts.deepspeed.describe import describe
from mcore_monitors.monitors.base import StepState
from mcore_monitors.views import Replica

from .adam import Followed, sums_of
from .models import DeepSpeedModel, batch, huggingface_model, initialise, loss_of

#: sequences of a step, whatever the layout
BATCH = 16
STEPS = 3
#: a large eps: steps of nearly equal gradients are nearly equal, whichever order they were added in
ADAMW = {"lr": 0.01, "eps": 1e-3}


def monitors(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """The key of the DeepSpeed JSON."""
    return {
        "run_dir": str(folder / layout["name"]),
        "interval": 1,
        "strict": True,
        "console": False,
        "wandb": {"enabled": False},
        "monitors": {
            "attention_update": {"windows": [1, 2], "every": 1},
            "router": {"every": 1},
            "optimizer": {"every": 1},
        },
        "detection": {"windows": [1, 2]},
    }


def train(
    layout: dict[str, Any], settings: dict[str, Any] | None
) -> tuple[list[str], Any, dict[str, Any]]:
    """Train; returns the losses of this rank, exactly, the engine, and what its steps did."""
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    ep_size, accumulate = layout["ep_size"], layout["accumulate"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // world // accumulate,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": layout["stage"], "stage3_param_persistence_threshold": 40},
        "steps_per_print": 1_000_000,
    }
    if layout["model"] == "autoep":
        _let_autoep_ask_transformers()
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": ep_size,
            "preset_model": "qwen3_moe",
            "use_grouped_mm": False,
        }
    if layout.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    for name, value in layout.get("config", {}).items():
        old = config.get(name)
        config[name] = old | value if isinstance(old, dict) else value
    if settings is not None:
        config["mcore_monitors"] = settings
    torch.manual_seed(0)
    moe = layout["model"] == "deepspeed"
    if moe or layout["model"] == "dense":
        model = DeepSpeedModel(ep_size, moe)
    else:
        model = huggingface_model(head_dim=layout.get("head_dim", 4))
    initialise(model, rank % ep_size, ep_size)
    parameters: Any = list(model.parameters())
    if moe:
        parameters = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    steps: dict[str, Any] = {} if settings is None else {"sums": sums_of(engine)}
    followed = None
    if settings is not None and "followed" in layout:
        followed = Followed(engine, split=ep_size > 1, **layout["followed"])
        steps["expected"] = followed.steps
    losses = []
    for step in range(layout.get("steps", STEPS)):
        pieces = batch(step, BATCH).chunk(world * accumulate)
        for micro in range(accumulate):
            loss = loss_of(engine, pieces[rank * accumulate + micro])
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()).hex())
        if followed is not None:
            followed.after_step()
    return losses, engine, steps


def weights(engine: Any) -> dict[str, Any]:
    """What the view of the first layer's key projection reads, and the model's own weight."""
    described = describe(
        engine.module,
        device=engine.device,
        zero_stage=engine.zero_optimization_stage(),
        replica=Replica(),
        data=Replica(),
        state=StepState(),
    )
    view = min(described.view.attention, key=lambda v: v.layer)
    read = view.read()[1]
    module = described.attentions[view.layer]
    parameters = [module.k_proj.weight, *getattr(module, "k_norm", nn.Module()).parameters()]
    with deepspeed.zero.GatheredParameters(parameters):
        weight, *scale = (p.detach().clone() for p in parameters)
    whole = weight.float().unflatten(0, (-1, module.head_dim))
    if scale:
        whole = whole * scale[0].float()[:, None]
    return {
        "collective": view.collective,
        "format": str(read.dtype),
        "shape": list(read.shape),
        "off": float((read - whole).abs().max() / whole.abs().max()),
    }


def _let_autoep_ask_transformers() -> None:
    """DeepSpeed 0.19 asks a registry of transformers 5.23 with a default that it does not take."""
    from transformers.utils.output_capturing import _CanRecordRegistry

    def get(self: Any, key: Any, default: Any = None) -> Any:
        return dict.get(self, key if isinstance(key, str) else str(key.__class__), default) or {}

    _CanRecordRegistry.get = get


def main() -> None:
    """Walk through the layouts."""
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = deepspeed.comm.get_rank()
    for layout in json.loads((folder / "layouts.json").read_text()):
        watched, engine, steps = train(layout, monitors(folder, layout))
        result = {"with": watched, "weights": weights(engine), "without": train(layout, None)[0]}
        result |= steps
        (folder / f"{layout['name']}.{rank}.json").write_text(json.dumps(result))
        print("DONE", layout["name"], flush=True)


if __name__ == "__main__":
    main()
