"""`ChainLinear`: a linear layer whose matrix is an einsum of a chain of factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, pairwise, product

import torch
from torch import Tensor
from torch.nn import functional

from nas.designs.chain import ChainTheta, parse_chain
from nas.designs.chain_structure import Axis, ChainStructure, Path
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers.alternating import drawn
from nas.layers.base import StructuredLinear
from nas.layers.fitting import EMPTY
from nas.layers.kernels import measuring
from nas.layers.modes import autocast_dtype

#: Paths that are measured: so many at most, of so many times the least MACs.
_MOST_TRIED, _NEAR = 8, 2
#: Tokens whose cheapest path is run by compiled code, which is made for any number of tokens.
_COMPILED_TOKENS = 4096


class ChainLinear(StructuredLinear):
    """y = x Wᵀ + bias with W (d_out, d_in) a chain of factors; shape (..., d_in) → (..., d_out).

    Parameters
    ----------
    theta
        A `ChainTheta`, its 7, 14, 23 or 34 exponents, a name such as
        ``"btt:cores=3,rho=1/8"``, or the integer `ChainStructure` of a layer d_in → d_out.
    d_in, d_out
        Any dimensions.  Where they cannot be factored near θ the input is zero-padded at its end
        and surplus outputs are cut; no input is dropped and no output is constant.
    bias
        Whether to add a learned bias (d_out,), zero at initialisation.
    zero_init
        Start as the zero map: only the last factor is zero, so that gradients flow.
    normalize
        Cap the RMS of each factor at its initial standard deviation, as in `EinsumLinear`.
    gain
        With `normalize`, a learned scalar per factor.
    d_in_base
        Input dimension of this layer in the base model at which the learning rate was tuned;
        see `nas.layers.param_groups`.  Default: d_in.
    plan
        The contraction path, fixed; see `plan`.

    Raises
    ------
    InvalidInput
        θ, a dimension or the plan is not one that can be built.

    The factors are the parameters ``F1`` … ``FN`` of shapes ``structure.shapes``, with axes as in
    `ChainStructure.factor_axes`: two factors have the shapes of `EinsumLinear`'s A and B, one that
    absorbed all others is a matrix (d_out, d_in).

    >>> layer = ChainLinear("btt:cores=3,rho=1/8", 64, 256)
    >>> layer(torch.zeros(5, 64)).shape
    torch.Size([5, 256])
    """

    structure: ChainStructure
    _path: Path | None = None

    def __init__(
        self,
        theta: ChainTheta | Theta | str | Sequence[float] | ChainStructure,
        d_in: int,
        d_out: int,
        bias: bool = True,
        *,
        zero_init: bool = False,
        normalize: bool = False,
        gain: bool = False,
        d_in_base: int | None = None,
        plan: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            _structure(theta, d_in, d_out), d_in, d_out, bias,
            zero_init, normalize, gain, d_in_base, plan, device, dtype,
        )  # fmt: skip

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.structure.factors, self.structure.shapes, strict=True))

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        dtype = autocast_dtype(x.device, factors[0].dtype)
        if dtype != x.dtype or dtype != factors[0].dtype:
            x, factors = x.to(dtype), [f.to(dtype) for f in factors]
        compiling = torch.compiler.is_compiling()
        program = self._compiled if compiling else self._program_for(len(x), x.device, dtype)
        return self._contracted(program, factors, x).contiguous()

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return self._contracted(self._compiled, factors, x)

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        s = self.structure
        every = "Z"  # letters of axes are lower-case
        terms = ["".join((every, *(a.letter for a in axes))) for axes in s.factor_axes]
        outer = [a.letter for a in (*s.output_axes, *s.input_axes)]
        w = torch.einsum(",".join(terms) + "->" + "".join((every, *outer)), *factors)
        w = w.reshape(len(w), s.padded_out, s.padded_in)
        return w[:, : s.d_out, : s.d_in]

    def _start(self, weight: Tensor) -> list[Tensor]:
        """One factor after another from a truncated SVD of what the later ones have to make.

        For each value of the axes that factor k shares with later ones but the bond, it and the
        product of those make a matrix of rank ≤ bond.  As of Tensor-Trains (Oseledets 2011), exact
        for matrices of the structure where nothing is padded; else padding counts as zero.
        """
        s = self.structure
        padding = (0, s.padded_in - s.d_in, 0, s.padded_out - s.d_out)
        axes = [*s.output_axes, *s.input_axes]
        rest = functional.pad(weight, padding).reshape([a.size for a in axes])
        found: list[Tensor] = []
        roots: list[tuple[Tensor, list[Axis]]] = []
        for k, stored in enumerate(s.factor_axes[:-1]):
            (bond,) = (a for a in stored if a not in axes)
            shared = [a for a in stored if a in axes and a in s.factor_axes[k + 1]]
            own = [a for a in stored if a in axes and a not in shared]
            others = [a for a in axes if a not in stored]
            matrices = _axes_moved(rest, axes, [*shared, *own, *others])
            matrices = matrices.reshape(_volume_of(shared), _volume_of(own), -1)
            u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
            n = min(bond.size, sigma.shape[-1])
            # places on the bond beyond the rank make nothing yet, but can learn
            (left,) = drawn([(*u.shape[:2], bond.size)], [u.shape[1] ** -0.5])
            left = left.to(u)
            left[..., :n] = u[..., :n]
            right = functional.pad(sigma[:, :n, None] * vh[:, :n], (0, 0, 0, bond.size - n))
            sizes = [a.size for a in (*shared, *own, bond)]
            found.append(_axes_moved(left.reshape(sizes), [*shared, *own, bond], stored))
            axes = [*shared, bond, *others]
            rest = right.reshape([a.size for a in axes])
            root = functional.pad(sigma[:, :n], (0, bond.size - n)).sqrt()
            root = torch.where(root > EMPTY * root.max(), root, 1.0)
            roots.append((root.reshape([a.size for a in (*shared, bond)]), [*shared, bond]))
        found.append(_axes_moved(rest, axes, s.factor_axes[-1]))
        for k, (root, of) in enumerate(roots):  # singular values are split evenly
            found[k] = found[k] * _spread(root, of, s.factor_axes[k])
            found[k + 1] = found[k + 1] / _spread(root, of, s.factor_axes[k + 1])
        return found

    def _contracted(self, program: _Program, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """(n, d_in) → (n, d_out)."""
        padding, surplus = self._beyond
        if padding:
            x = functional.pad(x, (0, padding))
        y = _run(program, [*factors, x])
        return y[:, : self.out_features] if surplus else y

    @property
    def plan(self) -> str | None:
        """The contraction path that was fixed, or None where each input chooses its own.

        ``path (0,3) (0,2) (0,1)``: positions among F1, …, FN, x of what is multiplied next, whose
        product goes to the end.  Paths change speed and memory, and the result by rounding only;
        they are no part of `state_dict`.

        >>> layer = ChainLinear("btt:cores=3,rho=1/8", 64, 64)
        >>> layer.plan_for(1024)
        'path (0,3) (0,2) (0,1)'
        """
        return None if self._path is None else _text(self._path)

    @plan.setter
    def plan(self, value: str | None) -> None:
        self._path = None if value is None else _parse_path(value, self.structure)
        # looked up here, since compiled code cannot
        s = self.structure
        path = s.path_for(_COMPILED_TOKENS) if self._path is None else self._path
        self._compiled = _program(s, path)
        self._beyond = s.padded_in - s.d_in, s.padded_out - s.d_out

    def plan_for(
        self, tokens: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str:
        """The path that runs an input of `tokens` tokens: fixed, else as `measure_plan` found it,
        else the one of least MACs.

        Compiled code runs that of least MACs for 4096 tokens.
        """
        factor = self._any_factor()
        device = factor.device if device is None else device
        return _text(self._path_for(tokens, device, factor.dtype if dtype is None else dtype))

    def _path_for(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Path:
        if self._path is not None:
            return self._path
        found = measuring.remembered(self.structure, tokens, device, dtype)
        return (
            self.structure.path_for(tokens) if found is None else _parse_path(found, self.structure)
        )

    def _plans_to_try(self, tokens: int, device: torch.device, dtype: torch.dtype) -> list[str]:
        """The paths of fewest MACs, as far as they have no more than a few times the least."""
        s = self.structure
        macs = {path: s.macs_along(path, tokens) for path in _paths(s.n_factors + 1)}
        best = min(macs.values())
        near = [path for path in sorted(macs, key=macs.__getitem__) if macs[path] <= _NEAR * best]
        return [_text(path) for path in dict.fromkeys([s.path_for(tokens), *near[:_MOST_TRIED]])]

    def _program_for(self, tokens: int, device: torch.device, dtype: torch.dtype) -> _Program:
        return _program(self.structure, self._path_for(tokens, device, dtype))


def _structure(
    theta: ChainTheta | Theta | str | Sequence[float] | ChainStructure, d_in: int, d_out: int
) -> ChainStructure:
    if isinstance(theta, ChainStructure):
        return theta
    found = parse_chain(theta) if isinstance(theta, str) else ChainTheta.of(theta)
    return ChainStructure.of(found, d_in, d_out)


def _text(path: Path) -> str:
    return " ".join(["path", *(f"({i},{j})" for i, j in path)])


def _paths(operands: int) -> Iterator[Path]:
    """Every order of pairwise products of so many operands."""
    if operands == 1:
        yield ()
        return
    for pair in combinations(range(operands), 2):
        for rest in _paths(operands - 1):
            yield (pair, *rest)


def _parse_path(text: str, structure: ChainStructure) -> Path:
    n = structure.n_factors
    accepted = f"None or {n} pairs of operands, such as {_text(structure.chain_path)}"
    if not isinstance(text, str) or not re.fullmatch(r"path( \([0-9],[0-9]\))+", text):
        raise InvalidInput("plan", text, accepted)
    pairs = [(int(i), int(j)) for i, j in re.findall(r"([0-9]),([0-9])", text)]
    path = tuple((min(pair), max(pair)) for pair in pairs)
    if len(path) != n or any(i == j or j > n - k for k, (i, j) in enumerate(path)):
        raise InvalidInput("plan", text, accepted)
    return path


# Execution.  Every product of a path is one batched matrix product.  A tensor is known by the
# letters of its axes in the order in which they lie in memory, _TOKENS among them; axes of size 1
# are left out.  What is run is worked out once per path, as plain tuples that compiled code can
# read: for each product the places of both operands, and for each of these the sizes of its axes
# and their permutation (neither where none is permuted), the sizes to fold it to and whether it is
# then transposed; at last the same for the output.  The size that holds the tokens is -1, so that a
# program is one for any number of them.

_TOKENS = "*"
#: Length of a run of numbers at which copying it costs twice what the numbers do.
_SHORT_RUN = 8
_Fold = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]
_Step = tuple[int, int, _Fold, _Fold]
_Program = tuple[tuple[_Step, ...], _Fold]


def _run(program: _Program, operands: list[Tensor]) -> Tensor:
    """The output (tokens, padded_out) of F1, …, FN and x (tokens, padded_in)."""
    steps, last = program
    for left, right, fold_left, fold_right in steps:
        p, q = _folded(operands[left], fold_left), _folded(operands[right], fold_right)
        multiply = torch.mm if len(fold_left[2]) == 2 else torch.bmm
        operands = [t for i, t in enumerate(operands) if i not in (left, right)]
        operands.append(multiply(p, q))
    return _folded(operands[0], last)


def _folded(tensor: Tensor, fold: _Fold) -> Tensor:
    sizes, order, folded, transposed = fold
    if order:
        tensor = tensor.reshape(sizes).permute(order)
    tensor = tensor.reshape(folded)
    return tensor.transpose(-1, -2) if transposed else tensor


@lru_cache(maxsize=4096)
def _program(structure: ChainStructure, path: Path) -> _Program:
    """The products of a path with each pair in the order that copies the fewest numbers."""
    ways = product((False, True), repeat=len(path))
    found = [_program_with(structure, path, swapped) for swapped in ways]
    return min(found, key=lambda cost_and_program: cost_and_program[0])[1]


def _program_with(
    structure: ChainStructure, path: Path, swapped: Sequence[bool]
) -> tuple[int, _Program]:
    """The program with the operands of the marked products exchanged, and how much it copies."""
    sizes = {a.letter: a.size for a in structure.axes}
    operands = [_letters(axes) for axes in structure.factor_axes]
    operands.append([_TOKENS, *_letters(structure.input_axes)])
    outputs = set(_letters(structure.output_axes))
    copied, steps = 0, []
    for (first, second), swap in zip(path, swapped, strict=True):
        left, right = (second, first) if swap else (first, second)
        p, q = operands[left], operands[right]
        del operands[max(left, right)], operands[min(left, right)]
        kept = {_TOKENS} | outputs | {letter for other in operands for letter in other}
        # shared axes lie as in the operand that is dearer to copy
        leader = max(p, q, key=lambda axes: _volume(axes, sizes))
        batch = [letter for letter in leader if letter in p and letter in q and letter in kept]
        summed = [letter for letter in leader if letter in p and letter in q and letter not in kept]
        folds, free = [], []
        for axes, is_left in ((p, True), (q, False)):
            own = [letter for letter in axes if letter not in batch and letter not in summed]
            groups = [batch, own, summed] if is_left else [batch, summed, own]
            # fold in the order of memory, so that what must be copied is copied in long runs
            turned = bool(axes) and axes[-1] in groups[1]
            if turned:
                groups[1:] = groups[:0:-1]
            fold, cost = _fold(axes, groups, sizes, turned)
            folds.append(fold)
            free.append(own)
            copied += cost
        operands.append([*batch, *free[0], *free[1]])
        steps.append((left, right, folds[0], folds[1]))
    target = [_TOKENS, *_letters(structure.output_axes)]
    fold, cost = _fold(operands[0], [target[:1], target[1:]], sizes, False)
    copied += cost
    return copied, (tuple(steps), fold)


def _fold(
    axes: list[str], groups: list[list[str]], sizes: dict[str, int], transposed: bool
) -> tuple[_Fold, int]:
    """How to bring a tensor's axes into groups, one dimension each, and what the copy costs.

    None is needed where the axes of each group lie side by side in its order, except that a matrix
    product wants the innermost in a dimension of its own.  Cost is in numbers that are copied; one
    in a run of few counts for more.
    """
    folded = [_size(group, sizes) for group in groups]
    if len(groups) == 3 and not groups[0]:
        folded = folded[1:]  # no batch: a plain matrix product
    order = [axes.index(letter) for group in groups for letter in group]
    permuted = order != list(range(len(axes)))
    unfolded = tuple(_size([letter], sizes) for letter in axes) if permuted else ()
    side_by_side = all(
        axes.index(b) == axes.index(a) + 1 for group in groups for a, b in pairwise(group)
    )
    inner_batch = len(groups) == 3 and bool(axes) and axes[-1] in groups[0]
    fold = unfolded, tuple(order) if permuted else (), tuple(folded), transposed
    if side_by_side and not inner_batch:
        return fold, 0
    target = [letter for group in groups for letter in group]
    run = [a for i, a in enumerate(axes) if axes[i:] == target[i:]]
    return fold, _volume(axes, sizes) + _SHORT_RUN * _volume(axes, sizes) // _volume(run, sizes)


def _size(group: Sequence[str], sizes: dict[str, int]) -> int:
    return -1 if _TOKENS in group else _volume(group, sizes)


def _axes_moved(tensor: Tensor, axes: Sequence[Axis], order: Sequence[Axis]) -> Tensor:
    return tensor.permute([list(axes).index(a) for a in order])


def _spread(tensor: Tensor, axes: Sequence[Axis], order: Sequence[Axis]) -> Tensor:
    """As it multiplies a tensor of the axes `order`, which has all of `axes`."""
    moved = _axes_moved(tensor, axes, [a for a in order if a in axes])
    return moved.reshape([a.size if a in axes else 1 for a in order])


def _volume_of(axes: Sequence[Axis]) -> int:
    return math.prod(a.size for a in axes)


def _volume(axes: Sequence[str], sizes: dict[str, int]) -> int:
    return math.prod(_COMPILED_TOKENS if a == _TOKENS else sizes[a] for a in axes)


def _letters(axes: Sequence[Axis]) -> list[str]:
    return [a.letter for a in axes if a.size > 1]
