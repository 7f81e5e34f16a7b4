"""The tasks: what is trained on, how it is read, and what it is checked for."""

from __future__ import annotations

import os

from nas.recipe import Recipe
from nas.tasks.data import TaskData

__all__ = ["TaskData", "load_data"]


def load_data(
    recipe: Recipe,
    data: str | os.PathLike[str] | None = None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
) -> TaskData:
    """The data of a recipe's task: its default, or a user's file or folder.

    Parameters
    ----------
    data
        A path, or ``hf:NAME`` for a dataset that the `datasets` library reads.
    shown
        What errors call the data; by default its path.
    root
        For data that was named over the network: the folder that its path leads into, over no link.

    Raises
    ------
    InvalidInput
        The data is missing, unusable, too little or too much; nothing is ever unpickled.
    """
    if recipe.task == "text":
        from nas.tasks.corpus import load_text as load
    elif recipe.task == "regression":
        from nas.tasks.regression import load_regression as load
    else:
        from nas.tasks.images import load_images as load
    return load(recipe, data, shown=shown, root=root)
