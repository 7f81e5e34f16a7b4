"""The private interfaces of Ray that the worker relies on; no other module uses one.

Any release of Ray may change them.  What each is for, why no public one serves, and which test
notices a change: `docs/decisions/0006-private-interfaces.md`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ray._private import ray_constants, worker
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

# the one warns that a local cluster asks for a token, which is as it should be; the other that it
# leaves the signals alone, which is why it is started in a thread
for _noisy in (AuthenticationTokenLoader.__module__, worker.__name__):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


def expect_others(expected: bool) -> None:
    """Configure Ray, before it starts, for use by other machines or by this one only.

    Ray exchanges 127.0.0.1 for an address that others reach, on all systems but those where it
    takes this variable for an answer; read by now, and by the processes it will start.
    """
    ray_constants.ENABLE_RAY_CLUSTER = expected
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = str(int(expected))


def on_loopback(folder: str | None) -> dict[str, Any]:
    """Arguments of `ray.init` for servers on loopback; None is Ray's own choice of its folder."""
    return {"_node_ip_address": "127.0.0.1", "_temp_dir": folder}


def forget_token() -> None:
    """Let Ray read its token from the environment anew."""
    AuthenticationTokenLoader.instance().reset_cache()


def count_hooks() -> int:
    """How many functions Ray will call after it has started the next time."""
    return len(worker._post_init_hooks)


def drop_hooks(kept: int) -> None:
    """Forget all but the first `kept` of them: Tune adds one for each run, which holds its data."""
    del worker._post_init_hooks[kept:]


def last_error(trial: Any) -> str:
    """What Tune's log of a trial tells of the last failure; empty if it has none.

    Tune's own `get_error` looks into the results' folder, where the text comes later.
    """
    try:
        return Path(trial.error_file or "").read_text().rpartition("Failure # ")[2].strip()
    except OSError:
        return ""
