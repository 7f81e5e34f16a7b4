"""Every plan of every family of layers against float64 on the CPU, with the gradients.

The yardstick is the dense product of the same dimensions, dtype and device: rounding alone gives
it an error, and a structured layer rounds once or twice more.  Errors are ‖got − true‖ / ‖true‖ of
the output and of each gradient; the true ones are those of the inputs as they were rounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.part import Part
from benchmarks.gpu.writing import table
from benchmarks.kernels.papers import one_einsum
from nas.designs.einsum import Structure
from nas.errors import InvalidInput
from nas.layers import (
    BlastLinear,
    ChainLinear,
    ConvolutionLinear,
    EinsumLinear,
    MixtureFFN,
    MixtureLinear,
    StructuredLinear,
)
from nas.layers.kernels.einsum import workspace_elements
from nas.layers.kernels.mixing import mix
from nas.layers.kernels.mixture_kernels import Form, Inputs
from nas.layers.kernels.mixture_plan import Grouping, MixturePlan, choose_mixture_plan
from nas.layers.kernels.plan import Gemm, Order, Plan, Product, candidates
from nas.layers.routing import Routing

#: Error over that of the dense product above which a result counts as wrong.  In bfloat16 each
#: rounding of an intermediate adds about as much as that of the output.  In float32 the gradient of
#: a factor is a sum over tokens and blocks, which some libraries form one number after another;
#: TF32 or bfloat16 in its place would be off by a thousand.
LIMITS = {"float32": 50.0, "bfloat16": 4.0, "autocast": 4.0}
#: dtype of the parameters, and whether products run in bfloat16 under autocast.
MODES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}
_THETAS = (
    "dense", "monarch", "btt:rho=1/4", "btt:alpha=1/3,epsilon=2/3,rho=1/4", "low-rank:rho=1/2",
    "kronecker", "tensor-train:rho=1/4", "1/2,1/4,1/4,1/4,1/2,1/4,1/4",
)  # fmt: skip
_CHAINS = ("btt:cores=3,rho=1/8",)
_CONVOLUTIONS = ("convolution:kernel=1/2",)
_BLASTS = ("blast", "blast:blocks=1/4,rho=1/2")
_MIXTURES = ("btt-moe", "low-rank-moe", "dense-moe")
_TOY = ("low-rank:rho=1/2", "btt-moe:experts=4,active=2")
#: Tokens of a tile where there are several.
_TILE = 96
#: Numbers that a plan which the cost model would never choose may hold.
_MOST_NUMBERS = 1 << 27

#: x, the parameters and other inputs by name.
Leaves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer, what it must compute, and every way to compute it."""

    design: str
    d_in: int
    d_out: int
    #: device and dtype → the layer
    make: Callable[..., nn.Module]
    #: an independent derivation of the output, in float64
    true: Callable[[Leaves], Tensor]
    #: device and dtype of the products → plans, and whether the cost model may choose them
    plans: Callable[[torch.device, torch.dtype], Mapping[str, bool]]
    #: inputs besides x, float64
    inputs: Leaves = field(default_factory=dict)
    call: Callable[[nn.Module, Leaves], Tensor] = lambda layer, leaves: layer(leaves["x"])
    #: parameters that play no part
    idle: tuple[str, ...] = ()


def run(part: Part) -> None:
    torch.backends.cudnn.allow_tf32 = False
    part.note("TF32 is off in convolutions, in contrast to torch's default.")
    shapes = ((32, 48),) if part.toy else ((256, 256), (320, 1000), (1024, 256))
    tokens = 130 if part.toy else 1000
    found = [
        itertools.chain(
            _einsums(*shape, tokens), _mixtures(*shape, tokens), _chains(*shape),
            _convolutions(*shape), _blasts(*shape),
        )
        for shape in shapes
    ]  # fmt: skip
    for case in itertools.chain(*found):
        if part.toy and case.design not in _TOY:
            continue
        for mode in MODES:
            what = f"{case.design} {case.d_in}→{case.d_out} {mode}"
            if not part.has_time(what):
                continue
            try:
                row = check(part, case, mode, tokens)
            except Exception:
                part.error(what)
                continue
            part.add(row)
            for plan in row["plans"]:
                if not plan["fine"]:
                    part.wrong(f"{what} {plan['plan']}")
    if part.on_gpu and part.has_time("convolution with TF32"):
        torch.backends.cudnn.allow_tf32 = True
        case = next(_convolutions(*shapes[0]))
        row = check(part, case, "float32", tokens)
        part.add(row | {"mode": "float32, TF32", "judged": False})


def check(part: Part, case: Case, mode: str, tokens: int) -> dict[str, Any]:
    """One row: the errors of every plan of a layer in a dtype."""
    dtype, autocast = MODES[mode]
    products = torch.bfloat16 if autocast else dtype
    torch.manual_seed(0)
    layer = case.make(device=part.device, dtype=dtype)
    x = torch.randn(tokens, case.d_in, dtype=torch.float64)
    values = {"x": x, **case.inputs}
    leaves = {name: value.to(part.device, dtype) for name, value in values.items()}
    leaves |= {n: p.detach() for n, p in layer.named_parameters() if n not in case.idle}
    dy = torch.randn(tokens, case.d_out, dtype=torch.float64).to(part.device, products)
    true = _outputs(case.true, {n: leaf.double().cpu() for n, leaf in leaves.items()}, dy)
    true = {name: value.to(part.device) for name, value in true.items()}
    dense = _dense_errors(part.device, mode, case.d_in, case.d_out, tokens)
    plans = []
    for plan, candidate in case.plans(part.device, products).items():
        row: dict[str, Any] = {"plan": plan, "candidate": candidate}
        try:
            _fix_plan(layer, plan)
            _poison(part.device)
            with _autocast(part.device, autocast):
                got = _outputs(partial(_called, case, layer), leaves, dy)
        except Exception:
            row |= {"error": part.error(f"{case.design} {mode} {plan}"), "fine": False}
        else:
            errors = {name: _error(got[name], value) for name, value in true.items()}
            row |= {"errors": errors}
            over = [error / dense.get(name, dense["w"]) for name, error in errors.items()]
            row |= {"over_dense": _worst(over), "fine": all(o <= LIMITS[mode] for o in over)}
        plans.append(row)
    ran = [p for p in plans if "errors" in p]
    return {
        "design": case.design,
        "d_in": case.d_in,
        "d_out": case.d_out,
        "tokens": tokens,
        "mode": mode,
        "dense_errors": dense,
        "plans": plans,
        "worst_error": _worst([error for p in ran for error in p["errors"].values()]),
        "worst_over_dense": _worst([p["over_dense"] for p in ran]),
    }


def _called(case: Case, layer: nn.Module, leaves: Leaves) -> Tensor:
    """The layer's output with the leaves in the place of its parameters."""
    own = dict(layer.named_parameters())
    parameters = {f"layer.{name}": leaf for name, leaf in leaves.items() if name in own}
    inputs = {name: leaf for name, leaf in leaves.items() if name not in own}
    y: Tensor = torch.func.functional_call(_Calls(layer, case.call), parameters, (inputs,))
    return y


class _Calls(nn.Module):
    """A layer that is called in its case's way."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Leaves], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, inputs: Leaves) -> Tensor:
        return self.call(self.layer, inputs)


def _outputs(function: Callable[[Leaves], Tensor], given: Leaves, dy: Tensor) -> dict[str, Tensor]:
    """The output y, and the gradient of each leaf by its name."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in given.items()}
    y = function(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _error(got: Tensor, true: Tensor) -> float:
    """‖got − true‖ / ‖true‖; NaN where either is."""
    return float(torch.linalg.norm(got.double() - true) / torch.linalg.norm(true))


def _autocast(device: torch.device, on: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def _dense_errors(
    device: torch.device, mode: str, d_in: int, d_out: int, tokens: int
) -> dict[str, float]:
    """The errors of y = x wᵀ and of its gradients; never below half a unit in the last place."""
    dtype, autocast = MODES[mode]
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).to(device, dtype)

    leaves = {"x": normal(tokens, d_in), "w": normal(d_out, d_in)}
    dy = normal(tokens, d_out).to(torch.bfloat16 if autocast else dtype)

    def product(leaves: Leaves) -> Tensor:
        return functional.linear(leaves["x"], leaves["w"])

    with _autocast(device, autocast):
        got = _outputs(product, leaves, dy)
    true = _outputs(product, {n: t.double().cpu() for n, t in leaves.items()}, dy.double().cpu())
    least = torch.finfo(torch.float32 if mode == "float32" else torch.bfloat16).eps / 4
    return {name: max(least, _error(got[name], t.to(device))) for name, t in true.items()}


def _poison(device: torch.device) -> None:
    """Leave NaN in memory that is about to be used, so that what nothing writes is seen."""
    if device.type == "cuda":
        sizes = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 24)
        held = [torch.full((size,), math.nan, device=device) for size in sizes for _ in range(2)]
        del held


def _fix_plan(layer: nn.Module, plan: str) -> None:
    for module in layer.modules():
        if isinstance(module, StructuredLinear):
            module.plan = plan


# The families.


def _einsums(d_in: int, d_out: int, tokens: int) -> Iterator[Case]:
    for theta in _THETAS:
        structure = EinsumLinear(theta, d_in, d_out, device="meta").structure
        yield Case(
            theta, d_in, d_out,
            make=partial(EinsumLinear, theta, d_in, d_out, False),
            true=partial(_einsum, structure),
            plans=partial(_einsum_plans, structure, tokens),
        )  # fmt: skip


def _einsum(structure: Structure, leaves: Leaves) -> Tensor:
    if structure.is_dense:
        return functional.linear(leaves["x"], leaves["weight"])
    return _two_factors(structure, leaves["x"], leaves["A"], leaves["B"])


def _two_factors(structure: Structure, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x = functional.pad(x, (0, structure.padded_in - structure.d_in))
    return one_einsum(x, a, b)[:, : structure.d_out]


def _einsum_plans(
    structure: Structure, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, bool]:
    """The candidates, and every other plan that can run and needs no memory out of all measure."""
    found = {str(plan): True for plan in candidates(structure, tokens, device, dtype)}
    single = device.type == "cpu" and dtype == torch.float32
    gemms = get_args(Gemm) if single else ("blas",)
    ways = itertools.product(
        get_args(Order), (0, _TILE), get_args(Product), get_args(Product), gemms
    )
    for way in ways:
        try:
            plan = Plan(*way).checked(structure)
        except InvalidInput:  # not for this structure, or not on this machine
            continue
        if workspace_elements(structure, plan, tokens) <= _MOST_NUMBERS:
            found.setdefault(str(plan), False)
    return found


def _chains(d_in: int, d_out: int) -> Iterator[Case]:
    for theta in _CHAINS:
        try:
            layer = ChainLinear(theta, d_in, d_out, False, device="meta")
        except ModuleNotFoundError:  # opt_einsum, which finds the paths
            return
        structure = layer.structure
        sizes = [axis.size for axis in structure.input_axes]
        operands = range(structure.n_factors + 1, 1, -1)
        pairs = [itertools.combinations(range(count), 2) for count in operands]
        orders = itertools.product(*pairs)
        paths = [" ".join(["path", *(f"({i},{j})" for i, j in order)]) for order in orders]
        chosen = {layer.plan_for(tokens) for tokens in (1, 64, 1024, 1 << 16)}

        def true(leaves: Leaves, s: Any = structure, sizes: list[int] = sizes) -> Tensor:
            x = functional.pad(leaves["x"], (0, s.padded_in - s.d_in)).view(-1, *sizes)
            factors = [leaves[f"F{k}"] for k in range(1, s.n_factors + 1)]
            return torch.einsum(s.einsum, *factors, x).flatten(1)[:, : s.d_out]

        yield Case(
            theta, d_in, d_out,
            make=partial(ChainLinear, structure, d_in, d_out, False),
            true=true,
            plans=lambda *_, c=chosen, p=paths: {path: path in c for path in p},
        )  # fmt: skip


def _convolutions(d_in: int, d_out: int) -> Iterator[Case]:
    for text in _CONVOLUTIONS:
        s = ConvolutionLinear(text, d_in, d_out, device="meta").structure

        def true(leaves: Leaves, s: Any = s) -> Tensor:
            x = functional.pad(leaves["x"], (0, s.padded_in - s.d_in))
            z = x.view(-1, s.channels_in, s.length)
            taps = [
                torch.einsum("oi,nil->nol", leaves["A"][..., k], z.roll(-k, -1))
                for k in range(s.taps)
            ]
            return torch.stack(taps).sum(0).flatten(1)[:, : s.d_out]

        yield Case(
            text, d_in, d_out,
            make=partial(ConvolutionLinear, text, d_in, d_out, False),
            true=true,
            plans=lambda *_: {"conv1d": True},
        )  # fmt: skip


def _blasts(d_in: int, d_out: int) -> Iterator[Case]:
    for text in _BLASTS:
        s = BlastLinear(text, d_in, d_out, device="meta").structure

        def true(leaves: Leaves, s: Any = s) -> Tensor:
            x = functional.pad(leaves["x"], (0, s.padded_in - s.d_in))
            z = x.view(-1, s.columns, s.block_in)
            w = torch.einsum("jkq,kij,njq->nik", leaves["V"], leaves["S"], z)
            return torch.einsum("ipk,nik->nip", leaves["U"], w).flatten(1)[:, : s.d_out]

        yield Case(
            text, d_in, d_out,
            make=partial(BlastLinear, text, d_in, d_out, False),
            true=true,
            plans=lambda *_: {"batched": True},
        )  # fmt: skip


def _mixtures(d_in: int, d_out: int, tokens: int) -> Iterator[Case]:
    experts, active = 4, 2
    drawn = torch.Generator().manual_seed(1)
    # unequal loads, and an expert that no token chooses
    logits = torch.randn(tokens, experts, generator=drawn) + torch.tensor([1.0, 0.0, -1.0, -1e3])
    best, chosen = logits.topk(active)
    inputs = {"weights": torch.softmax(best.double(), -1)}

    def routing(leaves: Leaves) -> Routing:
        weights = leaves["weights"]
        return Routing(weights, chosen.to(weights.device), logits.to(weights))

    def groupings(structure: Any, device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
        likely = str(choose_mixture_plan(structure, tokens, device, dtype)).partition(" ")[0]
        plans = [MixturePlan(grouping) for grouping in get_args(Grouping)]
        plans.append(MixturePlan("all", _TILE))
        return {str(plan): str(plan).startswith(likely) for plan in plans}

    for name in _MIXTURES:
        text = f"{name}:experts={experts},active={active}"
        structure = MixtureLinear(text, d_in, d_out, device="meta").structure

        def true(leaves: Leaves, structure: Any = structure) -> Tensor:
            y = leaves["x"].new_zeros(tokens, d_out)
            for e in range(experts):
                token, place = (chosen == e).nonzero(as_tuple=True)
                if not len(token):
                    continue
                x = leaves["x"][token]
                if structure.expert.is_dense:
                    u = functional.linear(x, leaves["weight"][e])
                else:
                    u = _two_factors(structure.expert, x, leaves["A"][e], leaves["B"][e])
                y = y.index_add(0, token, leaves["weights"][token, place, None] * u)
            return y

        yield Case(
            text, d_in, d_out,
            make=partial(MixtureLinear, text, d_in, d_out, False),
            true=true,
            plans=partial(groupings, structure),
            inputs=inputs,
            call=lambda layer, leaves: layer(leaves["x"], routing(leaves)),
            idle=("gate",),
        )  # fmt: skip

    hidden = 2 * d_out
    text = f"ffn-moe:experts={experts},active={active}"

    def blocks(leaves: Leaves) -> Tensor:
        y = leaves["x"].new_zeros(tokens, d_in)
        for e in range(experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            h = functional.linear(leaves["x"][token], leaves["mlp_in.weight"][e])
            u = functional.linear(functional.gelu(h), leaves["mlp_out.weight"][e])
            y = y.index_add(0, token, leaves["weights"][token, place, None] * u)
        return y

    def through(layer: nn.Module, leaves: Leaves) -> Tensor:
        assert isinstance(layer, MixtureFFN)
        decided = routing(leaves)
        between = functional.gelu(_rows(layer.mlp_in, leaves["x"], decided, "gather"))
        return _rows(layer.mlp_out, between, decided, "combine")

    first = MixtureFFN.of(text, d_in, hidden, device="meta").mlp_in.structure
    yield Case(
        text, d_in, d_in,
        make=partial(MixtureFFN.of, text, d_in, hidden, False),
        true=blocks,
        plans=partial(groupings, first),
        inputs=inputs,
        call=through,
        idle=("mlp_in.gate",),
    )  # fmt: skip


def _rows(layer: MixtureLinear, x: Tensor, routing: Routing, form: Form) -> Tensor:
    """A mixture of dense experts from, or to, rows that are sorted by expert."""
    inputs = Inputs(x, routing.weights, routing.chosen, layer.weight, None)
    return mix(inputs, layer.out_features, layer.plan, form)


def tables(result: Mapping[str, Any]) -> list[str]:
    """Worst errors of each design in each dtype, over its dimensions and plans."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["design"], row["mode"]), []).append(row)
    lines = []
    for (design, mode), rows in groups.items():
        plans = [plan for row in rows for plan in row["plans"]]
        ran = [plan for plan in plans if "errors" in plan]
        worst = max(ran, key=lambda plan: _number(plan["over_dense"]), default=None)
        lines.append(
            {
                "design": design,
                "mode": mode,
                "plans": len(plans),
                "wrong": sum(
                    not p["fine"] for r in rows for p in r["plans"] if r.get("judged", True)
                ),
                "worst error": _worst([row["worst_error"] for row in rows]),
                "dense": max(max(row["dense_errors"].values()) for row in rows),
                "over dense": None if worst is None else worst["over_dense"],
                "by": "" if worst is None else worst["plan"],
            }
        )
    limits = ", ".join(f"{mode} {limit:g}" for mode, limit in LIMITS.items())
    title = f"Worst ‖got − true‖ / ‖true‖ of outputs and gradients; wrong from × dense: {limits}"
    return [table(title, lines)]


def _worst(values: Iterable[float]) -> float:
    """The greatest, NaN if there is one or none at all."""
    return max(values, key=_number, default=math.nan)


def _number(value: float | str) -> float:
    """A number as JSON has it, where NaN is a text; no error is worse than NaN."""
    number = float(value)
    return math.inf if math.isnan(number) else number
