"""The papers' structures and how their layers are computed, rebuilt from their description.

Source: arXiv:2410.02117 (the θ of its runs) and arXiv:2406.06248.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nas.designs.theta import Theta

_HALF = {
    "btt1": ".5 0 .5 0 .5 .5 0", "btt2": ".33 0 .67 0 .67 .33 0", "btt3": ".25 0 .75 0 .75 .25 0",
    "btt5": ".67 0 .33 0 .33 .67 0", "btt6": ".75 0 .25 0 .25 .75 0",
    "btt7": ".67 0 .33 0 .67 .33 0", "btt8": ".33 0 .67 0 .33 .67 0",
    "btt9": ".75 0 .25 0 .75 .25 0", "btt10": ".25 0 .75 0 .25 .75 0",
    "btt11": ".5 0 .5 0 .5 .5 .25", "btt12": ".5 0 .5 0 .5 .5 .33",
    "btt13": ".33 0 .67 0 .67 .33 .25", "btt14": ".67 0 .33 0 .33 .67 .25",
    "btt15": ".67 0 .33 0 .67 .33 .25", "btt16": ".33 0 .67 0 .33 .67 .25",
    "tt1": ".5 .5 0 .5 .5 0 0", "tt2": ".33 .67 0 .33 .67 0 0",
    "tt3": ".5 .5 0 .5 .5 0 .25", "tt4": ".33 .67 0 .33 .67 0 .25",
    "l1": "1 0 0 0 1 0 .75", "l2": "1 0 0 0 1 0 .5",
    "g1": ".5 .25 .25 .25 .5 .25 0", "g2": ".5 .25 .25 .25 .5 .25 .25",
}  # fmt: skip
#: The 23 θ of the papers' runs; btt1 is Monarch.
STRUCTURES = {name: Theta(*map(float, text.split())) for name, text in _HALF.items()}
#: d_in and d_out of the layers that are timed.
SHAPES = ((256, 1024), (1024, 1024), (1024, 4096), (4096, 1024))


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (n, φεδ) from x (n, γβα), A (γ, ρ, φ, δ, α), B (φ, γ, ρ, β, ε), as the papers compute it.

    Two batched products with a contiguous shuffle of the intermediate between them where
    β = δ = 1; elsewhere two einsums with contiguous intermediates.
    """
    gamma, rho, phi, delta, alpha = a.shape
    beta, epsilon = b.shape[3:]
    n = x.shape[0]
    if beta == delta == 1:
        z = torch.bmm(x.view(n, gamma, alpha).transpose(0, 1), a.view(gamma, -1, alpha).mT)
        z = z.view(gamma, n, rho, phi).permute(3, 1, 0, 2).contiguous()  # (φ, n, γ, ρ)
        y = torch.bmm(z.view(phi, n, gamma * rho), b.view(phi, gamma * rho, epsilon))
        return y.transpose(0, 1).reshape(n, phi * epsilon)
    z = torch.einsum("ngba,grfda->nbgrfd", x.view(n, gamma, beta, alpha), a).contiguous()
    return torch.einsum("nbgrfd,fgrbe->nfed", z, b).contiguous().view(n, -1)


def one_einsum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same by one call of `torch.einsum`, whose operands stand in the cheaper order."""
    cube = x.view(x.shape[0], a.shape[0], b.shape[3], a.shape[4])
    return torch.einsum("ngba,grfda,fgrbe->nfed", cube, a, b).reshape(x.shape[0], -1)
