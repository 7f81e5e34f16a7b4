"""einsum-nas: search over einsum-structured linear layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.client import Client
    from nas.layers import EinsumLinear, param_groups, replace_linears
    from nas.planning.request import SearchRequest
    from nas.tasks.task import Task
    from nas.training.weights import load_model

#: Public name → its module, imported when the name is asked for: layers need torch, the others not.
_HOMES = {
    "Client": "nas.client",
    "EinsumLinear": "nas.layers",
    "SearchRequest": "nas.planning.request",
    # does in the user's process what a worker does; nothing in this package imports it
    "Study": "workers.study",
    "Task": "nas.tasks.task",
    "load_model": "nas.training.weights",
    "param_groups": "nas.layers",
    "replace_linears": "nas.layers",
}
__all__ = [
    "Client",
    "EinsumLinear",
    "SearchRequest",
    "Study",
    "Task",
    "load_model",
    "param_groups",
    "replace_linears",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
