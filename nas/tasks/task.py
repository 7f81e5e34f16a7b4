"""What a task is: data, a model whose linear layers a search chooses, and a loss.

The built-in tasks are of this kind, and so is one that a plug-in adds.  A plug-in's class is named
by an entry point in the group ``einsum_nas.tasks``, or stands in a file that the setting
`task_modules` or the option `--task-module` names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from nas.planning.recipe import Recipe
from nas.tasks.data import Arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nas.tasks.batches import Draw, Pair

#: Training and validation arrays.
Splits = tuple[Arrays, Arrays]


class LinearFactory(Protocol):
    """Makes the linear layers of a model, each in the structure that a search has chosen."""

    def __call__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = True,
        zero_init: bool = False,
        heads: int | None = None,
        side: Literal["in", "out"] = "out",
    ) -> nn.Module:
        """A layer (..., d_in) → (..., d_out), in place of `torch.nn.Linear`.

        Parameters
        ----------
        zero_init
            Begin as the zero map, as the last layer of a residual branch may.
        heads, side
            Of a projection of attention: how many heads it makes ("out") or reads ("in").
        """
        ...


class Task(ABC):
    """A task that searches can name.

    Everything a run draws must come from the generators it is given, or from torch's own: runs are
    repeated by their seeds.  The samples of the two splits must be the same each time.
    """

    #: lower-case letters, digits and hyphens; over REST and on the command line it is `task`
    name: ClassVar[str]
    #: of `loss`, such as "nats per token"
    loss_unit: ClassVar[str]
    #: raise it when the same settings would train otherwise: runs are compared within one version
    version: ClassVar[str] = "1"
    #: name of a recipe → its settings, those of `nas.planning.recipe.PluginRecipe` that are not its
    #: defaults; `lr`, `batch`, `min_steps` and `max_steps` at least.  The first is the default.
    #: Models have widths from `min_width` to `max_width`, multiples of `head_dim`, and `lr` is for
    #: `base_width`.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]]

    @abstractmethod
    def load(self, recipe: Recipe, data: str | None) -> Splits:
        """Arrays by name of the training and the validation split.

        Parameters
        ----------
        data
            Path that the search names, or None for the task's default.

        Raises
        ------
        InvalidInput
            The data cannot be used.
        """

    @abstractmethod
    def model(self, recipe: Recipe, width: int, linear: LinearFactory) -> nn.Module:
        """A freshly initialised model, which maps the inputs of a batch to its outputs.

        The layers that a search is to choose are made by `linear`, the same ones in the same order
        at every width; all others stay as they are.  FLOPs must grow with the width, and with the
        batch in proportion.
        """

    @abstractmethod
    def loss(self, recipe: Recipe, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each sample (samples,), of which training minimises the mean."""

    def batch(
        self,
        recipe: Recipe,
        split: Mapping[str, Tensor],
        chosen: Tensor,
        generator: torch.Generator | None,
    ) -> Pair:
        """Inputs and targets of some samples of a split, one tensor each, samples first.

        By default rows of the arrays ``inputs`` and ``targets``.

        Parameters
        ----------
        chosen
            Numbers of samples, below `samples`.
        generator
            For augmentation; None for validation, which has none.
        """
        return split["inputs"][chosen], split["targets"][chosen]

    def samples(self, recipe: Recipe, split: Mapping[str, Tensor]) -> int:
        """The number of samples of a split; by default that of rows of its first array."""
        return len(next(iter(split.values())))

    def example(self, recipe: Recipe, count: int) -> Tensor:
        """Inputs of so many samples, of which only shapes and types count.

        By default from the task's default data; a task without any has to say it itself.
        """
        import torch

        train, _ = self.load(recipe, None)
        split = {name: torch.from_numpy(array) for name, array in train.items()}
        rows = torch.arange(count) % self.samples(recipe, split)
        return self.batch(recipe, split, rows, None)[0]

    # --- what training asks for

    def batches(self, recipe: Recipe, train: Arrays, device: torch.device | None) -> Draw:
        """What draws the batches of a run: `recipe.batch` samples, with replacement."""
        import torch

        split = {name: torch.from_numpy(array).to(device) for name, array in train.items()}
        count = self.samples(recipe, split)

        def draw(generator: torch.Generator) -> Pair:
            chosen = torch.randint(count, (recipe.batch,), generator=generator)
            return self.batch(recipe, split, chosen.to(device), generator)

        return draw

    def validation(self, recipe: Recipe, train: Arrays, validation: Arrays) -> Pair:
        """Inputs and targets of the fixed validation samples, the same for every run."""
        import torch

        from nas.tasks.batches import VALIDATION_SEED

        split = {name: torch.from_numpy(array) for name, array in validation.items()}
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        order = torch.randperm(self.samples(recipe, split), generator=generator)
        return self.batch(recipe, split, order[: recipe.validation_samples], None)
