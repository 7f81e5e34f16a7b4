"""What the kernels and the cost model that chooses among them both know about products' shapes."""

from __future__ import annotations

from collections.abc import Iterator

#: Rows of W whose gradient is held at once; enough for a matrix product at full speed.
SLAB_ROWS = 256
#: The inner size at which a product is as dear as the copy of its result.
SHORT = 32
#: Fewer columns than this are slow on CPUs, whose libraries vectorise over them.
_NARROW = 32


def is_narrow(rows: int, inner: int, columns: int) -> bool:
    """Whether, on a CPU, the transposed product qᵀ pᵀ and a transposition are faster than p q."""
    return columns < _NARROW <= rows and columns <= inner


def slabs(phi: int, epsilon: int, delta: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of (φ, ε) that cover W in slabs of about `SLAB_ROWS` of its rows."""
    whole = SLAB_ROWS // (epsilon * delta)
    some = max(1, SLAB_ROWS // delta)
    if whole:
        for f in range(0, phi, whole):
            yield slice(f, min(f + whole, phi)), slice(0, epsilon)
        return
    for f in range(phi):
        for e in range(0, epsilon, some):
            yield slice(f, f + 1), slice(e, min(e + some, epsilon))
