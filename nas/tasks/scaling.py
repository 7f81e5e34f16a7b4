"""Images as a recipe has them: cut to a square, averaged down, in its channels.  Torch-free."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nas.planning.recipe import ImageRecipe

if TYPE_CHECKING:
    from PIL import Image

#: Images (…, side, side, channels).
Pixels = NDArray[np.uint8]


def fitted(image: Image.Image, recipe: ImageRecipe) -> Pixels:
    """(side, side, channels) of an image that is no smaller."""
    image = image.convert("L" if recipe.channels == 1 else "RGB")
    (width, height), side = image.size, recipe.side
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    image = image.crop((left, top, left + square, top + square))
    pixels = np.array(image, dtype=np.uint8).reshape(square, square, recipe.channels)
    return pixels if square == side else _averaged(pixels, side)


def _averaged(pixels: Pixels, side: int) -> Pixels:
    """Means over equal areas, rounded half up: (square, square, channels) → (side, side, …)."""
    square = len(pixels)
    shares = _shares(square, side)
    rows = (shares @ pixels.reshape(square, -1)).reshape(side, square, -1)
    means: Pixels = ((shares @ rows + square**2 / 2) // square**2).astype(np.uint8)
    return means


@lru_cache(maxsize=64)
def _shares(square: int, side: int) -> NDArray[np.float64]:
    """How much of each pixel of a row lies in each of `side` parts: (side, square).

    The whole row is square · side long, a pixel `side` and a part `square`: all numbers are whole,
    and sums of them exact.
    """
    pixel, part = np.arange(square) * side, np.arange(side)[:, None] * square
    overlap = np.minimum(pixel + side, part + square) - np.maximum(pixel, part)
    shares: NDArray[np.float64] = np.maximum(overlap, 0).astype(np.float64)
    return shares
