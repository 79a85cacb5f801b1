"""Eigenvalues of symmetric matrices: the card's kernels, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from mcore_monitors.signals.eigenvalues import symmetric_eigenvalues

#: the interpreter has to be asked for before Triton is imported
INTERPRETED = """
import torch
from mcore_monitors.signals.eigenvalues_cuda import eigenvalues
for m in (2, 3, 17):
    made = torch.randn(4, m, m + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    matrices = made @ made.mT
    matrices[1] *= 1e-30   # a small update
    matrices[2] = 0        # none
    matrices[3] = torch.ones(m, 1).double() @ torch.ones(1, m).double()  # of rank one
    wanted = torch.linalg.eigvalsh(matrices)
    matrices[:, torch.ones(m, m).triu(1).bool()] = torch.nan  # never read
    found = eigenvalues(matrices)
    error = (found - wanted).abs().amax(1)
    assert (error <= 1e-14 * wanted.amax(1)).all(), (m, error)
print("done")
"""


def test_the_kernels_find_lapacks_eigenvalues() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_only_the_lower_triangle_is_read() -> None:
    made = torch.randn(3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = made @ made.mT
    wanted = torch.linalg.eigvalsh(matrices)
    matrices[:, torch.ones(9, 9).triu(1).bool()] = torch.nan
    torch.testing.assert_close(symmetric_eigenvalues(matrices), wanted)
