"""`BlastLinear`: a linear layer whose matrix is a grid of blocks U_i diag(s_ij) V_jᵀ.

Initialisation and learning rates.  An update or a factor (f_in → f_out) keeps features at their
size as models widen where its spectral norm is of the order of √(f_out / f_in) (arXiv:2310.17813,
condition 1).  Each factor acts as a batch of matrices on features that no other matrix of the batch
sees: V_jᵀ takes n inputs to r, S_k = (s_ij,k)_ij takes `columns` numbers to `rows`, U_i takes r to
m.  A random matrix of standard deviation σ has norm about σ (√f_in + √f_out), so
σ = √min(f_in, f_out) / f_in meets the condition.  Adam's update has entries of size η with the
signs of nearly one rank, so its norm is η √(f_in f_out), and η ∝ 1 / f_in meets it.  In words: S
mixes b numbers into b for each place on the rank axis, so that its fan in is b, neither r nor b r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.designs.blast import Blast, BlastStructure, parse_blast
from nas.layers.modes import autocast_dtype
from nas.layers.of_design import DesignLinear


class BlastLinear(DesignLinear[Blast, BlastStructure]):
    """y = x Wᵀ + bias with W (d_out, d_in) a BLAST matrix; shape (..., d_in) → (..., d_out).

    Block (i, j) of W is U_i diag(s_ij) V_jᵀ; see `nas.designs.blast`.

    Parameters
    ----------
    design
        A `Blast`, its text, or the `BlastStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions; inputs are zero-padded, outputs cut, at their end.
    bias, zero_init, normalize, gain, d_in_base
        As in `nas.layers.EinsumLinear`; the last factor is U.
    plan
        None or ``"batched"``, the only way it is run.

    Raises
    ------
    InvalidInput
        The design, a dimension or the plan is not one that can be built.

    The factors are the parameters ``V`` (columns, r, n), the transposes of V_j; ``S`` (r, rows,
    columns) with S[k, i, j] = s_ij,k; and ``U`` (rows, m, r).

    >>> layer = BlastLinear("blast:blocks=1/4,rho=1/2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    structure: BlastStructure
    S: nn.Parameter
    family = "blast"
    design_class = Blast
    structure_class = BlastStructure
    parse = staticmethod(parse_blast)
    only_plan = "batched"

    def _structure_of(self, design: Blast | str | BlastStructure, *sides: int) -> BlastStructure:
        s = super()._structure_of(design, *sides)
        # looked up here, since compiled code cannot
        self._columns, self._block_in, self._padded_out = s.columns, s.block_in, s.padded_out
        self._padding = s.padded_in - s.d_in
        return s

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        return self.structure.shapes

    def blocks(self, factor: str, t: Tensor) -> Tensor:
        """A factor as its matrices (..., blocks, f_out, f_in), as which it is stored."""
        return t

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        dtype = autocast_dtype(x.device, factors[0].dtype)
        return self.plain(x.to(dtype), [f.to(dtype) for f in factors]).contiguous()

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        v, mix, u = factors
        if self._padding:
            x = functional.pad(x, (0, self._padding))
        z = x.reshape(-1, self._columns, self._block_in)  # (tokens, columns, n)
        # tokens stay innermost between the products, so that none of them copies its inputs
        z = torch.bmm(v, z.permute(1, 2, 0))  # (columns, r, tokens)
        w = torch.bmm(mix, z.transpose(0, 1))  # (r, rows, tokens)
        y = torch.bmm(w.permute(1, 2, 0), u.transpose(1, 2))  # (rows, tokens, m)
        y = y.transpose(0, 1).reshape(-1, self._padded_out)
        return y[:, : self.out_features] if self._padded_out > self.out_features else y

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        v, mix, u = factors
        # diag(s_ij) V_jᵀ of a whole block row, (layers, rows, r, columns · n)
        right = torch.einsum("zkij,zjkn->zikjn", mix, v).flatten(3)
        w = torch.matmul(u, right).flatten(1, 2)
        return w[:, : self.out_features, : self.in_features]

    def _start(self, weight: Tensor) -> list[Tensor]:
        """The best matrix of rank r, which all s_ij = 1 make."""
        s = self.structure
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        root = sigma[: s.rho].sqrt()
        # where the weight is of lower rank, V goes on, so that U can learn
        u, v = u[:, : s.rho] * root, vh[: s.rho] * torch.where(root > 0, root, 1.0).unsqueeze(1)
        v = functional.pad(v, (0, self._padding)).view(s.rho, s.columns, s.block_in)
        u = functional.pad(u, (0, 0, 0, s.padded_out - s.d_out)).view(s.rows, s.block_out, s.rho)
        return [v.transpose(0, 1), torch.ones(self.S.shape, dtype=u.dtype, device=u.device), u]

    def _design_repr(self) -> str:
        return self.structure.blast.name
