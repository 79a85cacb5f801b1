"""Pretrain a small mixture-of-experts language model with DeepSpeed, byte by byte.

    deepspeed --num_accelerators 2 launch/pretrain_moe_deepspeed.py \\
        --deepspeed_config configs/deepspeed_moe.json --save runs/deepspeed-moe/checkpoints

An ordinary DeepSpeed script, the size of one. What it does for the monitors is marked; it is two
lines. On a machine without a GPU put DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 before the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from moe_models import DeepSpeedModel, HuggingFaceModel  # noqa: E402
from text import documents, tokens_of  # noqa: E402

import mcore_monitors  # noqa: E402


class Batches:
    """Random stretches of a text. Sequence number n of a run is the same in every layout.

    Args:
        text: tokens, uint8.
        length: tokens of a sequence; one more is drawn, for the label of the last.
        size: sequences of a micro-batch of this rank.
        rank, world: this rank's place among those that share the data.
        seed: of the draw.
    """

    def __init__(
        self, text: numpy.ndarray, length: int, size: int, rank: int, world: int, seed: int
    ) -> None:
        self._text, self._length, self._seed = text, length, seed
        self._size, self._rank, self._world = size, rank, world
        self._next = 0

    def seek(self, position: int) -> None:
        """Go on behind ``position`` sequences of the whole run."""
        self._next = position

    def draw(self) -> torch.Tensor:
        """Return this rank's part of the next micro-batch, tokens [size, length + 1]."""
        first = self._next + self._rank * self._size
        self._next += self._world * self._size
        rows = []
        for number in range(first, first + self._size):
            start = numpy.random.default_rng((self._seed, number)).integers(
                len(self._text) - self._length
            )
            rows.append(self._text[start : start + self._length + 1])
        return torch.from_numpy(numpy.stack(rows)).long()


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, batches: Batches, count: int) -> float:
    """Return the mean loss in nats over the first micro-batches of held-out text."""
    engine.eval()
    batches.seek(0)
    losses = [engine(batches.draw().to(engine.device)) for _ in range(count)]
    engine.train()
    mean = torch.stack(losses).mean()
    deepspeed.comm.all_reduce(mean)
    return mean.item() / deepspeed.comm.get_world_size()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed's JSON file")
    parser.add_argument(
        "--model",
        choices=("deepspeed", "hf"),
        default="deepspeed",
        help="DeepSpeed's own MoE layer, or a Hugging Face mixture of experts (default: deepspeed)",
    )
    parser.add_argument(
        "--expert-parallel",
        type=int,
        default=None,
        help="ranks that share the experts; --model deepspeed only (default: all)",
    )
    parser.add_argument("--text", type=Path, help="a file (default: the standard library's code)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=1000, help="last step (default: 1000)")
    parser.add_argument("--save", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--save-interval", type=int, default=50, help="steps (default: 50)")
    parser.add_argument("--eval-interval", type=int, default=0, help="steps; 0: never (default)")
    parser.add_argument("--log-interval", type=int, default=10, help="steps (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the runner
    return parser.parse_args()


def read_text(path: Path | None) -> numpy.ndarray:
    """Return all tokens, uint8: of a file, or of the standard library's sources."""
    if path is not None:
        return numpy.fromfile(path, dtype=numpy.uint8)
    return numpy.concatenate([tokens_of(document) for document in documents()])


def main() -> None:
    """Train."""
    args = arguments()
    deepspeed.init_distributed()
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config = json.loads(Path(args.deepspeed_config).read_text())

    # Experts differ from rank to rank; everything else DeepSpeed copies from rank 0.
    torch.manual_seed(1000 * args.seed + rank)
    if args.model == "hf":
        model = HuggingFaceModel(args.length)
        parameters = model.parameters()
    else:
        model = DeepSpeedModel(args.length, args.expert_parallel or world)
        parameters = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)

    text = read_text(args.text)
    held_out = len(text) * 98 // 100
    micro = engine.train_micro_batch_size_per_gpu()
    batches = Batches(text[:held_out], args.length, micro, rank, world, args.seed)
    held_out_batches = Batches(text[held_out:], args.length, micro, rank, world, args.seed)

    # For the monitors: how to put the data back when the run goes back while it is running.
    if "mcore_monitors" in config:
        mcore_monitors.attach(engine, on_rollback=batches.seek)

    if (args.save / "latest").exists():
        engine.load_checkpoint(str(args.save))
    # DeepSpeed counts the sequences and saves the number: that is where the data goes on.
    batches.seek(engine.global_samples)

    # The engine's own counter, which a rollback puts back; not one of ours.
    while engine.global_steps < args.steps:
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(batches.draw().to(engine.device))
            engine.backward(loss)
            engine.step()
        step = engine.global_steps
        if rank == 0 and step % args.log_interval == 0:
            print(f"step {step} loss {loss.item():.4f} lr {engine.get_lr()[0]:.2e}", flush=True)
        if args.eval_interval and step % args.eval_interval == 0:
            value = evaluate(engine, held_out_batches, 8)
            if rank == 0:
                print(f"step {step} held-out loss {value:.4f}", flush=True)
        if step % args.save_interval == 0:
            engine.save_checkpoint(str(args.save))
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
