"""EinBench: learning curves of structured models, measured once and read from a table.

::

    from nas.einbench import EinBench
    curve = EinBench("regression").curve("btt:rho=1/4", 64)
    curve.train_flops, curve.loss

Reading it needs numpy, pyarrow and pydantic, and neither torch nor a database.
"""

from nas.einbench.files import Curve
from nas.einbench.replay import Replay, Slice
from nas.einbench.table import BenchPoint, EinBench, Neighbour

__all__ = ["BenchPoint", "Curve", "EinBench", "Neighbour", "Replay", "Slice"]
