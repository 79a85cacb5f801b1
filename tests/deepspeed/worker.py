"""One process of a small DeepSpeed training with a mixture-of-experts layer; for test_engine.py.

    python worker.py CONFIG.json FOLDER STEPS

Prints ``LOSS`` lines with every loss and gradient norm exactly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.moe.layer import MoE

WIDTH, EXPERTS, TOKENS = 16, 4, 32


class Model(torch.nn.Module):
    """Two mixture-of-experts layers on random features; regression."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MoE(
                WIDTH,
                torch.nn.Sequential(
                    torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.ReLU(), torch.nn.Linear(2 * WIDTH, WIDTH)
                ),
                num_experts=EXPERTS,
                ep_size=ep_size,
                k=2,
                min_capacity=0,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        auxiliary = 0
        for layer in self.layers:
            out, loss, _ = layer(x)
            x, auxiliary = x + out, auxiliary + loss
        return (x - y).square().mean() + 0 * auxiliary


def main() -> None:
    """Train and, when told, save a checkpoint."""
    config = json.loads(Path(sys.argv[1]).read_text())
    steps = int(sys.argv[3])
    ep_size = config.pop("ep_size")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    torch.manual_seed(0)
    model = Model(ep_size)
    # every expert is drawn from its own seed, so that it is the same wherever it lives
    for i, layer in enumerate(model.layers):
        for j, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            number = rank % ep_size * (EXPERTS // ep_size) + j
            torch.manual_seed(100 * i + number)
            for parameter in expert.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    accumulate = config["gradient_accumulation_steps"]
    for step in range(steps):
        torch.manual_seed(1000 + step)
        x, y = torch.randn(2, 4, TOKENS, WIDTH)
        x, y = (t.chunk(world * accumulate) for t in (x, y))
        for micro in range(accumulate):
            piece = rank * accumulate + micro
            loss = engine(x[piece], y[piece])
            engine.backward(loss)
            engine.step()
            print("LOSS", step, rank, float(loss).hex(), flush=True)
    engine.save_checkpoint(sys.argv[2], tag=f"step{steps}")


if __name__ == "__main__":
    main()
