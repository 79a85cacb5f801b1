"""One process that goes through rollbacks, one engine after another; for test_rollback.py.

    python -m tests.deepspeed.inside.rollbacks FOLDER [SCENARIO ...]

Every scenario has a folder of its own below ``FOLDER``. What this rank saw goes to
``FOLDER/RANK.json``: scenario → what :class:`Seen` collected.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils.data import Dataset

import mcore_monitors

from .models import DeepSpeedModel, batch, huggingface_model, initialise, loss_of

BATCH = 4
#: the drill begins here; with this interval its alarm comes two steps later
FAULT, INTERVAL, END = 16, 2, 26
REMEDY = {"attention": "safe", "learning_rate_factor": 0.5, "pass_over": -1}


class Seen:
    """What the training script saw, step by step; begins anew with each engine."""

    def __init__(self) -> None:
        self.codes: list[int | None] = []
        #: step → the last loss and gradient norm of it, exactly; and where its data began
        self.losses: list[tuple[int, str]] = []
        self.norms: list[tuple[int, str]] = []
        self.positions: list[tuple[int, int]] = []
        self.rates: list[tuple[int, float]] = []
        self.rolled_back: list[int] = []
        self.weights = 0.0


def settings(folder: Path, **recovery: Any) -> dict[str, Any]:
    """The monitors' settings: a drill, and a rollback that orders everything at once."""
    return {
        "run_dir": str(folder / "run"),
        "interval": INTERVAL,
        "console": False,
        "wandb": {"enabled": False},
        "monitors": {"attention_update": {"windows": [2]}, "optimizer": {"every": 2}},
        "detection": {"windows": [2]},
        "drill": {"strength": 0.01, "from_iteration": FAULT},
        "recovery": {
            "mode": "rollback",
            "quiet": 8,
            "remedies": {"attention_numerics": REMEDY},
            **recovery,
        },
    }


def make_engine(
    kind: str, stage: int, key: dict[str, Any] | None, accumulate: int = 1, **more: Any
) -> Any:
    """An engine on a tiny mixture of experts; ``moe`` with expert parallelism 2, else ``hf``."""
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // world // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 40, "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40},
        "steps_per_print": 1_000_000,
    }
    if key is not None:
        config["mcore_monitors"] = key
    torch.manual_seed(0)
    model = DeepSpeedModel(2) if kind == "moe" else huggingface_model()
    initialise(model, rank % 2, 2 if kind == "moe" else 1)
    parameters: Any = list(model.parameters())
    if kind == "moe":
        parameters = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config, **more
    )
    return engine


def train(engine: Any, seen: Seen, checkpoints: Path, *, save: bool = True) -> None:
    """Train to the end or to the exit that the monitors ask for; data by ``global_samples``."""
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    accumulate = engine.gradient_accumulation_steps()
    try:
        while engine.global_steps < END:
            position = engine.global_samples
            pieces = batch(position // BATCH, BATCH).chunk(world * accumulate)
            step, losses = engine.global_steps + 1, []
            for micro in range(accumulate):
                loss = loss_of(engine, pieces[rank * accumulate + micro])
                losses.append(loss.detach())
                engine.backward(loss)
                if micro == accumulate - 1:
                    seen.positions.append((step, position))
                    seen.losses.append((step, float(torch.stack(losses).mean()).hex()))
                    seen.rates.append((step, engine.get_lr()[0]))
                engine.step()
            norm = engine.get_global_grad_norm()
            if norm is not None:
                seen.norms.append((step, float(norm).hex()))
            if step % 4 == 0 and engine.global_steps == step and save:
                engine.save_checkpoint(str(checkpoints))
    except SystemExit as end:
        seen.codes.append(end.code)
    else:
        seen.codes.append(None)
    seen.weights = sum(float(w.double().abs().sum()) for w in weights_of(engine))


def weights_of(engine: Any) -> list[torch.Tensor]:
    """This rank's weights, under ZeRO 3 its shards."""
    return [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]


def in_place(folder: Path, kind: str, stage: int, seen: Seen) -> None:
    """Monitors by ``attach``, without the patch; the processes go on."""
    engine = make_engine(kind, stage, None)
    mcore_monitors.attach(
        engine, settings(folder, how="in_place"), on_rollback=seen.rolled_back.append
    )
    train(engine, seen, folder / "ckpt")


def relaunch(folder: Path, kind: str, stage: int, seen: Seen) -> None:
    """Monitors by the patch; a second engine stands for the next start."""
    key = settings(folder, how="relaunch")
    train(make_engine(kind, stage, key), seen, folder / "ckpt")
    if stage == 0:
        # the script loads what was saved last, and gets what the plan names
        engine = make_engine(kind, stage, key)
        path, _ = engine.load_checkpoint(str(folder / "ckpt"))
        seen.rolled_back.append(int(Path(path).parent.name.removeprefix("global_step")))
    else:
        engine = make_engine(kind, stage, key)  # and here it never loads anything
    seen.losses.clear(), seen.positions.clear(), seen.rates.clear(), seen.norms.clear()
    train(engine, seen, folder / "ckpt")


def crash(folder: Path, seen: Seen) -> None:
    """The data can't be put back: the processes end, the plan stays, the next start obeys it."""

    def fail(position: int) -> None:
        raise KeyError("no such batch")

    engine = make_engine("moe", 1, settings(folder))
    mcore_monitors.attach(engine, on_rollback=fail)
    train(engine, seen, folder / "ckpt")
    shutil.copy(folder / "run" / "recovery.json", folder / f"{deepspeed.comm.get_rank()}.json")
    deepspeed.comm.barrier()
    train(make_engine("moe", 1, settings(folder)), seen, folder / "ckpt", save=False)


def plain(folder: Path, seen: Seen) -> None:
    """The same training without monitors, and so without the drill."""
    train(make_engine("moe", 2, None), seen, folder / "ckpt", save=False)


class Numbered(Dataset):
    """Tokens of sequence n, and n."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, n: int) -> tuple[torch.Tensor, int]:
        return batch(n, 1)[0], n


def own_loader(folder: Path, seen: Seen) -> None:
    """DeepSpeed's own loader, a script without a word about monitors."""
    engine = make_engine("moe", 0, settings(folder), training_data=Numbered())
    for tokens, numbers in engine.training_dataloader:
        step = engine.global_steps + 1
        if step > END:
            break
        seen.positions.append((step, numbers.tolist()))
        loss = loss_of(engine, tokens)
        engine.backward(loss)
        engine.step()
        if step % 4 == 0 and engine.global_steps == step:
            engine.save_checkpoint(str(folder / "ckpt"))


def accumulation(folder: Path, seen: Seen) -> None:
    """Four micro-batches a step, ZeRO 1, no drill; evaluation in between."""
    key = settings(folder) | {"recovery": {"mode": "log"}, "drill": None}
    global BATCH, END
    before, BATCH, END = (BATCH, END), 8, 4
    try:
        engine = make_engine("hf", 1, key, accumulate=4)
        given = engine.step

        def step_and_evaluate() -> None:
            engine.eval()
            with torch.no_grad():
                loss_of(engine, batch(7, 1))
            engine.train()
            given()

        engine.step = step_and_evaluate
        train(engine, seen, folder / "ckpt", save=False)
        engine.save_checkpoint(str(folder / "ckpt"), tag="by hand")
    finally:
        BATCH, END = before


def refused(folder: Path) -> dict[str, Any]:
    """Exit codes of starts that can't be used."""
    codes = {}

    def code(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            codes[name] = None
        except SystemExit as end:
            codes[name] = end.code

    engine = make_engine("moe", 0, None)
    run = {"run_dir": str(folder / "run"), "wandb": {"enabled": False}, "console": False}
    code("unknown", lambda: mcore_monitors.attach(engine, run | {"detection": {"treshold": 5}}))
    code("nothing", lambda: mcore_monitors.attach(engine))
    code("no file", lambda: mcore_monitors.attach(engine, folder / "missing.yaml"))
    layer = {"drill": {"strength": 0.01, "from_iteration": 5, "layers": [9]}}
    code("layer", lambda: mcore_monitors.attach(engine, run | layer))
    engine = make_engine("moe", 0, None)
    first = mcore_monitors.attach(engine, run)
    codes["again"] = mcore_monitors.attach(engine) is first
    code("twice", lambda: mcore_monitors.attach(engine, run))
    engine = make_engine("moe", 0, settings(folder / "b", how="in_place"))
    seen = Seen()
    train(engine, seen, folder / "ckpt", save=False)
    codes["no way"] = [seen.codes[0], engine.global_steps]
    return codes


def main() -> None:
    """Go through all of it."""
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = deepspeed.comm.get_rank()
    # Before any engine of stage 3: that exchanges torch's linear function for good, and what is
    # trained afterwards in the process differs in the last bit.
    scenarios: dict[str, Callable[[Path, Seen], Any]] = {"plain": plain}
    for kind, stage in (("moe", 0), ("moe", 2), ("hf", 3)):
        for way in (in_place, relaunch):
            scenarios[f"{way.__name__} {kind} {stage}"] = (
                lambda f, s, w=way, k=kind, z=stage: w(f, k, z, s)
            )
    scenarios |= {"crash": crash, "own loader": own_loader}
    scenarios["accumulation"] = accumulation
    out: dict[str, Any] = {}
    asked = sys.argv[2:] or [*scenarios, "refused"]
    for name in asked:
        scenario = scenarios.get(name)
        if scenario is None:
            out[name] = refused(folder / name)
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        seen = Seen()
        scenario(folder / name, seen)
        out[name] = vars(seen)
        print("DONE", name, flush=True)
        deepspeed.comm.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
