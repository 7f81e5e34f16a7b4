"""Mixtures of experts: every grouping against computing all experts, and against dense.

`naive` computes every expert on every token by plain operations of torch and gates the results;
``grouping=all`` does the same by this package's kernels.  The gate is drawn at random, so that
loads differ.  Groupings whose loads the host has to know are not measured as CUDA graphs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.layers import captured, check_alike, runnable
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import gemm_peak, passes, seconds
from benchmarks.gpu.writing import table
from nas.designs.einsum import Sizes
from nas.layers import MixtureFFN, MixtureLinear, router_statistics
from nas.layers.kernels.mixture_plan import Grouping, MixturePlan, choose_mixture_plan
from nas.layers.kernels.plan import tile_of
from nas.layers.routing import Routing, route

_MIXTURES = (
    "btt-moe:experts=8,active=2", "ffn-moe:experts=8,active=2", "btt-moe:experts=16,active=2",
    "ffn-moe:experts=16,active=2",
)  # fmt: skip
_WIDTHS, _TOKENS = (1024, 2048), 16_384
#: Hidden width of a feed-forward block over its width.
_RATIO = 4
#: What a graph cannot hold: the host learns the loads.
_WAITING = ("grouping=experts", "grouping=batched")
_ROW_SECONDS = 5.0
_WORK = {"forward": 1, "forward+backward": 3}


def run(part: Part) -> None:
    dtype = torch.bfloat16 if part.on_gpu else torch.float32
    part.set("gemm", gemm_peak(part.device, dtype, part.toy))
    mixtures = tuple(m.replace("8", "4") for m in _MIXTURES[:2]) if part.toy else _MIXTURES
    guess = _ROW_SECONDS
    for width, text in itertools.product((64,) if part.toy else _WIDTHS, mixtures):
        what = f"{text}, width {width}"
        if not part.has_time(what, 0.0 if part.toy else guess):
            continue
        before = part.left
        try:
            for row in _measured(part, text, width, 256 if part.toy else _TOKENS, dtype):
                part.add(row)
        except Exception:
            part.error(what)
        finally:
            if part.on_gpu:
                torch.cuda.empty_cache()
        guess = max(1.0, before - part.left)


def _measured(
    part: Part, text: str, width: int, tokens: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows of one mixture: a square layer, or a feed-forward block."""
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": part.device, "dtype": dtype}
    hidden = _RATIO * width
    ours: nn.Module
    if text.startswith("ffn"):
        block = MixtureFFN.of(text, width, hidden, False, **where)
        gate, layers, ours = block.mlp_in.gate, [block.mlp_in, block.mlp_out], block
        dense: nn.Module = nn.Sequential(
            nn.Linear(width, hidden, False, **where),
            nn.GELU(),
            nn.Linear(hidden, width, False, **where),
        )
        dense_flops = 4 * width * hidden * tokens
    else:
        layer = MixtureLinear(text, width, width, False, **where)
        gate, layers, ours = layer.gate, [layer], layer
        dense = nn.Linear(width, width, False, **where)
        dense_flops = 2 * width * width * tokens
    assert gate is not None
    nn.init.normal_(gate, std=width**-0.5)
    ours.eval()  # without the auxiliary loss, which every grouping would have
    x, dy = (torch.randn(tokens, width, **where) for _ in range(2))
    x.requires_grad_()
    structure = layers[0].structure
    chosen = str(choose_mixture_plan(structure, tokens, part.device, dtype))
    functions: dict[str, Callable[[Tensor], Tensor]] = {"ours": ours}
    for plan in _plans(structure, part.device, dtype, tokens, alone=len(layers) == 1):
        planned = copy.copy(ours)  # of the same parameters
        if isinstance(planned, MixtureLinear):
            planned.plan = plan
        else:
            planned = MixtureFFN(*(copy.copy(layer) for layer in layers))
            planned.mlp_in.plan = planned.mlp_out.plan = plan
        functions[str(plan)] = planned
    functions["naive"] = partial(_naive, layers)
    parameters = list(ours.parameters())
    contenders = {name: (function, parameters) for name, function in functions.items()}
    contenders["dense"] = dense, list(dense.parameters())
    check_alike(part, text, functions, x)
    both = {n: passes(function, x, dy, leaves) for n, (function, leaves) in contenders.items()}
    flops = sum(layer.structure.flops for layer in layers) * tokens
    rows = []
    for label, work in _WORK.items():
        able, troubles, peaks = runnable(part, {n: found[label] for n, found in both.items()})
        times = {"eager": seconds(able, part.device, part.toy)}
        if part.on_gpu:
            waiting = [n for n in able if (chosen if n == "ours" else n).startswith(_WAITING)]
            troubles |= {f"{n} as a graph": "the host has to know the loads" for n in waiting}
            calls = {n: call for n, call in able.items() if n not in waiting}
            graphs = captured(part, f"{text} {label}", calls, times["eager"], troubles)
            times["graph"] = seconds(graphs, part.device, part.toy)
            del graphs
        for way, timed in times.items():
            row = {
                "mixture": text,
                "width": width,
                "hidden": hidden if len(layers) == 2 else None,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": label,
                "way": way,
                "plan": chosen,
                "max_load": max(s["max_load"] for s in router_statistics(ours).values()),
                "flops": work * flops,
                "dense_flops": work * dense_flops,
                "seconds": timed,
                "peak_bytes": peaks,
                "troubles": troubles,
            }
            rows.append(row)
    return rows


def _plans(
    structure: Any, device: torch.device, dtype: torch.dtype, tokens: int, alone: bool
) -> list[MixturePlan]:
    """Every grouping; all at once only of layers that stand alone, as it runs them only."""
    plans = [MixturePlan(grouping) for grouping in get_args(Grouping) if grouping != "all"]
    if not alone:
        return [plan for plan in plans if plan.grouping != "matrices"]  # dense: as grouped
    s = structure.expert.sizes
    wide = Sizes(s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, s.rho * structure.experts)
    tile = tile_of(wide, device, dtype)
    return [*plans, MixturePlan("all"), *([MixturePlan("all", tile)] if tile < tokens else [])]


def _naive(layers: list[MixtureLinear], x: Tensor) -> Tensor:
    """Every expert on every token, by einsums of torch."""
    first, last = layers[0], layers[-1]
    assert first.gate is not None
    routing = route(x, first.gate, first.structure.active)
    gates = _gates(routing).to(x.dtype)
    if len(layers) == 2:
        hidden = functional.gelu(torch.einsum("ni,eoi->eno", x, first.weight))
        return torch.einsum("eni,eoi,ne->no", hidden, last.weight, gates)
    e = first.structure.expert
    s = e.sizes
    cube = functional.pad(x, (0, e.padded_in - e.d_in)).view(-1, s.gamma, s.beta, s.alpha)
    z = torch.einsum("ngba,egrfda->negbrfd", cube, first.A)
    y = torch.einsum("negbrfd,efgrbs->nefsd", z, first.B)
    return torch.einsum("nefsd,ne->nfsd", y, gates).flatten(1)[:, : e.d_out]


def _gates(routing: Routing) -> Tensor:
    """The weight of each expert (n, E), 0 for those that are not chosen."""
    zeros = torch.zeros_like(routing.logits)
    return zeros.scatter(-1, routing.chosen, routing.weights.to(zeros.dtype))


def tables(result: Mapping[str, Any]) -> list[str]:
    """Milliseconds of every grouping, and ratios of medians."""
    peak = result["gemm"]["flops_per_second"]
    lines = []
    for row in result["rows"]:
        at = {name: 1e3 * found["seconds"] for name, found in row["seconds"].items()}
        groupings = {}
        for grouping in get_args(Grouping):
            times = [t for name, t in at.items() if name.startswith(f"grouping={grouping}")]
            groupings[grouping] = min(times, default=None)
        naive, ours = at.get("naive"), at.get("ours")
        lines.append(
            {
                "mixture": row["mixture"],
                "width": row["width"],
                "pass": row["pass"],
                "way": row["way"],
                **groupings,
                "naive": naive,
                "dense": at.get("dense"),
                "ours": ours,
                "naive/ours": None if naive is None or ours is None else naive / ours,
                "ours of peak": None if ours is None else 1e3 * row["flops"] / peak / ours,
                "plan": row["plan"].split()[0].removeprefix("grouping="),
            }
        )
    tokens = {row["tokens"] for row in result["rows"]}
    title = f"Mixtures, ms for {', '.join(map(str, tokens))} tokens, {result['gemm']['dtype']}"
    return [table(title, lines)]
