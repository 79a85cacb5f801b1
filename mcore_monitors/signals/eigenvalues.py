"""Eigenvalues of many small symmetric matrices, on whichever device they are."""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_monitors.messages import say

#: rows of the largest matrix that a card's kernel takes; beyond it a matrix fills a card anyway
_LARGEST = 1024
#: whether our kernels have not failed yet
_usable = True


@torch.no_grad()
def symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues [n, m], ascending, of symmetric matrices [n, m, m], float64 and finite.

    Reads the lower triangle and may overwrite the matrices. Errors are a few units in the last
    place of the matrix's largest eigenvalue.

    On a CPU LAPACK's, which PyTorch calls for one matrix after the other. On a CUDA device PyTorch
    does so too, at 0.7 ms a matrix of 128 rows and 2 ms of 256 (docs/attention_update.md), and
    waits for the device; there they are found by kernels of our own, all matrices side by side and
    without waiting. PyTorch's are used where Triton can't be.
    """
    if matrices.device.type == "cuda" and 1 < matrices.shape[1] <= _LARGEST:
        return _on_card(matrices.contiguous())
    return _lapack(matrices)


def _lapack(matrices: Tensor) -> Tensor:
    # Transposed, the lower triangle is the upper one of LAPACK's own layout: no copy across, and a
    # twentieth faster than the other triangle.
    return torch.linalg.eigvalsh(matrices.mT, UPLO="U")


@torch.library.custom_op(
    "mcore_monitors::eigenvalues", mutates_args=("matrices",), device_types="cuda"
)
def _on_card(matrices: Tensor) -> Tensor:
    global _usable
    if _usable:
        try:
            from mcore_monitors.signals import eigenvalues_cuda

            return eigenvalues_cuda.eigenvalues(matrices)
        except Exception as error:  # known before a kernel runs: no Triton, no compiler for it
            _usable = False
            say(
                "eigenvalues are found one matrix after the other, since Triton can't be used: "
                f"{type(error).__name__}: {error}"
            )
    return _lapack(matrices)


@_on_card.register_fake
def _(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape[:2])
