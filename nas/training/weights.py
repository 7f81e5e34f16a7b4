"""The weights of trained runs: which are kept, as which files, and the models these make again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.layers import load, save
from nas.planning.recipe import stored_recipe
from nas.training.tasks import build_model

#: Metadata of a file that says of which run its weights are, JSON.
_RUN = "einsum_nas_run"


@dataclass
class Keeping:
    """Keeps the weights of runs that reach their last step.

    Parameters
    ----------
    below
        Only of runs whose last loss is lower; None for any loss.
    most_bytes
        Only of models that take no more.
    about
        What a file says of its run, besides seed and loss: at least recipe, design and width, and
        `trials`, the trial of each seed.
    """

    below: float | None
    most_bytes: int
    about: Mapping[str, Any]
    #: seed → the file
    found: dict[int, bytes] = field(default_factory=dict)
    #: seed → why the weights are not kept
    left: dict[int, str] = field(default_factory=dict)

    def wants(self, loss: float) -> bool:
        """Whether the weights of a run with this last loss are to be kept."""
        return self.below is None or loss < self.below

    def take(self, seed: int, loss: float, model: nn.Module | None) -> None:
        """Keep the weights of a run; where that fails, keep why: the run itself has not failed."""
        if model is None:  # another rank has it
            return
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values()
                   if isinstance(t, torch.Tensor))  # fmt: skip
        if size > self.most_bytes:
            self.left[seed] = f"they take {size:,} bytes, more than {self.most_bytes:,}"
            return
        of_run = {**self.about, "seed": seed, "loss": loss}
        of_run["trial_id"] = of_run.pop("trials", {}).get(str(seed))
        about = {_RUN: json.dumps(of_run)}
        try:
            with TemporaryDirectory(prefix="einsum-nas-weights-") as folder:
                file = Path(folder) / "model.safetensors"
                save(model, file, about)
                self.found[seed] = file.read_bytes()
        except (OSError, MemoryError) as error:
            self.left[seed] = f"{type(error).__name__}: {error}"


def run_of(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of a run's weights says of the run: search_id, trial_id, task, fingerprint,
    recipe, design, width, steps, seed, loss (validation, at the last step) and loss_unit.

    Raises
    ------
    InvalidInput
        No such file, or one of other weights.
    """
    import safetensors

    accepted = "a .safetensors file of the weights of a run, as `einsum-nas download` writes it"
    try:
        with safetensors.safe_open(str(file), "pt") as opened:
            about = (opened.metadata() or {}).get(_RUN)
        found: dict[str, Any] = json.loads(about or "")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InvalidInput("file", str(file), f"{accepted} ({error})") from None
    return found


def load_model(file: str | os.PathLike[str]) -> nn.Module:
    """The trained model of a run, in evaluation mode on the CPU.

    Its inputs are those of its task: of token models (n, positions) int64 to logits
    (n, positions, vocabulary), of others (n, ...) float32 to outputs (n, ...).

    Parameters
    ----------
    file
        What `einsum-nas download` or `Client.weights` wrote.

    Raises
    ------
    InvalidInput
        As of `run_of`; the task is a plug-in that is not installed here, or builds another model.
    """
    run = run_of(file)
    recipe, design = stored_recipe(run["recipe"]), parse_design(run["design"])
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe, design, run["width"])
    return load(model, file).eval()
