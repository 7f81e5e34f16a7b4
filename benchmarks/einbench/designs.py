"""The designs of EinBench: every named structure, chains, mixtures, and a Sobol sample of θ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from scipy.stats import qmc

from nas.designs.design import Design, parse_design
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest, Space
from nas.planning.runs import fit
from nas.search.space import design_of, distributions

#: Chains of three and four factors, and mixtures, as shares of the whole.
_CHAINS, _MIXTURES = 0.08, 0.02
_SEED = 20


def named() -> Iterator[str]:
    """Structures that have a name, over the range of their exponents."""
    yield "dense"
    yield "monarch"
    exponents = ("1/4", "1/3", "1/2", "2/3", "3/4")
    yield from (f"low-rank:rho={r}" for r in ("1/8", "1/4", "3/8", *exponents[1:], "7/8"))
    for alpha, epsilon in product(exponents, repeat=2):
        yield f"kronecker:alpha={alpha},epsilon={epsilon}"
    for alpha, epsilon, rho in product(exponents[1:4], exponents[1:4], ("1/8", "1/4", "3/8")):
        yield f"tensor-train:alpha={alpha},epsilon={epsilon},rho={rho}"
    for alpha, epsilon, rho in product(exponents, exponents, ("0", "1/8", "1/4", "1/2")):
        yield f"btt:alpha={alpha},epsilon={epsilon},rho={rho}"


def chains() -> Iterator[str]:
    """Chains that have a name."""
    for family, cores, rho in product(
        ("btt", "tensor-train"), (3, 4), ("1/16", "1/8", "1/4", "3/8")
    ):
        yield f"{family}:cores={cores},rho={rho}"


def mixtures() -> Iterator[str]:
    """Mixtures of experts that have a name."""
    for family in ("btt-moe", "low-rank-moe", "dense-moe", "ffn-moe"):
        yield f"{family}:experts=4,active=2"
        yield f"{family}:experts=8,active=2"


def sampled(task: str, space: Space) -> Iterator[Design]:
    """A Sobol sequence of the box from which samplers propose."""
    request = SearchRequest(task=task, train_flops=1e12, space=space)
    box = distributions(request, request.settings)
    names = [name for name, of in box.items() if hasattr(of, "low")]
    lows = [box[name].low for name in names]  # type: ignore[attr-defined]
    highs = [box[name].high for name in names]  # type: ignore[attr-defined]
    chosen = {n: of.choices[-1] for n, of in box.items() if hasattr(of, "choices")}
    sequence = qmc.Sobol(len(names), seed=_SEED)
    while True:
        for row in qmc.scale(sequence.random(256), lows, highs):
            yield design_of(space, {**dict(zip(names, row.tolist(), strict=True)), **chosen})


def _rounded(design: Design) -> Design:
    """A design with exponents of four digits, so that tables show it as it is."""
    return parse_design(",".join(f"{e:.4f}" for e in design.exponents))


def einbench_designs(task: str, recipe: Recipe, widths: Sequence[int], count: int) -> list[str]:
    """Texts of `count` designs that have different integer structures at every width."""
    seen: list[set[object]] = [set() for _ in widths]
    found: list[str] = []

    def add(designs: Iterable[Design | str], most: int) -> None:
        last = min(count, len(found) + most)
        for given in designs:
            if len(found) >= last:
                return
            design = parse_design(given) if isinstance(given, str) else given
            keys = []
            for width in widths:
                own = fit(recipe, design, width)
                keys.append(tuple(s.fingerprint for s in structures_of(recipe, own, width)))
            if any(key in had for key, had in zip(keys, seen, strict=True)):
                continue
            for key, had in zip(keys, seen, strict=True):
                had.add(key)
            found.append(design.text)

    add(named(), count // 3)
    add(mixtures(), max(4, round(_MIXTURES * count)))
    add(chains(), count)
    for factors in (3, 4):
        longer = Space(families=("einsum",), factors=(factors,))
        add((d for d in sampled(task, longer)), round(_CHAINS * count / 2))
    add((_rounded(d) for d in sampled(task, Space())), count)
    return found
