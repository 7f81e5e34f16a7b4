"""Modules and tensors that a model reaches by other ways than those it registers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_SEQUENCES = (list, tuple, set, frozenset, deque)
_LEAVES = (
    str, bytes, int, float, complex, bool, type(None), type, ModuleType, CodeType,
    torch.dtype, torch.device, torch.Generator, torch.storage.UntypedStorage,
    torch.optim.Optimizer,  # which learns what it is given, and calls nothing
)  # fmt: skip
#: Objects that are looked through; what a module holds beside its layers is far less.
_MOST = 1 << 16


def held_elsewhere(model: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """(where, module or tensor) for those in attributes, containers, closures and the like.

    Looked through are all attributes of the model's modules and what their classes' functions
    refer to; not what only a C extension holds.  Modules inside one that is not registered come
    with it.
    """
    registered = {id(m): name for name, m in model.named_modules()}
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque()

    def attributes(where: str, module: nn.Module) -> None:
        waiting.extend(
            (f"{where}.{name}".lstrip("."), value)
            for name, value in vars(module).items()
            if name not in _REGISTERED
        )
        for cls in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
            if id(cls) not in seen:
                seen.add(id(cls))
                waiting.extend((f"{cls.__name__}.{name}", v) for name, v in vars(cls).items())

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            attributes(name, module)
    while waiting and len(seen) < _MOST:
        where, value = waiting.popleft()
        if isinstance(value, nn.Module):
            yield where, value
            if id(value) not in registered and not isinstance(value, torch.jit.ScriptModule):
                for name, module in value.named_modules():
                    if id(module) in seen or id(module) in registered:
                        continue
                    seen.add(id(module))
                    inner = f"{where}.{name}".rstrip(".")
                    if name:
                        yield inner, module
                    attributes(inner, module)
        elif isinstance(value, Tensor):
            yield where, value
        elif not isinstance(value, _LEAVES) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(_inside(where, value))


def _inside(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value that is no module refers to, and where."""
    if isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{where}, which closes over {name},", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield f"{where}, in its defaults,", (value.__defaults__, value.__kwdefaults__)
        for name in value.__code__.co_names:
            if isinstance(found := value.__globals__.get(name), nn.Module):
                yield f"{where}, which reads the global {name},", found
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
    elif isinstance(value, dict):
        yield from ((f"{where}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, _SEQUENCES):
        yield from ((f"{where}[{i}]", part) for i, part in enumerate(value))
    else:
        yield from ((f"{where}.{name}", part) for name, part in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Of a plain object, those in its slots too; nothing is computed."""
    if isinstance(own := getattr(value, "__dict__", None), dict):
        yield from own.items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = vars(cls).get(name)
            if isinstance(member, MemberDescriptorType):
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # not set
                    continue
