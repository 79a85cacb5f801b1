"""Residual Koopman profile: what a layer does to its residual stream, as eigenvalues.

From one forward pass, the residual stream before a layer (X) and after it (Y) is whitened with the
statistics of X, the linear map A that takes one to the other is fitted (dynamic mode
decomposition), and its eigenvalues say how far the layer is from passing its input on: an identity
has all of them at one. After arXiv 2602.22988 (Residual Koopman Spectral Profiling, "RKSP").

Shape names: ``L`` layers in a batch (any leading dimensions), ``N`` tokens, ``D`` hidden size,
``r`` modes (``D`` for the full decomposition). Snapshots are [..., N, D]: a row is a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Added to the covariance before it is inverted (RKSP, section 3).
RIDGE = 1e-5
#: Moduli between which a mode counts as near-unit (RKSP: [0.90, 1.05]).
NEAR_UNIT = (0.90, 1.05)
#: Modulus below which a mode counts as sub-unit (RKSP).
SUB_UNIT = 0.80


class Modes(NamedTuple):
    """Eigenvalues of the fitted map, and what they are worth.

    Attributes:
        eigenvalues: [..., r] complex.
        residuals: [..., r], ‖u_jᴴ(Ỹ − λ_j X̃)‖/‖u_jᴴ X̃‖ of each mode (ResDMD), u_j the left
            eigenvector; 0 where the data obey the mode exactly.
        condition: [...], κ(V) of the eigenvectors; infinite where the map is defective.
        kreiss: [...], lower bound of the Kreiss constant, see :func:`kreiss_constant`.
        nonlinearity: [...], ‖Ỹ − A X̃‖_F/‖Ỹ − X̃‖_F: the share of what the layer adds that no
            linear map explains; NaN where the layer adds nothing.
    """

    eigenvalues: Tensor
    residuals: Tensor
    condition: Tensor
    kreiss: Tensor
    nonlinearity: Tensor


class Profile(NamedTuple):
    """The features of each layer, [...] float64 each; NaN where a snapshot was not finite."""

    near_unit: Tensor
    super_unit: Tensor
    sub_unit: Tensor
    spectral_radius: Tensor
    condition: Tensor
    kreiss: Tensor
    nonlinearity: Tensor


@torch.no_grad()
def whiten(
    x: Tensor, y: Tensor, ridge: float = RIDGE, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Centre both snapshots and multiply them by Σ^(−1/2), Σ = cov(X) + ridge·I.

    Args:
        x, y: [..., N, D] before and after the layer, any float format.
        ridge: relative to the unit of X squared, as in the paper; a hidden size larger than the
            number of tokens leaves directions that only the ridge keeps finite.
        present: [..., N], 1 where a row is a token and 0 where it is empty; None: all are. Empty
            rows come out as zeros, which no later sum sees; a layer without any is NaN.

    Returns:
        (X̃, Ỹ), [..., N, D] float64. A snapshot that is not finite gives NaN throughout its layer
        and leaves the others alone.

    The square root is taken in float64 whatever the model's format: its smallest eigenvalues
    decide how far the map's eigenvalues can be trusted.
    """
    x, y = x.double(), y.double()
    finite = (x.isfinite() & y.isfinite()).all((-2, -1), keepdim=True)
    # An eigensolver may not return on NaN, so it is given zeros and the result is struck out.
    x, y = torch.where(finite, x, 0.0), torch.where(finite, y, 0.0)
    if present is None:
        there = torch.ones_like(x[..., :1])
    else:
        there = present.unsqueeze(-1).to(x.dtype)
    count = there.sum(-2, keepdim=True)
    finite = finite & (count > 0)
    count = count.clamp(min=1.0)
    x = (x - (x * there).sum(-2, keepdim=True) / count) * there
    y = (y - (y * there).sum(-2, keepdim=True) / count) * there
    covariance = x.mT @ x / count
    values, vectors = torch.linalg.eigh(covariance)
    scale = (values.clamp(min=0.0) + ridge).rsqrt()
    root = (vectors * scale.unsqueeze(-2)) @ vectors.mT
    struck = torch.where(finite, 1.0, torch.nan)
    return x @ root * struck, y @ root * struck


@torch.no_grad()
def decompose(x: Tensor, y: Tensor, rank: int | None = None, seed: int = 0) -> Modes:
    """Dynamic mode decomposition of whitened snapshots: the modes of A = argmin ‖Ỹ − A X̃‖.

    Args:
        x, y: [..., N, D] of :func:`whiten`.
        rank: number of modes; None for all ``D``. With fewer, A is compressed to a subspace that
            is found at random, QᵀAQ with Q an orthonormal basis of X̃ᵀX̃Ω, Ω [D, rank] Gaussian: on
            whitened data, where no direction leads, a fair sample of A and not its leading modes.
        seed: of Ω, the same for all layers.

    Returns:
        The modes, in the layers' order. NaN in a layer whose snapshots are not finite.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a rank out of [1, D].
    """
    if x.shape != y.shape or x.dim() < 2 or not x.shape[-2]:
        raise ValueError(f"snapshots need one shape [..., N, D]; got {x.shape} and {y.shape}")
    width = x.shape[-1]
    if rank is not None and not 1 <= rank <= width:
        raise ValueError(f"rank: {rank!r} cannot be used; allowed: 1 to {width}")
    x, y = x.double(), y.double()
    finite = (x.isfinite() & y.isfinite()).all((-2, -1), keepdim=True)
    x, y = torch.where(finite, x, 0.0), torch.where(finite, y, 0.0)
    basis = None
    if rank is not None and rank < width:
        generator = torch.Generator().manual_seed(seed)
        probe = torch.randn(width, rank, generator=generator, dtype=x.dtype).to(x.device)
        basis = torch.linalg.qr(x.mT @ (x @ probe)).Q
    reduced_x, reduced_y = (x, y) if basis is None else (x @ basis, y @ basis)
    # Row vectors: y ≈ x Bᵀ. The Gram matrix of whitened data is near the identity, so normal
    # equations lose nothing; the pseudo-inverse covers fewer tokens than modes.
    gram = reduced_x.mT @ reduced_x
    cross = reduced_y.mT @ reduced_x
    operator = cross @ torch.linalg.pinv(gram, hermitian=True)
    values, vectors = torch.linalg.eig(operator)
    residuals, condition = _residuals(reduced_x, reduced_y, values, vectors)
    added = torch.linalg.matrix_norm(reduced_y - reduced_x)
    left_over = torch.linalg.matrix_norm(reduced_y - reduced_x @ operator.mT)
    modes = Modes(
        eigenvalues=values,
        residuals=residuals,
        condition=condition,
        kreiss=kreiss_constant(operator),
        nonlinearity=torch.where(added > 0, left_over / added, torch.nan),
    )
    struck = torch.where(finite[..., 0], 1.0, torch.nan)
    return Modes(*(f * (struck if f.dim() > struck.dim() - 1 else struck[..., 0]) for f in modes))


def _residuals(x: Tensor, y: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """ResDMD residual of each mode, and the condition number of the eigenvectors.

    Left eigenvectors are the rows of V⁻¹. Where V is singular (a defective map) the pseudo-inverse
    stands in: those modes then carry large residuals, and κ is infinite.
    """
    singular = torch.linalg.svdvals(vectors)
    smallest = singular[..., -1]
    condition = torch.where(smallest > 0, singular[..., 0] / smallest, torch.inf)
    left = torch.linalg.pinv(vectors, rtol=1e-14)
    along_x, along_y = x.to(left.dtype) @ left.mT, y.to(left.dtype) @ left.mT
    error = torch.linalg.vector_norm(along_y - values.unsqueeze(-2) * along_x, dim=-2)
    return error / torch.linalg.vector_norm(along_x, dim=-2), condition


@torch.no_grad()
def kreiss_constant(operator: Tensor, points: int = 16) -> Tensor:
    """Lower bound of the Kreiss constant K = sup_{|z| > 1} (|z| − 1)‖(zI − A)⁻¹‖₂.

    K bounds how far powers of A grow on their way: sup_k ‖A^k‖ ≥ K. It is one for a normal map of
    spectral radius at most one, and infinite where an eigenvalue lies outside the unit circle.
    There the supremum is taken over |z| > ρ, of (|z| − ρ)‖(zI − A)⁻¹‖₂ with A over ρ, which says
    how far growth exceeds the radius itself.

    Args:
        operator: [..., r, r] float64.
        points: angles per circle; the bound is exact in the limit of a fine grid.

    Returns:
        [...] float64, at least about one.
    """
    size = operator.shape[-1]
    radius = torch.linalg.eigvals(operator).abs().amax(-1)
    scaled = operator / radius.clamp(min=1.0)[..., None, None]
    angle = torch.arange(points, device=operator.device, dtype=operator.dtype) / points
    turn = torch.polar(torch.ones_like(angle), 2 * torch.pi * angle)
    identity = torch.eye(size, device=operator.device, dtype=turn.dtype)
    best = torch.ones_like(radius)
    for distance in (0.01, 0.1, 1.0):
        for z in turn.unbind() if distance < 1 else turn[::4].unbind():
            shifted = (1 + distance) * z * identity - scaled
            # The smallest singular value of zI − A is 1/‖(zI − A)⁻¹‖.
            smallest = torch.linalg.svdvals(shifted)[..., -1]
            best = torch.maximum(best, distance / smallest)
    return best


def features(modes: Modes, *, most_residual: float | None = None) -> Profile:
    """The features of RKSP, one value a layer.

    Args:
        modes: of :func:`decompose`.
        most_residual: leave out modes whose residual is larger (the paper's filter: 0.1). None
            keeps all, which is what reproduces the paper's table at initialization; with the
            filter a layer that keeps no mode gives NaN.
    """
    modulus = modes.eigenvalues.abs().double()
    known = modulus.isfinite()
    kept = known if most_residual is None else known & (modes.residuals <= most_residual)
    count = kept.sum(-1)

    def share(chosen: Tensor) -> Tensor:
        return torch.where(count > 0, (chosen & kept).sum(-1) / count, torch.nan).double()

    radius = torch.where(kept, modulus, -torch.inf).amax(-1)
    return Profile(
        near_unit=share((modulus >= NEAR_UNIT[0]) & (modulus <= NEAR_UNIT[1])),
        super_unit=share(modulus > NEAR_UNIT[1]),
        sub_unit=share(modulus < SUB_UNIT),
        spectral_radius=torch.where(count > 0, radius, torch.nan),
        condition=modes.condition,
        kreiss=modes.kreiss,
        nonlinearity=modes.nonlinearity,
    )


def profile(x: Tensor, y: Tensor, *, rank: int | None = None, seed: int = 0) -> Profile:
    """Whiten, decompose and summarise snapshots [..., N, D]; see the three functions."""
    return features(decompose(*whiten(x, y), rank=rank, seed=seed))
