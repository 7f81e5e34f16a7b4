"""What structured layers make of trained dense weights: `nas.layers.SelfGuided` and others.

A dense transformer learns `text`.  Then every linear layer of its blocks becomes a structured one,
and all ways of going on get the same further train FLOPs, a cosine to zero:

- from scratch: a new model with random structured layers
- projected: from the structured matrices nearest to the dense weights
- self-guided: the same, of which a warm-up takes a share of the FLOPs
- dense: the dense model itself, as the reference

FLOPs are those of matrix products.  A plain step costs three forward passes; one of the warm-up two
dense products a layer more, forward and for the gradient of the input.  The learning rate of each
way and design is the best of one grid on a seed of its own.  Of the other seeds, each with its own
dense model, the mean and the 95% t interval are shown; differences are paired by seed.

    python -m benchmarks.from_dense [--seeds 3] [--processes 1] [--dense-steps 1000]
        [--further 0.1] [--designs NAME …]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import report
from nas.analysis.scaling import Estimate, mean_over_seeds
from nas.layers import SelfGuided, forward_flops, layer_of, param_groups, replace_linears
from nas.planning.recipe import TEXT
from nas.tasks import load_data
from nas.tasks.batches import Draw, Pair, sample_losses, training_batches, validation_set
from nas.training.models import FAMILIES

#: At this width, a square, both take 0.28 of the FLOPs of the dense layers.
DESIGNS = ("btt:rho=1/8", "low-rank:rho=2/3")
#: Shares of the further FLOPs that the warm-up of a self-guided run takes.
WAYS = {"from scratch": 0.0, "projected": 0.0, "self-guided, 1/4": 0.25, "self-guided, 1/2": 0.5}
#: Tuned on the dense model of the recipe's base width.
RATES = tuple(TEXT.lr / 4**k for k in range(3))
WIDTH = 144
_SELECT = "blocks.*"
#: Steps over which the learning rate rises linearly.
_RISE = 30
#: The seed on which learning rates are chosen.
_TUNING = 1000


@dataclass(frozen=True)
class Job:
    """A run that goes on from a dense model."""

    way: str
    #: None for the dense model itself
    design: str | None
    seed: int
    lr: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--dense-steps", type=int, default=1000)
    parser.add_argument("--further", type=float, default=0.1, help="train FLOPs over those before")
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS))
    options = parser.parse_args()
    ways: list[tuple[str, str | None]] = [("dense", None)]
    ways += [(way, design) for design in options.designs for way in WAYS]
    seeds = range(options.seeds)
    with ProcessPoolExecutor(
        options.processes, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        trained = (_TUNING, *seeds)
        dense = dict(
            zip(trained, pool.map(partial(dense_state, options.dense_steps), trained), strict=True)
        )
        budget = options.further * options.dense_steps * step_flops(None)[0]

        def run(jobs: list[Job]) -> list[dict[str, Any]]:
            states = [dense[job.seed] for job in jobs]
            return list(pool.map(partial(go_on, budget), jobs, states))

        grid = run([Job(way, design, _TUNING, lr) for way, design in ways for lr in RATES])
        best = {
            (way, design): min(
                (r for r in grid if (r["way"], r["design"]) == (way, design)),
                key=lambda r: r["loss"],
            )["lr"]
            for way, design in ways
        }
        runs = run([Job(*key, seed, best[key]) for key in ways for seed in seeds])
    title = (
        f"text, width {WIDTH}: {options.dense_steps} dense steps, then {budget:.3g} train FLOPs; "
        f"{options.seeds} seeds"
    )
    details = [{"tuning": r["seed"] == _TUNING} | r for r in (*grid, *runs)]
    report(title, [_shown(row) for row in summary(runs)], details)


def dense_state(steps: int, seed: int) -> dict[str, Tensor]:
    """The `state_dict` of a dense model that has learnt for so many steps."""
    model = _dense_model(seed)
    _train(model, TEXT.lr, steps, seed, None)
    return model.state_dict()


@lru_cache
def step_flops(design: str | None) -> tuple[int, int]:
    """Train FLOPs of a plain step and of one of the warm-up."""
    model, example = _dense_model(0), torch.zeros(TEXT.batch, TEXT.context, dtype=torch.long)
    dense = forward_flops(model, example)
    if design is None:
        return 3 * dense, 3 * dense
    guide = SelfGuided(model, design, _SELECT, steps=1)
    both = forward_flops(model, example)
    guide.step()
    own = forward_flops(model, example)
    return 3 * own, 3 * own + 2 * (both - own)  # W has no gradient


def go_on(budget: float, job: Job, dense: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a job makes of a dense model with so many train FLOPs, and its losses."""
    model, guide = _dense_model(job.seed), None
    plain, guided = step_flops(job.design)
    warm_up = int(WAYS.get(job.way, 0.0) * budget / guided)
    steps = warm_up + int((budget - warm_up * guided) / plain)
    if job.way != "from scratch":
        model.load_state_dict(dense)
    if warm_up:
        assert job.design is not None
        guide = SelfGuided(model, job.design, _SELECT, steps=warm_up)
    elif job.design is not None:
        replace_linears(model, job.design, _SELECT, from_dense=job.way != "from scratch")
    before = _loss(model)
    _train(model, job.lr, steps, job.seed + 1, guide)  # other batches than the dense model saw
    flops = warm_up * guided + (steps - warm_up) * plain
    return vars(job) | {
        "before": before, "loss": _loss(model), "steps": steps, "warm_up": warm_up,
        "train_flops": flops,
    }  # fmt: skip


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each design and way."""
    losses: dict[tuple[str | None, str], dict[int, float]] = {}
    for run in runs:
        losses.setdefault((run["design"], run["way"]), {})[run["seed"]] = run["loss"]
    rows = []
    for (design, way), by_seed in losses.items():
        own = [r for r in runs if (r["design"], r["way"]) == (design, way)]
        plain = losses.get((design, "projected"))
        over = None
        if plain is not None and way != "projected":
            over = {s: loss - plain[s] for s, loss in by_seed.items()}
        rows.append(
            {
                "design": design, "way": way, "lr": own[0]["lr"], "warm_up": own[0]["warm_up"],
                "steps": own[0]["steps"], "train_flops": own[0]["train_flops"],
                "before": mean_over_seeds({r["seed"]: r["before"] for r in own}),
                "loss": mean_over_seeds(by_seed),
                "over_projected": over and mean_over_seeds(over),
            }
        )  # fmt: skip
    return rows


@lru_cache
def _data() -> tuple[Draw, Pair]:
    """Batches of training, and the fixed validation samples."""
    found = load_data(TEXT)
    return (
        training_batches(TEXT, found.train),
        validation_set(TEXT, found.train, found.validation),
    )


def _dense_model(seed: int) -> nn.Module:
    def linear(d_in: int, d_out: int, **options: Any) -> nn.Module:
        layer = layer_of("dense", d_in, d_out, bias=options["bias"], zero_init=options["zero_init"])
        return layer.to_linear()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[TEXT.model](TEXT, WIDTH, linear)


def _train(model: nn.Module, lr: float, steps: int, seed: int, guide: SelfGuided | None) -> None:
    draw, generator = _data()[0], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        param_groups(model, lr, base_width=TEXT.base_width, width=WIDTH),
        betas=(TEXT.beta1, TEXT.beta2), weight_decay=TEXT.weight_decay, fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / _RISE) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    for _ in range(steps):
        inputs, targets = draw(generator)
        loss = sample_losses(TEXT, model(inputs), targets).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), TEXT.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if guide is not None and not guide.ended:
            guide.step()


@torch.no_grad()
def _loss(model: nn.Module) -> float:
    """Validation loss in nats per token."""
    inputs, targets = _data()[1]
    return float(sample_losses(TEXT, model(inputs), targets).mean())


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        if isinstance(value, Estimate):
            interval = value.interval
            return f"{value.value:.4f}" + (
                f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
            )
        if isinstance(value, float):
            return f"{value:.3g}"
        return "–" if value is None else str(value)

    shown = {name: text(value) for name, value in row.items() if name != "train_flops"}
    return shown | {"before": shown["before"].partition(" ")[0]}


if __name__ == "__main__":
    main()
