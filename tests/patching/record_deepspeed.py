"""Train a small mixture of experts with a patched DeepSpeed and write down what the patch calls.

    python -m tests.patching.record_deepspeed RECORD.json CHECKPOINTS [KEY]

One process. KEY is what stands under "mcore_monitors" in the configuration; without it the key is
absent. Our own call sites are exchanged for ones that only take notes.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate

NAME = "mcore_monitors.hosts.deepspeed.callsites"


def note_taker(calls: list[list[Any]]) -> ModuleType:
    """Return a module with the call sites' functions, each of which adds to ``calls``."""
    module = ModuleType(NAME)

    def tap(logits):
        calls.append(["tap", list(logits.shape)])

    def on_engine(engine):
        calls.append(["on_engine", engine._config.mcore_monitors])
        for gate in (one for one in engine.modules() if isinstance(one, TopKGate)):
            gate.mcore_monitors_tap = tap

    def on_step(engine):
        calls.append(["on_step", engine.global_steps, engine.micro_steps])

    def on_checkpoint(engine, save_dir, tag):
        calls.append(["on_checkpoint", engine.global_steps, save_dir, tag])

    def on_load(engine, load_path):
        calls.append(["on_load", engine.global_steps, load_path])

    for function in (on_engine, on_step, on_checkpoint, on_load):
        setattr(module, function.__name__, function)
    return module


class Model(torch.nn.Module):
    """A mixture of four experts between two linear layers; returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.Linear(8, 8)
        self.moe = MoE(8, torch.nn.Linear(8, 8), num_experts=4, k=2)
        self.after = torch.nn.Linear(8, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a loss of a batch [samples, 8]."""
        output, auxiliary, _ = self.moe(self.before(batch))
        return self.after(output).square().mean() + 0.01 * auxiliary


def main() -> None:
    """Two steps of two micro-batches each, a checkpoint after the first, loaded at the end."""
    _, record, checkpoints, *key = sys.argv
    calls: list[list[Any]] = []
    if key:
        sys.modules[NAME] = note_taker(calls)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        **({"mcore_monitors": key[0]} if key else {}),
    }
    torch.manual_seed(0)
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    losses = []
    for micro_step in range(4):
        loss = engine(torch.randn(6, 8))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if micro_step == 1:
            engine.save_checkpoint(checkpoints, tag="first")
    engine.load_checkpoint(checkpoints)
    ours = [name for name in sys.modules if name.startswith("mcore_monitors")]
    with open(record, "w", encoding="utf-8") as file:
        json.dump({"calls": calls, "losses": losses, "ours": ours}, file)


if __name__ == "__main__":
    main()
