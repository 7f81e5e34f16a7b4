"""Modules and tensors that a model reaches by other ways than those it registers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from functools import partial
from itertools import chain
from types import (
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_MAPPINGS = (dict, MappingProxyType)
_SEQUENCES = (list, tuple, set, frozenset, deque, KeysView, ValuesView, ItemsView)
#: What refers to no module; an optimiser holds parameters and calls nothing.
_LEAVES = (
    str, bytes, int, float, complex, bool, type(None), type, ModuleType, CodeType, torch.dtype,
    torch.device, torch.Generator, torch.storage.UntypedStorage, torch.optim.Optimizer,
)  # fmt: skip
#: Objects that are looked through.
MOST_OBJECTS = 1 << 20

_Found = tuple[str, Any]


def held_elsewhere(model: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor] | None]:
    """(where, module or tensor) of what the model's modules refer to without registering it.

    Looked through are their attributes and slots; containers, plain objects, functions (closures,
    defaults, attributes), methods, `functools.partial` and weak references in these; and the
    functions of their classes, with the globals that these read and the functions of the same file
    that they call.  What only an extension in C holds is not found.  A module that is not
    registered is looked into as one that is.  None, as the last, where there are too many objects.
    """
    registered = {id(m) for m in model.modules()}
    seen: dict[int, Any] = {}  # the objects too, so that no other gets the id of one
    waiting: deque[_Found] = deque()

    def is_new(value: Any) -> bool:
        if id(value) in seen:
            return False
        seen[id(value)] = value
        return True

    def look_into(where: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule) or not is_new(module):
            return
        for name, value in _attributes(module):
            if name not in _REGISTERED:
                waiting.append((f"{where}.{name}".lstrip("."), value))
        for cls in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
            if is_new(cls):
                waiting.extend((f"{cls.__name__}.{name}", v) for name, v in vars(cls).items())

    for name, module in model.named_modules():
        look_into(name, module)
    while waiting:
        where, value = waiting.popleft()
        if isinstance(value, weakref.ProxyTypes):
            value = _of_proxy(value)
        if isinstance(value, Tensor):
            yield where, value
        elif isinstance(value, nn.Module):
            yield where, value
            if id(value) not in registered and not isinstance(value, torch.jit.ScriptModule):
                for name, module in value.named_modules(remove_duplicate=False):
                    inner = f"{where}.{name}".rstrip(".")
                    if name:
                        yield inner, module
                    for slot, parameter in module._parameters.items():
                        if parameter is not None:
                            yield f"{inner}.{slot}", parameter
                    look_into(inner, module)
        elif not isinstance(value, _LEAVES) and is_new(value):
            if len(seen) > MOST_OBJECTS:
                yield None
                return
            waiting.extend(part for part in _inside(where, value) if _may_refer(part[1]))


def _may_refer(value: Any) -> bool:
    return isinstance(value, weakref.ProxyTypes) or not isinstance(value, _LEAVES)


def _of_proxy(proxy: Any) -> Any:
    """The object of a weak proxy, which passes for that in all but identity; None if it is gone."""
    try:
        return proxy.__repr__.__self__
    except (ReferenceError, AttributeError):
        return None


def _inside(where: str, value: Any) -> Iterator[_Found]:
    """What a value that is no module refers to, and where."""
    if isinstance(value, FunctionType):
        yield from _of_function(where, value)
    elif isinstance(value, MethodType):
        yield from ((where, value.__self__), (where, value.__func__))
    elif isinstance(value, partial):
        yield from ((where, part) for part in (value.func, value.args, value.keywords))
    elif isinstance(value, staticmethod | classmethod):
        yield where, value.__func__
    elif isinstance(value, property):
        yield from ((where, f) for f in (value.fget, value.fset) if f is not None)
    elif isinstance(value, weakref.ref):
        yield where, value()
    elif isinstance(value, _MAPPINGS):
        for key, part in value.items():
            shown = repr(key) if isinstance(key, str | int) else type(key).__name__
            yield from ((f"{where}[{shown}]", part), (f"a key of {where}", key))
    elif isinstance(value, _SEQUENCES):
        yield from ((f"{where}[{i}]", part) for i, part in enumerate(value))
    yield from ((f"{where}.{name}", part) for name, part in _attributes(value))


def _of_function(where: str, function: FunctionType) -> Iterator[_Found]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the closure of {where} ({name})", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    defaults = chain(function.__defaults__ or (), (function.__kwdefaults__ or {}).values())
    yield from ((f"a default of {where}", default) for default in defaults)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        for name in code.co_names:
            found = function.__globals__.get(name)
            foreign = isinstance(found, FunctionType) and found.__module__ != function.__module__
            if not foreign:
                yield f"the global {name}, read by {where},", found


def _attributes(value: Any) -> Iterator[_Found]:
    """Those that an object has itself, in slots too; nothing is computed."""
    if isinstance(own := getattr(value, "__dict__", None), dict):
        yield from own.items()
    for cls in type(value).__mro__:
        for name, member in vars(cls).items() if "__slots__" in vars(cls) else ():
            if isinstance(member, MemberDescriptorType):
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # not set
                    continue
