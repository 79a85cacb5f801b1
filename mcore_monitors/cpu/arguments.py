"""The Megatron arguments that a run on the CPU needs, each with its reason."""

from __future__ import annotations

# (argument and its value, why a CPU needs it)
_NEEDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--distributed-backend", "gloo"), "NCCL needs a GPU"),
    (("--use-cpu-initialization",), "weights are drawn by the CPU's generator"),
    (("--transformer-impl", "local"), "Transformer Engine needs a GPU"),
    (("--attention-backend", "unfused"), "flash and fused attention are CUDA kernels"),
    (("--no-persist-layer-norm",), "torch's own norm does not have it"),
    (("--no-masked-softmax-fusion",), "CUDA kernel"),
    (("--no-bias-gelu-fusion",), "fused by torch.compile, which is off"),
    (("--no-bias-swiglu-fusion",), "fused by torch.compile, which is off"),
    (("--no-bias-dropout-fusion",), "fused by torch.compile, which is off"),
    (("--no-rope-fusion",), "kernel of Transformer Engine"),
    (("--no-gradient-accumulation-fusion",), "kernel of Apex or Transformer Engine"),
    (
        ("--no-create-attention-mask-in-dataloader",),
        "the local attention makes its own causal mask",
    ),
    (("--ckpt-format", "torch_dist"), "the format that does not depend on the layout"),
)
_NEEDED_FOR_EXPERTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--moe-token-dispatcher-type", "alltoall"), "the other dispatchers are CUDA kernels"),
    (("--disable-bias-linear",), "the local expert layers have no bias"),
)


def default_arguments(experts: bool = False) -> list[str]:
    """Return the Megatron arguments that a CPU run needs.

    Args:
        experts: also those of a mixture-of-experts model.

    Returns:
        A flat list for a command line; what the user gives after it wins.
    """
    needed = _NEEDED + (_NEEDED_FOR_EXPERTS if experts else ())
    return [word for words, _ in needed for word in words]
