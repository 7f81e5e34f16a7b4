"""A worker's metrics, over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nas.errors import InvalidInput
from tests.support.paths import ROOT
from workers import metrics

#: A worker's life in short; prints what is scraped.
_LIFE = """
import time, urllib.request
from workers import metrics
from tests.support.paths import ROOT
port = metrics.serve(0, "127.0.0.1")
metrics.CLAIMS.labels("claimed").inc()
metrics.lease_renewed()
metrics.RENEWALS.labels("renewed").inc()
metrics.TRIALS.labels("complete").inc(3)
metrics.TRIAL_SECONDS.observe(12.0)
time.sleep(0.05)
held = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
metrics.lease_ended()
print(held + "# END")
print(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode())
"""
_SINCE = "einsum_nas_worker_seconds_since_lease_renewal"


def read(text: str) -> dict[str, float]:
    families = list(text_string_to_metric_families(text))
    own = [f for f in families if f.name.startswith("einsum_nas_")]
    assert all(f.documentation for f in own)
    return {
        s.name + "".join(f" {v}" for v in s.labels.values()): s.value
        for f in own
        for s in f.samples
    }


def test_a_worker_tells_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIFE], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    held, after = (read(part) for part in done.stdout.split("# END"))
    assert held["einsum_nas_worker_claims_total claimed"] == 1
    assert held["einsum_nas_worker_claims_total unavailable"] == 0
    assert held["einsum_nas_worker_trials_total complete"] == 3
    assert held["einsum_nas_worker_trials_total failed"] == 0
    assert held["einsum_nas_worker_trial_seconds_count"] == 1
    assert held["einsum_nas_worker_trial_seconds_sum"] == 12
    assert held["einsum_nas_worker_lease_renewals_total renewed"] == 1
    assert held["einsum_nas_worker_stale_writes_total"] == 0
    assert held["einsum_nas_worker_ray_reconnects_total"] == 0
    assert held[_SINCE] > 0
    assert after[_SINCE] == 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"EINSUM_NAS_METRICS_PORT.*{port}"):
            metrics.serve(port, "127.0.0.1")
