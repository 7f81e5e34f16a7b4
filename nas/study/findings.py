"""What the papers found, beside what is found here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nas.analysis.scaling import HULL_TOLERANCE, common_mean, mean_over_seeds, ratio_over_seeds
from nas.designs.theta import DENSE, SUM_TOLERANCE, Theta
from nas.study.task import Task
from nas.study.wording import REFERENCE, estimate, plain, verdict_of, verdict_text

Json = dict[str, Any]

#: Two losses this close, as a share, are "about as good": what counts as on the frontier too.
EQUIVALENCE = HULL_TOLERANCE
#: Task → start of a structure's name → exponent b in the papers.  regression: arXiv:2410.02117,
#: the slope from loss .0142 to .00295 over 8e12 to 8e15 forward MACs × tokens; images: CIFAR-10
#: train error of MLPs, arXiv:2406.06248, read off a bar chart.
PAPER_EXPONENTS: Mapping[str, Mapping[str, float]] = {
    "regression": {"dense": 0.23, "kronecker": 0.17},
    "images": {
        "dense": 0.104, "btt": 0.119, "monarch": 0.095, "low-rank": 0.095, "kronecker": 0.037,
        "tensor-train": 0.050,
    },
}  # fmt: skip
#: Most forward MACs per sample of the models whose order on regression is compared.
ORDER_MACS = 173_312
#: The papers' layers at up to `ORDER_MACS`, each trained once (1,500 steps of 1,024, cosine):
#: θ → test MSE.
_ORDER: Mapping[tuple[float, ...], float] = {
    (1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0): 0.0375,
    (2 / 3, 0, 1 / 3, 0, 1 / 3, 2 / 3, 0): 0.0400,
    (1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 0): 0.0428,
    DENSE.values: 0.0460,
    (1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0): 0.0572,
    (1, 0, 0, 0, 1, 0, 1 / 2): 0.0739,
}


def findings_of(tasks: Mapping[str, Task]) -> list[Json]:
    rows = []
    for group in ("ω > 0", "ω = 0, ψ < 1"):
        for name, task in tasks.items():
            if task.budget is not None:
                paper, ratio = f"{group} is worse than {REFERENCE}", task.compared_group(group)["C"]
                here, agreement = verdict_text(ratio, REFERENCE), _agreement(ratio, "worse")
                rows.append(_finding(paper, "2410.02117", name, here, agreement))
    rows += [row for name, task in tasks.items() for row in _against_dense(name, task)]
    rows += _slopes(tasks.get("regression"))
    rows += _order(tasks.get("regression"))
    return rows


def _finding(paper: str, cites: str, task: str, here: str, agreement: str) -> Json:
    """agreement: agrees | partly | differs | contradicts | undecided | not run."""
    return {"paper": paper, "cites": f"arXiv:{cites}", "task": task, "here": here,
            "agreement": agreement}  # fmt: skip


def _against_dense(name: str, task: Task) -> Iterator[Json]:
    """The structured members of the reference group together, against dense."""
    if name not in ("text", "regression", "images"):
        return
    paper = f"structures of {REFERENCE} are {{}} dense per FLOP"
    paper = paper.format("about as good as" if name == "text" else "better than")
    cites = "2410.02117" if name != "images" else "2406.06248"
    ratio = None
    if task.dense is not None and task.budget is not None:
        budget = task.budget
        others = [s for s in task.members(REFERENCE) if s is not task.dense]
        mean, _ = common_mean([s.log_losses(budget) for s in others])
        ratio = estimate(ratio_over_seeds(mean, task.dense.log_losses(budget)))
    if name == "text":
        agreement = _equivalent(ratio)
        paper += f" (here: loss within {EQUIVALENCE:.0%})"
    else:
        agreement = _agreement(ratio, "better")
    yield _finding(paper, cites, name, verdict_text(ratio, "dense"), agreement)


def _agreement(ratio: Mapping[str, Any] | None, expected: str) -> str:
    """Of a verdict with the one that the papers have, worse or better."""
    verdict = verdict_of(ratio)
    if verdict == expected:
        return "agrees"
    return "contradicts" if verdict in ("worse", "better") else "undecided"


def _equivalent(ratio: Mapping[str, Any] | None) -> str:
    """Whether the whole interval lies within the margin of 1, or outside of it."""
    if ratio is None or ratio["interval"] is None:
        return "undecided"
    low, high = ratio["interval"]
    if low >= 1 / (1 + EQUIVALENCE) and high <= 1 + EQUIVALENCE:
        return "agrees"
    return "differs" if low > 1 + EQUIVALENCE or high < 1 / (1 + EQUIVALENCE) else "undecided"


def _slopes(task: Task | None) -> Iterator[Json]:
    paper = "loss falls faster with compute for dense (b ≈ .23) than for Kronecker (b ≈ .17)"
    if task is None:
        yield _finding(paper, "2410.02117", "regression", "—", "not run")
        return
    dense, kronecker = (
        next((task.exponents(s)[0] for s in task.structures if s.name.startswith(name)), {})
        for name in ("dense", "kronecker")
    )
    common = sorted(dense.keys() & kronecker.keys())
    if not common:
        yield _finding(paper, "2410.02117", "regression", "no seed has both exponents", "undecided")
        return
    less = estimate(mean_over_seeds({k: dense[k] - kronecker[k] for k in common}))
    assert less is not None
    both = [estimate(mean_over_seeds(b)) for b in (dense, kronecker)]
    here = (
        f"dense b = {plain(both[0])}, Kronecker b = {plain(both[1])}, difference {plain(less)}; "
        "the papers' runs have 5e13 to 5e16 train FLOPs, so only the order is compared"
    )
    low, high = less["interval"] or (0.0, 0.0)
    yield _finding(
        paper, "2410.02117", "regression", here,
        "agrees" if low > 0 else "contradicts" if high < 0 else "undecided",
    )  # fmt: skip


def _order(task: Task | None) -> Iterator[Json]:
    """The order of structures among models of at most `ORDER_MACS` forward MACs per sample."""
    cites = "2410.02117, layers of its public code, each trained once"
    paper = f"order of losses at {ORDER_MACS // 1000}k forward MACs: "
    if task is None or task.budget is None:
        yield _finding(paper, cites, "regression", "—", "not run")
        return
    found: list[tuple[float, float, str, dict[int, float]]] = []
    for s in task.structures:
        known = next((mse for t, mse in _ORDER.items() if _close(s.theta, t)), None)
        logs = s.log_losses(task.budget, ORDER_MACS)
        if known is not None and logs:
            found.append((mean_over_seeds(logs).value, known, s.name, logs))
    found.sort(key=lambda row: row[1])
    paper += " < ".join(f"{name} {known:.4f}" for _, known, name, _ in found)
    if len(found) < 2:
        here, agreement = "fewer than two of these structures have such models", "not run"
    else:
        here = " < ".join(f"{name} {math.exp(mean):.4f}" for mean, _, name, _ in sorted(found))
        verdicts = [
            verdict_of(estimate(ratio_over_seeds(b[3], a[3])))
            for i, a in enumerate(found)
            for b in found[i + 1 :]
        ]
        count = Counter(verdicts)
        here += (
            f"; of {len(verdicts)} pairs {count['worse']} are in this order at 95%, "
            f"{count['better']} in the opposite one"
        )
        agreement = _order_agreement(count["worse"], count["better"], len(verdicts))
    yield _finding(paper, cites, "regression", here, agreement)


def _order_agreement(kept: int, turned: int, pairs: int) -> str:
    """From the pairs that are in the papers' order, and in the opposite one, at 95%."""
    if kept == pairs:
        return "agrees"
    if turned and not kept:
        return "contradicts"
    return "partly" if turned or 2 * kept >= pairs else "undecided"


def _close(theta: Theta, values: Sequence[float]) -> bool:
    return np.allclose(theta.values, Theta.of(values).canonical().values, atol=SUM_TOLERANCE)
