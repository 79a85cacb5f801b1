"""The reference route to the update spectra: thin QR and SVD in float64.

No matrix is squared, so it is exact to rounding also where the two halves of Δ2 cancel. Slower than
:func:`mcore_monitors.signals.update_spectra.update_spectra`, which monitors use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .update_grams import check_shapes
from .update_spectra import UpdateSpectra


@torch.no_grad()
def update_spectra_qr(
    wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor
) -> UpdateSpectra:
    """As :func:`mcore_monitors.signals.update_spectra.update_spectra`, without squaring.

    Δ2 = Aᵀ B with A = [ΔW_q; W_q] and B = [W_k; ΔW_k]; with thin QR of Aᵀ and Bᵀ its singular
    values are those of the small R_A R_Bᵀ, and likewise for the others.
    """
    check_shapes(wq_old, wk_old, wq_new, wk_new)
    d = wq_old.shape[1]
    repeats = wq_old.shape[0] // wk_old.shape[0]
    wq, wk = wq_old.double(), wk_old.double()
    dq, dk = wq_new.double() - wq, wk_new.double() - wk
    # The leading columns of a QR are a QR of their own: ΔW first in both, so that the leading
    # blocks of R belong to ΔW_q and ΔW_k.
    r_q, finite_q = _r(torch.cat([dq, wq], dim=1))
    r_k, finite_k = _r(torch.cat([dk, wk], dim=1))
    r_k_of_head = r_k.repeat_interleave(repeats, dim=0)
    swapped = torch.cat([r_k_of_head[..., d:], r_k_of_head[..., :d]], dim=-1)
    finite = finite_q & finite_k.repeat_interleave(repeats)
    single = min(d, wq.shape[2])
    values = (
        (r_q @ swapped.mT, finite, 2 * d),
        (r_q[:, :single, :d] @ r_k_of_head[:, :single, :d].mT, finite, d),
        (r_q[:, :single, :d], finite_q, d),
        (r_k[:, :single, :d], finite_k, d),
    )
    return UpdateSpectra(*(_squared(*v) for v in values))


def _r(x: Tensor) -> tuple[Tensor, Tensor]:
    """R of the thin QR of xᵀ, x [n, rows, D], and whether x is finite [n]."""
    finite = x.isfinite().flatten(1).all(1)
    x = torch.where(finite[:, None, None], x, 0.0)
    return torch.linalg.qr(x.mT, mode="r").R, finite


def _squared(matrix: Tensor, finite: Tensor, length: int) -> Tensor:
    """Squared singular values [n, length], descending, with zeros where there are fewer."""
    s = torch.linalg.svdvals(matrix)
    s = torch.nn.functional.pad(s, (0, length - s.shape[-1]))
    return torch.where(finite[:, None], s.square(), torch.nan)
