"""Structured layers against dense, the papers' two products and one compiled einsum.

Contenders on the same tensors, in turns: the layer with the plan that its cost model chooses
(`ours`), every candidate plan, `torch.nn.Linear` (`dense`), the papers' two batched products
(`papers`) and, in rows of their own, one `torch.einsum` through torch.compile (`compiled`), beside
which dense runs again.  Eager seconds include the launches of a Python program; seconds of a CUDA
graph do not.  Nothing flushes caches between calls: at 16,384 tokens of width 1024 an input is
half the second-level cache of an H200.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import LONG, Call, gemm_peak, graphed, passes, peak_bytes, seconds
from benchmarks.gpu.writing import table
from benchmarks.kernels.papers import one_einsum
from benchmarks.kernels.papers import product as papers_product
from nas.designs.einsum import Structure
from nas.layers import EinsumLinear
from nas.layers.kernels.contraction import contract
from nas.layers.kernels.plan import candidates, cost

_THETAS = ("monarch", "btt:rho=1/4", "low-rank:rho=1/2", "tensor-train:rho=1/4")
_WIDTHS, _TOKENS = (1024, 2048, 4096), (16_384, 65_536)
#: Seconds that a row takes at most, compilation included, as a guess before the first.
_ROW_SECONDS, _COMPILED_SECONDS = 3.0, 25.0
#: Expected cost over the least from which on a plan is not measured.
_HOPELESS = 4.0
#: Of the factors and x, in some order, y.
Path = Callable[[Tensor, Tensor, Tensor], Tensor]
#: FLOPs of a pass over those of forward.
_WORK = {"forward": 1, "forward+backward": 3}


def run(part: Part) -> None:
    widths, tokens = ((64,), (256,)) if part.toy else (_WIDTHS, _TOKENS)
    dtype = torch.bfloat16 if part.on_gpu else torch.float32
    part.set("gemm", gemm_peak(part.device, dtype, part.toy))
    cases = list(itertools.product(tokens, widths, _THETAS[:2] if part.toy else _THETAS))
    for measure, guess in ((_plain_rows, _ROW_SECONDS), (_compiled_rows, _COMPILED_SECONDS)):
        one = part.toy and measure is _compiled_rows  # which loads much to compile little
        for count, width, theta in cases[:1] if one else cases:
            what = f"{measure.__name__.strip('_')}: {theta}, width {width}, {count} tokens"
            if not part.has_time(what, 0.0 if part.toy else guess):
                continue
            before = part.left
            try:
                for row in measure(part, theta, width, count, dtype):
                    part.add(row)
            except Exception:
                part.error(what)
            finally:
                if part.on_gpu:
                    torch.cuda.empty_cache()
            guess = max(1.0, before - part.left)


def _plain_rows(
    part: Part, theta: str, width: int, tokens: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows of the contenders that compile nothing."""
    layer, dense, x, dy = _tensors(part, theta, width, tokens, dtype)
    s = layer.structure
    chosen = str(layer.plan_for(tokens))
    calls: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "ours": (layer, [layer.A, layer.B]),
        "dense": (dense, [dense.weight]),
        "papers": (partial(_padded(s, papers_product), layer.A, layer.B), [layer.A, layer.B]),
    }
    every = candidates(s, tokens, part.device, dtype)
    costs = {str(plan): cost(plan, s, tokens) for plan in every}
    # as `EinsumLinear.measure_plan`, but never without the materialised one
    hopeless = [
        plan for plan, expected in costs.items()
        if expected > _HOPELESS * min(costs.values()) and not plan.startswith("materialised")
    ]  # fmt: skip
    plans = [plan for plan in costs if plan not in hopeless]
    for plan in plans:
        planned = EinsumLinear(s, width, width, False, plan=plan, device="meta")
        fixed = partial(_planned, layer, planned.plan)
        calls[plan] = (fixed, [layer.A, layer.B])
    check_alike(part, theta, {n: f for n, (f, _) in calls.items() if n != "dense"}, x)
    rows = _rows(part, theta, s, tokens, dtype, calls, x, dy)
    for row in rows:
        found = {plan: row["seconds"][plan]["seconds"] for plan in plans if plan in row["seconds"]}
        row |= {"plan": chosen, "plans": plans, "hopeless_plans": hopeless}
        if found:
            best = min(found, key=lambda plan: found[plan])
            row |= {"best_plan": best}
            if chosen in found:
                row |= {"chosen_over_best": found[chosen] / found[best]}
    return rows


def _compiled_rows(
    part: Part, theta: str, width: int, tokens: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows of one `torch.einsum` through torch.compile, and of dense."""
    layer, dense, x, dy = _tensors(part, theta, width, tokens, dtype)
    backend = "inductor" if part.on_gpu else "aot_eager"
    torch.compiler.reset()
    whole = _padded(layer.structure, one_einsum)
    compiled = torch.compile(whole, backend=backend, dynamic=False, fullgraph=True)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "compiled": (lambda x: compiled(layer.A, layer.B, x), [layer.A, layer.B]),
        "dense": (dense, [dense.weight]),
    }
    # of all tokens, for it is compiled for their number
    check_alike(part, theta, {"ours": layer, "compiled": calls["compiled"][0]}, x, tokens)
    rows = _rows(part, theta, layer.structure, tokens, dtype, calls, x, dy)
    return [row | {"backend": backend} for row in rows]


def _tensors(
    part: Part, theta: str, width: int, tokens: int, dtype: torch.dtype
) -> tuple[EinsumLinear, nn.Linear, Tensor, Tensor]:
    """The layer, dense, x that wants its gradient, and the gradient of y."""
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": part.device, "dtype": dtype}
    layer = EinsumLinear(theta, width, width, False, **where)
    dense = nn.Linear(width, width, False, **where)
    x, dy = (torch.randn(tokens, width, **where) for _ in range(2))
    return layer, dense, x.requires_grad_(), dy


def _padded(s: Structure, path: Path) -> Path:
    """The product of (A, B, x) by a path that knows neither padding nor surplus outputs."""
    padding, d_out = s.padded_in - s.d_in, s.d_out

    def product(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return path(functional.pad(x, (0, padding)) if padding else x, a, b)[:, :d_out]

    return product


def _planned(layer: EinsumLinear, plan: Any, x: Tensor) -> Tensor:
    return contract(x, layer.A, layer.B, layer.out_features, plan)


def _rows(
    part: Part,
    theta: str,
    s: Structure,
    tokens: int,
    dtype: torch.dtype,
    calls: Mapping[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]],
    x: Tensor,
    dy: Tensor,
) -> list[dict[str, Any]]:
    """One row for each pass, eager and as a graph."""
    both = {name: passes(function, x, dy, leaves) for name, (function, leaves) in calls.items()}
    rows = []
    for label, work in _WORK.items():
        contenders, troubles, peaks = runnable(
            part, {name: found[label] for name, found in both.items()}
        )
        times = {"eager": seconds(contenders, part.device, part.toy)}
        if part.on_gpu:
            graphs = captured(part, f"{theta} {label}", contenders, times["eager"], troubles)
            times["graph"] = seconds(graphs, part.device, part.toy)
            del graphs
        for way, timed in times.items():
            row: dict[str, Any] = {
                "theta": theta,
                "width": s.d_in,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": label,
                "way": way,
                "flops": work * s.flops * tokens,
                "dense_flops": work * 2 * s.d_in * s.d_out * tokens,
                "seconds": timed,
                "peak_bytes": peaks,
                "troubles": troubles,
            }
            rows.append(row)
    return rows


def captured(
    part: Part,
    what: str,
    calls: Mapping[str, Call],
    eager: Mapping[str, Mapping[str, float]],
    troubles: dict[str, str],
) -> dict[str, Call]:
    """The calls as CUDA graphs; why there is none of others goes into `troubles`."""
    graphs = {}
    for name, call in calls.items():
        if eager[name]["seconds"] > LONG:
            troubles[f"{name} as a graph"] = f"a call takes over {LONG:g} s"
            continue
        try:
            graphs[name] = graphed(call)
        except Exception:
            troubles[f"{name} as a graph"] = part.error(f"{what} {name}: graph")
    return graphs


def check_alike(
    part: Part,
    what: str,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    tokens: int = 64,
) -> None:
    """Whether contenders compute what the first of them computes, of some tokens."""
    with torch.no_grad():
        some = x if tokens == len(x) else x[:tokens]
        found = {name: function(some).double() for name, function in functions.items()}
    first, *_ = found.values()
    for name, y in found.items():
        error = (torch.linalg.norm(y - first) / torch.linalg.norm(first)).item()
        if not error <= (3e-2 if x.dtype == torch.bfloat16 else 1e-4):
            part.wrong(f"{what}: {name} differs from {next(iter(found))} by {error:.2g}")


def runnable(
    part: Part, calls: Mapping[str, Call]
) -> tuple[dict[str, Call], dict[str, str], dict[str, int | None]]:
    """The calls that run, why others do not, and the memory of each that does, bytes."""
    able, troubles, peaks = {}, {}, {}
    for name, call in calls.items():
        try:
            call()
            peaks[name] = peak_bytes(call, part.device)
        except torch.OutOfMemoryError:
            troubles[name] = "out of memory"
            torch.cuda.empty_cache()
        except Exception:
            troubles[name] = part.error(name)
        else:
            able[name] = call
    return able, troubles, peaks


def tables(result: Mapping[str, Any]) -> list[str]:
    """Ratios of medians; shares of the speed of a large matrix product."""
    peak = result["gemm"]["flops_per_second"]
    compiled = {_key(row): row for row in result["rows"] if "backend" in row}
    lines = []
    for row in (row for row in result["rows"] if "backend" not in row):
        at = {name: found["seconds"] for name, found in row["seconds"].items()}
        beside = compiled.get(_key(row), {"seconds": {}})["seconds"]
        ours, best = at.get("ours"), at.get(row.get("best_plan"))
        lines.append(
            {
                "theta": row["theta"],
                "width": row["width"],
                "tokens": row["tokens"],
                "pass": row["pass"],
                "way": row["way"],
                "FLOPs/dense": row["flops"] / row["dense_flops"],
                "ours ms": None if ours is None else 1e3 * ours,
                "ours/dense": _ratio(ours, at.get("dense")),
                "best/dense": _ratio(best, at.get("dense")),
                "chosen/best": row.get("chosen_over_best"),
                "papers/ours": _ratio(at.get("papers"), ours),
                "compiled/dense": _ratio(
                    *(beside.get(name, {}).get("seconds") for name in ("compiled", "dense"))
                ),
                "ours of peak": _ratio(row["flops"] / peak, ours),
                "dense of peak": _ratio(row["dense_flops"] / peak, at.get("dense")),
                "best plan": str(row.get("best_plan")).split(" first")[0],
            }
        )
    title = f"Square layers, {result['gemm']['dtype']}; peak: {peak / 1e12:.3g} TFLOP/s, measured"
    return [table(title, lines)]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("theta", "width", "tokens", "pass", "way"))


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other
