"""One healthy run of a Hugging Face model under DeepSpeed; conservation_healthy.py starts it.

    DS_ACCELERATOR=cpu python benchmarks/conservation_healthy_deepspeed.py --monitors m.yaml --bf16

A Qwen3 mixture of experts (2 layers, hidden 64, 4 heads on 2 groups, 4 experts) from its
configuration, trained on the standard library's sources byte by byte: 4 sequences of 64 a step.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import numpy
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

from text import documents, tokens_of  # noqa: E402

import mcore_monitors  # noqa: E402

LENGTH, SEQUENCES = 64, 4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--monitors", required=True, help="settings of the monitors")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the data's order")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)

    torch.manual_seed(arguments.seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": SEQUENCES,
            "optimizer": {"type": "AdamW", "params": adam},
            "bf16": {"enabled": arguments.bf16},
            "zero_optimization": {"stage": 1},
            "gradient_clipping": 1.0,
        },
    )
    mcore_monitors.attach(engine, arguments.monitors)
    text = torch.from_numpy(numpy.concatenate([tokens_of(document) for document in documents()]))
    drawn = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.steps):
        starts = torch.randint(len(text) - LENGTH, (SEQUENCES,), generator=drawn).tolist()
        tokens = torch.stack([text[at : at + LENGTH] for at in starts]).long()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    print(f"last loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
