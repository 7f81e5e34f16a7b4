"""Integer sizes of the axes of a dimension, near the exponents that are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

#: An axis may leave d^θ by this factor when that wastes less.
_NEAR = 4 / 3
#: The same where there are more than three axes: a power of two is then factored exactly into up
#: to five equal ones.
_NEAR_OF_MANY = 7 / 4
#: Steps after which a search over four axes and more keeps the best it has found.
_MOST_STEPS = 20_000


@lru_cache(maxsize=65536)
def cover_axes(dimension: int, exponents: tuple[float, ...]) -> tuple[int, ...]:
    """Axis sizes near dimension^exponent whose product covers `dimension` with the least waste.

    An exponent of 0 is an axis of size 1.  Of equal products, the one nearest in the sum of
    squared logarithms is taken.  Exact for three exponents; for more, the search ends after a
    bounded number of steps with the best it has found.
    """
    count = len(exponents)
    near = _NEAR if count <= 3 else _NEAR_OF_MANY
    order = sorted(range(count), key=lambda i: exponents[i])
    targets = [dimension ** exponents[i] for i in order]
    windows = [
        (1, 1)
        if exponents[i] == 0
        else (
            max(1, min(math.floor(t), math.ceil(t / near))),
            max(math.ceil(t), math.floor(t * near)),
        )
        for i, t in zip(order, targets, strict=True)
    ]
    best = _least_waste(dimension, targets, windows)
    if best is None:  # exponents that sum to a little less than 1 leave too narrow windows
        best = _least_waste(dimension, targets, [*windows[:-1], (windows[-1][0], dimension)])
    assert best is not None  # the largest axis takes whatever the others leave
    by_axis = dict(zip(order, best, strict=True))
    return tuple(by_axis[i] for i in range(count))


def divide_axes(number: int, shares: Sequence[float], needed: int = 0) -> tuple[int, ...]:
    """Axis sizes of product `number` exactly, one after another near the shares of its logarithm.

    The first `needed` are above 1 as far as `number` has divisors for them.

    >>> divide_axes(36, [1.0, 1.0]), divide_axes(53, [1.0, 1.0], needed=1)
    ((6, 6), (53, 1))
    """
    rest, sizes = number, []
    for i, share in enumerate(shares):
        target = share / sum(shares[i:]) * math.log(rest) if share else 0.0
        divisors = [n for n in range(1, rest + 1) if rest % n == 0]
        if i < needed:
            divisors = divisors[1:] or divisors
        sizes.append(min(divisors, key=lambda n: abs(math.log(n) - target)))
        rest //= sizes[-1]
    sizes[-1] *= rest
    return tuple(sizes)


def _least_waste(
    dimension: int, targets: Sequence[float], windows: Sequence[tuple[int, int]]
) -> tuple[int, ...] | None:
    """The sizes inside `windows` whose product covers `dimension` best; None if none do.

    The last size follows from the others.  Branches are left that cannot reach `dimension`, or
    cannot beat the best so far.
    """
    last = len(windows) - 1
    low_after, high_after = [1] * (last + 1), [1] * (last + 1)  # least, most the later axes can be
    for i in range(last - 1, -1, -1):
        low_after[i] = low_after[i + 1] * windows[i + 1][0]
        high_after[i] = high_after[i + 1] * windows[i + 1][1]
    candidates = [_outwards(*pair) for pair in zip(windows[:-1], targets[:-1], strict=True)]
    best: tuple[int, float, tuple[int, ...]] | None = None
    steps = 0

    def extend(sizes: tuple[int, ...], product: int, distance: float) -> None:
        nonlocal best, steps
        steps += 1
        if steps > _MOST_STEPS and last > 2 and best is not None:
            return
        i = len(sizes)
        if i == last:
            size = max(windows[i][0], -(-dimension // product))
            whole = product * size
            if size > windows[i][1] or (best is not None and whole > best[0]):
                return
            found = (whole, distance + math.log(size / targets[i]) ** 2, (*sizes, size))
            if best is None or found < best:
                best = found
            return
        for size in candidates[i]:
            partial = product * size
            if partial * high_after[i] < dimension:
                continue
            reached = distance + math.log(size / targets[i]) ** 2
            if best is not None:
                if partial * low_after[i] > best[0]:
                    continue
                exact = best[0] == dimension
                if exact and (dimension % partial or reached > best[1]):
                    continue
            extend((*sizes, size), partial, reached)

    extend((), 1, 0.0)
    return None if best is None else best[2]


def _outwards(window: tuple[int, int], target: float) -> list[int]:
    """The sizes in a window from the target on, so that what is found first is good."""
    return sorted(range(window[0], window[1] + 1), key=lambda n: abs(math.log(n / target)))
