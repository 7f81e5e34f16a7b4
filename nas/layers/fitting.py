"""The factors of a structure whose product is nearest to a given dense matrix.

W (d_out, d_in), read as [φ,ε,δ,γ,β,α], is Σ_ρ B[φ,γ,ρ,β,ε] A[γ,ρ,φ,δ,α].  Both factors carry γ and
φ, so each pair (γ, φ) is a problem of its own: the block M_γφ[(β,ε), (δ,α)] nearest by a matrix of
rank ρ.  The truncated SVD solves it (Eckart–Young), so the whole fit is globally optimal where
nothing is padded.  One block is the plain SVD of low-rank or, for Kronecker products, that of the
rearranged matrix (Van Loan & Pitsianis 1993); Monarch and BTT have γφ blocks.

Padding makes some entries of a block free: they meet a zero input or are cut from the output.
Those blocks start from free entries of zero and go on by alternating least squares over the real
entries, which raises the error at no sweep but is only locally optimal; where no nearest product
exists the factors grow slowly from sweep to sweep.  Where the free entries are whole rows and
columns of the block, as in every BTT, zeros are globally optimal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.designs.einsum import Structure
from nas.designs.structure import LinearStructure
from nas.errors import InvalidInput

#: Entries of W that one batched decomposition takes in float64 (32 MiB), if a block is not larger.
_CHUNK_ENTRIES = 1 << 22
#: A slice is empty whose factor is smaller than this beside the largest: singular values enter
#: factors by their root, and double precision leaves 1e-16 of one that is zero.
EMPTY = 1e-7
#: Directions of an orthonormal basis that the real entries see less than this are not fitted.
_SEEN = 1e-8


@dataclass(frozen=True)
class Fit:
    """Factors near to a matrix, in its dtype and on its device, detached, as the layer has them.

    `relative_error` is ‖W − Ŵ‖ / ‖W‖ (Frobenius) over the (d_out, d_in) entries of W, for the
    factors as rounded to their dtype; 0 if W is zero.
    """

    factors: tuple[Tensor, ...]
    relative_error: float


@torch.no_grad()
def fit_factors(
    weight: Tensor, structure: Structure, *, max_sweeps: int = 100, tolerance: float = 1e-7
) -> Fit:
    """The factors of `structure` whose product is nearest to `weight` (d_out, d_in).

    They are A (γ, ρ, φ, δ, α) and B (φ, γ, ρ, β, ε).  Singular values are split evenly, then one
    scalar moves scale between the factors until RMS(A) / init_std("A") = RMS(B) / init_std("B").
    Slices (γ, φ, ρ) that the weight leaves empty, because it is zero there or ρ is past the rank
    min(βε, δα) of a block, are left out of that: B is zero there, so that the product is exact, and
    A is drawn at its init std with a fixed seed, so that they can learn.  Where the structure
    covers fewer inputs or outputs than the layer has, what it cannot represent counts as error.

    Parameters
    ----------
    max_sweeps, tolerance
        Alternating least squares ends after `max_sweeps` (0: free entries stay zero), or once a
        sweep lowers no block's error by more than `tolerance` of it.

    Raises
    ------
    InvalidInput
        A dense structure; a weight of another shape, not real floating point, or not finite.

    >>> from nas.designs.taxonomy import parse_theta
    >>> structure = Structure.of(parse_theta("kronecker"), 9, 4)
    >>> weight = torch.kron(torch.rand(2, 3), torch.rand(2, 3))
    >>> fit_factors(weight, structure).relative_error < 1e-6
    True
    """
    _check(weight, structure)
    s = structure.sizes
    w = weight.cpu() if weight.device.type == "mps" else weight  # mps has no float64
    scale = w.abs().max().item() or 1.0  # squares of the scaled entries stay in range
    rank = min(s.rho, s.beta * s.epsilon, s.delta * s.alpha)
    a = w.new_zeros((s.gamma, s.rho, s.phi, s.delta, s.alpha), dtype=torch.float64)
    b = w.new_zeros((s.phi, s.gamma, s.rho, s.beta, s.epsilon), dtype=torch.float64)
    for g, f, m, seen in _chunks(w, structure):
        left, right = _nearest(m / scale, seen, rank, max_sweeps, tolerance)
        # indices with a slice between them: the chunk's axis comes first
        a[g, :rank, f] = right.mT.reshape(-1, rank, s.delta, s.alpha)
        b[f, g, :rank] = left.mT.reshape(-1, rank, s.beta, s.epsilon)

    # even splitting makes ‖A‖ = ‖B‖, so that the balance follows from the shapes alone
    std = structure.init_std("A")
    balance = math.sqrt(std / structure.init_std("B") * math.sqrt(a.numel() / b.numel()))
    a *= math.sqrt(scale) * balance
    b *= math.sqrt(scale) / balance
    # slices (γ, φ, ρ) without a part in W: zero in both factors they could never learn
    norms = torch.linalg.vector_norm(b, dim=(3, 4))
    empty = (norms <= EMPTY * norms.max()).permute(1, 2, 0)
    b.masked_fill_(empty.permute(2, 0, 1)[..., None, None], 0.0)
    draw = torch.Generator().manual_seed(0)
    drawn = std * torch.randn(a.shape, dtype=a.dtype, generator=draw).to(a)
    a = torch.where(empty[..., None, None], drawn, a)
    a, b = a.to(w.dtype), b.to(w.dtype)
    return Fit((a.to(weight), b.to(weight)), _relative_error(w, a, b, scale))


def _check(weight: Tensor, structure: Structure) -> None:
    if structure.is_dense:
        raise InvalidInput("structure", "dense", "a structure of two factors")
    check_weight(weight, structure)


def check_weight(weight: Tensor, structure: LinearStructure) -> None:
    """Raise `InvalidInput` for a weight that no matrix of the structure can be near to."""
    expected = (structure.d_out, structure.d_in)
    if weight.shape != expected:
        raise InvalidInput("weight", tuple(weight.shape), f"shape (d_out, d_in) = {expected}")
    if not weight.dtype.is_floating_point:
        raise InvalidInput("weight", weight.dtype, "a real floating-point dtype")
    if bad := weight.numel() - int(weight.isfinite().sum()):
        raise InvalidInput("weight", f"{bad} entries that are NaN or infinite", "finite entries")


def _chunks(w: Tensor, structure: Structure) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The blocks with a real entry as (γ indices, φ indices, M, seen), bounded in memory.

    M (n, βε, δα) is zero at free entries; `seen` (βε, δα), where they are not, is one for all n.
    """
    s = structure.sizes
    p, q = s.beta * s.epsilon, s.delta * s.alpha
    real_in = min(structure.d_in, structure.padded_in)
    real_out = min(structure.d_out, structure.padded_out)
    more_in, more_out = structure.padded_in - structure.d_in, structure.padded_out - structure.d_out
    w = torch.nn.functional.pad(w, (0, more_in, 0, more_out))  # a negative width crops
    blocks = w.reshape(s.phi, s.epsilon, s.delta, s.gamma, s.beta, s.alpha)
    blocks = blocks.permute(3, 0, 4, 1, 2, 5)  # (γ, φ, β, ε, δ, α)
    for gammas, seen_in in _runs(real_in, s.gamma, s.beta * s.alpha, w.device):
        for phis, seen_out in _runs(real_out, s.phi, s.epsilon * s.delta, w.device):
            patterns = seen_in.view(s.beta, s.alpha), seen_out.view(s.epsilon, s.delta)
            seen = torch.einsum("ba,ed->beda", *patterns).reshape(p, q)
            pairs = torch.cartesian_prod(gammas, phis)
            for chunk in torch.split(pairs, max(1, _CHUNK_ENTRIES // (p * q))):
                g, f = chunk.T
                yield g, f, blocks[g, f].double().reshape(-1, p, q), seen


def _runs(real: int, n: int, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """`real` of n·size indices as n runs: (which runs, which of their `size` indices are real).

    Runs are full or, once at most, partly real; runs without a real index are left out.
    """
    full, rest = divmod(real, size)
    kinds = [(0, full, size), (full, full + 1, rest)]
    index = torch.arange(max(n + 1, size), device=device)
    return [(index[i:j], index[:size] < count) for i, j, count in kinds if i < j and count]


def _nearest(
    m: Tensor, seen: Tensor, rank: int, max_sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """left (n, p, rank), right (n, q, rank), left·rightᵀ nearest to m (n, p, q) where `seen`.

    `seen` (p, q) is one pattern for all blocks; m is zero elsewhere.  ‖left‖ = ‖right‖.
    """
    u, sigma, vh = torch.linalg.svd(m, full_matrices=False)
    left, right = u[..., :rank] * sigma[..., None, :rank], vh[..., :rank, :].mT
    rows, columns = _classes(seen), _classes(seen.T)
    # one class: the free entries are whole rows and columns, for which zeros are best
    if rank < min(m.shape[1:]) and len(rows) > 1:
        error = torch.linalg.matrix_norm((m - left @ right.mT) * seen)
        for _ in range(max_sweeps):
            # a basis in place of the factor keeps least squares well posed, for the same product
            new_right = torch.linalg.qr(_solve(m.mT, torch.linalg.qr(left).Q, columns)).Q
            new_left = _solve(m, new_right, rows)
            new_error = torch.linalg.matrix_norm((m - new_left @ new_right.mT) * seen)
            going = error - new_error > tolerance * error
            better = (new_error < error)[:, None, None]  # else rounding: the block stays as it is
            left, right = torch.where(better, new_left, left), torch.where(better, new_right, right)
            error = torch.minimum(new_error, error)
            if not bool(going.any()):
                break
        u, sigma, vh = torch.linalg.svd(left, full_matrices=False)
        left, right = u * sigma[..., None, :], right @ vh.mT
    root = sigma[..., None, :rank].sqrt()
    # sigma is the norm of each column of left, and right's are orthonormal
    return left / torch.where(root > 0, root, 1.0), right * root


def _classes(seen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of `seen` with the same pattern, as (row indices, columns seen); none of free rows."""
    patterns, which = torch.unique(seen, dim=0, return_inverse=True)
    classes = [((which == i).nonzero()[:, 0], p.nonzero()[:, 0]) for i, p in enumerate(patterns)]
    return [(rows, columns) for rows, columns in classes if len(columns)]


def _solve(m: Tensor, basis: Tensor, classes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """x (n, p, rank) of least norm that minimises ‖m − x basisᵀ‖ over the seen entries."""
    x = m.new_zeros(*m.shape[:2], basis.shape[-1])
    for rows, columns in classes:
        inverse = torch.linalg.pinv(basis[:, columns], rtol=_SEEN)
        x[:, rows] = m[:, rows][..., columns] @ inverse.mT
    return x


def _relative_error(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> float:
    residual = weight.double() / scale
    norm = torch.linalg.vector_norm(residual).item()
    w = torch.einsum("grfda,fgrbe->fedgba", a.double(), b.double())
    w = w.reshape(math.prod(w.shape[:3]), -1)[: residual.shape[0], : residual.shape[1]]
    residual[: w.shape[0], : w.shape[1]] -= w / scale
    return torch.linalg.vector_norm(residual).item() / norm if norm else 0.0
