"""A tiny part of EinBench from the service's runs to the table, and back to runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.einbench.verify import compare, judged
from benchmarks.einbench.write import write
from nas.einbench import EinBench
from nas.store import Store
from tests.support.einbench import PART
from tests.support.paths import ROOT
from tests.support.services import PATIENCE, service_environment
from tests.support.tiers import FULL

TINY = replace(PART, designs=6)
COLLECT = """
from benchmarks.einbench.collect import collect
from nas.settings import settings
from nas.store import Store, upgrade
from tests.integration.einbench.test_collect import TINY
url = settings().resolved_database_url
upgrade(url)
collect(Store(url), [TINY])
"""


@FULL
def test_a_part_is_collected_written_and_recomputed(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # a lease that a busy machine renews in time
    environment = {**service_environment(tmp_path, lease_seconds="300"), "PYTHONPATH": path}
    counts = []
    store = None
    for _ in range(2):  # the second finds all done
        subprocess.run(
            [sys.executable, "-c", COLLECT], env=environment, cwd=ROOT, check=True, timeout=PATIENCE
        )
        store = store or Store(f"sqlite:///{tmp_path / 'einsum-nas.db'}")
        counts.append([s.trial_counts for s in store.searches()])
    assert counts[0] == counts[1]
    assert store is not None
    (part,) = write(store, tmp_path / "data", parts=[TINY])
    store.close()
    assert part.missing == []
    assert [part.entries[width] for width in TINY.widths] == [TINY.designs, TINY.designs]
    bench = EinBench(TINY.task, tmp_path / "data")
    found = list(compare(bench, [bench.dense(32), bench.curve("monarch", 64)]))
    assert max(c.same_seed for c in found) <= 1e-5
    assert judged(found).differ <= judged(found).most
