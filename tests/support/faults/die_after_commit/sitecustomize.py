"""On the path of a service: it dies by SIGKILL once a search is committed, before it answers."""

import os
import signal
from typing import Any

from nas.store.searches import Store

_create = Store.create_search


def _create_and_die(self: Store, *args: Any, **options: Any) -> Any:
    _create(self, *args, **options)
    os.kill(os.getpid(), signal.SIGKILL)


Store.create_search = _create_and_die  # type: ignore[method-assign]
