"""The tasks: what is trained on, how it is read, and what it is checked for."""

from __future__ import annotations

import os
from collections.abc import Callable

from nas.planning.recipe import ImageRecipe, PluginRecipe, Recipe, RegressionRecipe, TextRecipe
from nas.tasks.data import TaskData

__all__ = ["TaskData", "load_data"]


def load_data(
    recipe: Recipe,
    data: str | os.PathLike[str] | None = None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
    stop: Callable[[], bool] = lambda: False,
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
    stop
        Whether to stop loading; asked while the code of a plug-in loads.

    Raises
    ------
    LoadingStopped
        `stop` said so.
    InvalidInput
        The data is missing, unusable, too little or too much; nothing is ever unpickled.
    """
    if isinstance(recipe, PluginRecipe):
        from nas.tasks.plugged import load_plugged

        path, inside = (None if p is None else os.fspath(p) for p in (data, root))
        return load_plugged(recipe, path, shown=shown, root=inside, stop=stop)
    if isinstance(recipe, TextRecipe):
        from nas.tasks.corpus import load_text

        return load_text(recipe, data, shown=shown, root=root)
    if isinstance(recipe, RegressionRecipe):
        from nas.tasks.regression import load_regression

        return load_regression(recipe, data, shown=shown, root=root)
    from nas.tasks.images import load_images

    assert isinstance(recipe, ImageRecipe)
    return load_images(recipe, data, shown=shown, root=root)


def check_data(
    recipe: Recipe, data: str | os.PathLike[str], *, shown: str, root: str | os.PathLike[str]
) -> Recipe:
    """The recipe as data that was named over the network completes it, once that is looked at.

    What can be known without learning tokens is known then: whether these are enough is not.  Of a
    plug-in's data it is only whether it is there.
    Parameters and errors as of `load_data`.
    """
    if isinstance(recipe, PluginRecipe):
        from nas.tasks.plugged import check_place

        check_place(recipe, os.fspath(data), shown=shown, root=os.fspath(root))
        return recipe
    if isinstance(recipe, TextRecipe):
        from nas.tasks.corpus import load_text

        return load_text(recipe, data, shown=shown, root=root, learns=False).recipe
    return load_data(recipe, data, shown=shown, root=root).recipe
