"""`BlockSparseLinear`: a linear layer of which a fixed pattern of blocks is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nas.designs.block_sparse import (
    BlockSparse,
    BlockSparseStructure,
    Channels,
    parse_block_sparse,
)
from nas.layers.modes import autocast_dtype
from nas.layers.of_design import DesignLinear


class BlockSparseLinear(DesignLinear[BlockSparse, BlockSparseStructure]):
    """y = x Wᵀ + bias with W zero outside a pattern; shape (..., d_in) → (..., d_out).

    W is (d_out, d_in).  Block i of the output is Σ_j W[i,j] x[j] over the stored blocks (i, j); see
    `nas.designs.block_sparse`.

    Parameters
    ----------
    design
        A `BlockSparse`, its text, or the `BlockSparseStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions; every input is in a block and every output is made by one.
    bias, zero_init, normalize, gain, d_in_base
        As in `nas.layers.EinsumLinear`; the stored blocks are the only factor.
    plan
        None or ``"gathered"``, the only way it is run: one product for each row of blocks.

    Raises
    ------
    InvalidInput
        The design, a dimension or the plan is not one that can be built.

    The stored blocks are the parameter ``A`` of shape ``structure.shape``.

    >>> layer = BlockSparseLinear("block-sparse:pattern=butterfly,blocks=1/2", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    structure: BlockSparseStructure
    family = "block_sparse"
    design_class = BlockSparse
    structure_class = BlockSparseStructure
    parse = staticmethod(parse_block_sparse)
    only_plan = "gathered"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"A": self.structure.shape}

    def blocks(self, factor: str, t: Tensor) -> Tensor:
        """The stored numbers as matrices (..., blocks, f_out, f_in): a row of blocks each, as it is
        stored, or the one matrix of the channels."""
        return t.unsqueeze(-3) if isinstance(self.structure.design.pattern, Channels) else t

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        (stored,) = factors
        dtype = autocast_dtype(x.device, stored.dtype)
        return self._multiplied(x.to(dtype), stored.to(dtype)).contiguous()

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return self._multiplied(x, *factors)

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        (stored,), s = factors, self.structure
        if isinstance(s.design.pattern, Channels):
            w = stored.new_zeros(len(stored), s.d_out, s.d_in)
            w[:, :, :: s.every] = stored
            return w
        n = s.blocks
        rows = torch.arange(n, device=stored.device).unsqueeze(1)
        columns = rows ^ torch.tensor([0, *s.strides], device=stored.device)
        blocks = stored.view(-1, n, s.block_out, s.in_a_row, s.block_in).transpose(2, 3)
        w = stored.new_zeros(len(stored), n, n, s.block_out, s.block_in)
        w[:, rows, columns] = blocks
        w = _joined(w.permute(0, 1, 3, 2, 4), s.d_out, n)
        return _joined(w.permute(0, 2, 3, 1), s.d_in, n).transpose(1, 2)

    def _multiplied(self, x: Tensor, stored: Tensor) -> Tensor:
        """(n, d_in) → (n, d_out)."""
        s = self.structure
        if isinstance(s.design.pattern, Channels):
            return functional.linear(x[:, :: s.every], stored)
        z = _split(x, s.d_in, s.blocks)
        # block i beside block i xor stride, which changes one bit of i
        beside = [z]
        for stride in s.strides:
            bits = z.reshape(-1, s.blocks // (2 * stride), 2, stride, s.block_in)
            beside.append(bits.flip(2).reshape(-1, s.blocks, s.block_in))
        rows = torch.cat(beside, dim=2).transpose(0, 1)
        made = torch.bmm(rows, stored.transpose(1, 2)).transpose(0, 1)
        return _joined(made, s.d_out, s.blocks)


def _split(x: Tensor, dimension: int, blocks: int) -> Tensor:
    """(n, dimension) → (n, blocks, size); the last blocks are one short, and end in a zero."""
    size, short = -(-dimension // blocks), -dimension % blocks
    if not short:
        return x.reshape(-1, blocks, size)
    whole = blocks - short
    first = x[:, : whole * size].reshape(-1, whole, size)
    last = functional.pad(x[:, whole * size :].reshape(-1, short, size - 1), (0, 1))
    return torch.cat((first, last), dim=1)


def _joined(y: Tensor, dimension: int, blocks: int) -> Tensor:
    """(n, blocks, size, ...) → (n, dimension, ...): `_split` undone."""
    short = -dimension % blocks
    if not short:
        return y.flatten(1, 2)
    whole = blocks - short
    return torch.cat((y[:, :whole].flatten(1, 2), y[:, whole:, :-1].flatten(1, 2)), dim=1)
