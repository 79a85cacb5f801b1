"""The demo's model and training, in Megatron's own words; the benchmarks train the same."""

from __future__ import annotations

from mcore_monitors.cpu.arguments import default_arguments

#: a mixture-of-experts GPT: 4 layers × 8 experts (top-2), two processes with expert parallelism
MEGATRON_ARGUMENTS = [
    *"--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256".split(),
    *"--seq-length 128 --max-position-embeddings 128 --position-embedding-type rope".split(),
    *"--normalization RMSNorm --swiglu --attention-dropout 0 --hidden-dropout 0".split(),
    "--untie-embeddings-and-output-weights",
    *"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256".split(),
    *"--moe-aux-loss-coeff 0.01 --expert-model-parallel-size 2".split(),
    *"--micro-batch-size 4 --global-batch-size 8".split(),
    *"--lr 1e-3 --min-lr 1e-3 --lr-decay-style constant".split(),
    *"--lr-warmup-iters 100 --lr-decay-iters 1000000".split(),
    *"--weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95".split(),
    *"--split 98,2,0 --tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0".split(),
    *"--eval-iters 0 --eval-interval 1000000 --log-interval 10".split(),
    *default_arguments(experts=True),
]
