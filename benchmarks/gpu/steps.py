"""Training steps of the text recipe at published batches, against a plain GPT of the same shape.

`plain` is `benchmarks.gpu.plain`, which repeats a step on one batch.  The others are runs of
`nas.training` at a fixed number of steps: seconds of a step as its meter counts them, and as the
curve tells them, with drawing and moving the batch.  Shares of the peak are those of the exact
FLOPs of `nas.planning.cost`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Part
from benchmarks.gpu.plain import GPT, training_step
from benchmarks.gpu.timing import gemm_peak, graphed, peak_bytes, seconds
from benchmarks.gpu.writing import table
from nas.designs.design import parse_design
from nas.errors import RunFailed
from nas.planning.cost import train_flops_per_step
from nas.planning.recipe import TEXT_PAPER, TextRecipe, with_overrides
from nas.planning.runs import plan_of_steps
from nas.tasks import TaskData, load_data
from nas.tasks.corpus import default_folder
from nas.training.metering import CostMeter
from nas.training.run import Execution, Point, execution_plans, train_replicates

_WIDTHS, _DESIGNS = (256, 512, 768, 1024), ("dense", "monarch", "btt:rho=1/4", "btt-moe")
#: Steps of a run; the meter counts from the 6th to the 25th on a GPU.
_STEPS = 60
_ROW_SECONDS = 10.0


def run(part: Part) -> None:
    dtype = torch.bfloat16 if part.on_gpu else torch.float32
    part.set("gemm", gemm_peak(part.device, dtype, part.toy))
    recipe, data = text_data(
        part, warmup_steps=8, min_steps=16, evaluations=2, validation_samples=64
    )
    part.set("recipe", recipe.as_dict())
    kinds = executions(part)
    guess = 0.0 if part.toy else _ROW_SECONDS
    for width in (32,) if part.toy else _WIDTHS:
        if part.has_time(f"plain, width {width}", guess):
            try:
                _plain(part, recipe, width)
            except Exception:
                part.error(f"plain, width {width}")
        for text, (way, execution) in itertools.product(_DESIGNS, kinds.items()):
            what = f"{text}, width {width}, {way}"
            if part.has_time(what, guess):
                before = part.left
                try:
                    part.add(_trained(part, recipe, data, text, width, way, execution))
                except Exception:
                    part.error(what)
                guess = 0.0 if part.toy else max(2.0, before - part.left)
        if part.on_gpu:
            torch.cuda.empty_cache()


def text_data(part: Part, **overrides: Any) -> tuple[TextRecipe, TaskData]:
    """The paper's recipe of characters with some settings, and the default text.

    On a CPU small models and a part of the text.
    """
    toy: dict[str, Any] = {
        "context": 16, "batch": 4, "head_dim": 16, "base_width": 32, "min_width": 16,
        "max_width": 64, "warmup_steps": 4, "min_steps": 16, "validation_samples": 32, "depth": 1,
    }  # fmt: skip
    recipe = with_overrides(TEXT_PAPER, overrides | (toy if part.toy else {}))
    folder: Path | None = default_folder() / "json" if part.toy else None
    data = load_data(recipe, folder)
    part.note(f"Text: {data.summary}; fingerprint {data.fingerprint}.")
    assert isinstance(data.recipe, TextRecipe)
    return data.recipe, data


def executions(part: Part) -> dict[str, Execution]:
    """How runs execute: eager, and with CUDA graphs where this version has them; not compiled."""
    known = {field.name for field in fields(Execution)}

    def execution(**settings: bool) -> Execution:
        own = {name: value for name, value in settings.items() if name in known}
        changed: Execution = replace(Execution.on(str(part.device)), **own)  # type: ignore[arg-type]
        return changed

    found = {"eager": execution(compile=False, graphs=False)}
    if "graphs" in known and part.on_gpu:
        found["graph"] = execution(compile=False, graphs=True)
    elif part.on_gpu:
        part.skip("runs of nas.training as CUDA graphs", "this version of it has none")
    return found


def _plain(part: Part, recipe: TextRecipe, width: int) -> None:
    """Rows of the plain model, eager and as a graph."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated(part.device) if part.on_gpu else 0
    heads = width // recipe.head_dim
    model = GPT(width, recipe.depth, heads, recipe.context, recipe.vocabulary).to(part.device)
    shape = (recipe.batch, recipe.context + 1)
    ids = torch.randint(recipe.vocabulary, shape, device=part.device)
    step = training_step(model, ids, bf16=part.on_gpu)
    step()
    extra = peak_bytes(step, part.device)
    peak = None if extra is None else extra + torch.cuda.memory_allocated(part.device) - before
    flops = train_flops_per_step(recipe, parse_design("dense"), width)
    ways = {"eager": step}
    if part.on_gpu:
        try:
            ways["graph"] = graphed(step)  # type: ignore[assignment]
        except Exception:
            part.error(f"plain, width {width}: graph")
    for way, call in ways.items():
        found = seconds({"step": call}, part.device, part.toy)["step"]
        row = {"model": "plain", "width": width, "way": way, "train_flops_per_step": flops}
        row |= {"seconds_per_step": found["seconds"], "timing": found, "peak_bytes": peak}
        part.add(row | {"loss": float(step())})


def _trained(
    part: Part,
    recipe: TextRecipe,
    data: TaskData,
    text: str,
    width: int,
    way: str,
    execution: Execution,
) -> dict[str, Any]:
    """A row of a design: a run of some steps."""
    plan = plan_of_steps(recipe, parse_design(text), width, 16 if part.toy else _STEPS)
    meter = CostMeter(str(part.device))
    points: list[Point] = []
    steps = train_replicates(plan, recipe, data.train, data.validation, [0], execution, meter=meter)
    for found in steps:
        if isinstance(outcome := found[0], RunFailed):
            raise outcome
        points.append(outcome)
    cost = meter.result()
    row: dict[str, Any] = {
        "model": text,
        "width": width,
        "way": way,
        "train_flops_per_step": plan.train_flops_per_step,
        "seconds_per_step": cost.seconds_per_step,
        "peak_bytes": cost.peak_memory_bytes,
        "loss": points[-1].loss,
        "plans": execution_plans(plan, recipe, execution),
    }
    if len(points) > 1:
        first, last = points[-2:]
        row |= {
            "seconds_per_step_with_data": (last.seconds - first.seconds) / (last.step - first.step)
        }
    return row


def tables(result: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a step beside those of the plain model of the same width and way."""
    peak = result["gemm"]["flops_per_second"]
    plain = {
        (row["width"], row["way"]): row["seconds_per_step"]
        for row in result["rows"]
        if row["model"] == "plain"
    }
    lines = []
    for row in result["rows"]:
        with_data = row.get("seconds_per_step_with_data")
        step = row["seconds_per_step"] or with_data
        base = plain.get((row["width"], row["way"]))
        lines.append(
            {
                "model": row["model"],
                "width": row["width"],
                "way": row["way"],
                "ms a step": None if step is None else 1e3 * step,
                "with data": None if with_data is None else 1e3 * with_data,
                "over plain": step / base if step and base else None,
                "of peak": row["train_flops_per_step"] / peak / step if step else None,
                "GFLOPs": row["train_flops_per_step"] / 1e9,
                "peak GB": None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9,
            }
        )
    tokens = result["recipe"]["batch"] * result["recipe"]["context"]
    title = f"Training steps of {tokens} tokens, text, depth {result['recipe']['depth']}"
    return [table(title, lines)]
