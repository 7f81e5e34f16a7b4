"""Replacing the linear layers of any model by structured ones, in place."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.designs.aligned import Aligned
from nas.designs.design import Design, as_design, family_of, parse_design
from nas.designs.structure import MAX_DIMENSION, LinearStructure
from nas.errors import InvalidInput
from nas.layers.base import OF_ONE_MATRIX, StructuredLinear, sized
from nas.layers.building import build_layer, layer_of
from nas.layers.record import LayerRecord
from nas.layers.references import MOST_OBJECTS, held_elsewhere

AnyDesign = Design | str | Sequence[float]
Select = Callable[[str, nn.Module], bool] | str | Sequence[str]
#: How many heads of attention a layer makes ("out") or reads ("in").
Heads = tuple[int, str]

#: What a structured layer draws and trains in.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RUN_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
#: Modules whose parameters are what they are named after: no linear map, or one of their own kind.
_OWN_KINDS = (
    nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm, nn.RMSNorm,
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU, parametrize.ParametrizationList,
)  # fmt: skip
#: In the config of a model of transformers: `from_pretrained` fails, for it has no `quant_method`.
_MARK = {"einsum_nas": "this model has structured layers: nas.layers.load(model, folder) loads it"}
#: How many names a message lists.
_NAMES_LISTED = 6


@dataclass(frozen=True)
class Replaced:
    """A layer that was replaced."""

    #: every path at which the model holds it
    names: tuple[str, ...]
    structure: LinearStructure
    #: text of its design
    design: str
    #: its parameters, bias included, whether or not another layer shares them
    params_before: int
    params_after: int
    #: forward FLOPs of one call on one token (1 MAC = 2 FLOPs), bias not counted
    flops_before: int
    flops_after: int
    #: Frobenius ‖W − Ŵ‖ / ‖W‖ if it started from the dense weight, else None
    relative_error: float | None


@dataclass(frozen=True)
class LeftOut:
    """A linear layer that stays as it was."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Surgery:
    """What `replace_linears` did; as text, a table.

    Parameters are counted once where they are shared.
    """

    replaced: tuple[Replaced, ...]
    left_out: tuple[LeftOut, ...]
    #: parameters of the replaced layers together
    params_before: int
    params_after: int
    #: parameters of the whole model
    model_params_before: int
    model_params_after: int

    @property
    def flops_before(self) -> int:
        """Forward FLOPs of the replaced layers, each called once on one token, when dense."""
        return sum(layer.flops_before for layer in self.replaced)

    @property
    def flops_after(self) -> int:
        """Forward FLOPs of the replaced layers, each called once on one token, as they are now."""
        return sum(layer.flops_after for layer in self.replaced)

    def __str__(self) -> str:
        head = ["layer", "shape", "structure", "params", "→", "FLOPs/token", "→", "rel. error"]
        table = [
            [
                ", ".join(layer.names),
                f"{layer.structure.d_in}→{layer.structure.d_out}",
                parse_design(layer.design).described,
                *(f"{n:,}" for n in (layer.params_before, layer.params_after)),
                *(f"{n:,}" for n in (layer.flops_before, layer.flops_after)),
                "" if layer.relative_error is None else f"{layer.relative_error:.3g}",
            ]
            for layer in self.replaced
        ]
        totals = (self.params_before, self.params_after, self.flops_before, self.flops_after)
        table.append(
            [f"{len(self.replaced)} layers", "", "", *(f"{total:,}" for total in totals), ""]
        )
        params = (self.model_params_before, self.model_params_after)
        table.append(["whole model", "", "", *(f"{n:,}" for n in params), "", "", ""])
        widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *table)
        ]
        lines += [f"left out: {', '.join(layer.names)}: {layer.reason}" for layer in self.left_out]
        return "\n".join(lines)


@dataclass(eq=False)
class _Linear:
    """A linear layer that was found, and what is to become of it."""

    module: nn.Module
    names: list[str]
    design: Design | LayerRecord | None = None
    heads: Heads | None = None
    reason: str | None = None


def replace_linears(
    model: nn.Module,
    theta: AnyDesign | Mapping[str, AnyDesign],
    select: Select | None = None,
    *,
    heads: Mapping[str, Heads] | None = None,
    from_dense: bool = False,
    normalize: bool = False,
    gain: bool = False,
) -> Surgery:
    """Replace the linear layers of a model by structured ones, in place.

    `torch.nn.Linear` and the `Conv1D` of Hugging Face transformers are replaced.  Build the
    optimiser afterwards (`nas.layers.param_groups`): the old weights are no longer the model's.

    Parameters
    ----------
    model
        Any module that holds linear layers.
    theta
        A structure (θ, or any design that `parse_design` reads and single layers can have), or
        structures by shell-style patterns on names, the first that matches counting: ``{"*.attn.*":
        "btt:rho=1/4", "*": "monarch"}``.  Layers that no pattern matches stay.
    select
        Which layers: a function of (name, module), or shell-style patterns on names.  Default: all.
        A layer held under several names is selected by any of them.
    heads
        For designs with ``@heads``, which layers are projections of attention, by patterns on names
        of which the first that matches counts: how many heads they make, ``{"*.q_proj": (12,
        "out")}``, or read, ``{"*.o_proj": (12, "in")}``.  One that makes query, key and value at
        once makes three times as many.
    from_dense
        Start from the structured matrix nearest to each weight, as far as `from_linear` of the
        layers finds it, and report how near.  Default: drawn anew as `EinsumLinear` does; where the
        old weight was all zero, as the zero map.
    normalize, gain
        As in `EinsumLinear`.

    Kept are biases (the same parameters), device, dtype, requires_grad, training mode, forward and
    backward hooks with their handles (they are passed the new module, which has no ``weight``), and
    attributes that were set on the layer.  A module held in several places becomes one new module;
    linear layers that share a weight share the factors.

    Left out, with the reason in the report, are layers that something else depends on: a weight
    tied to another kind of module, such as an embedding; subclasses of `torch.nn.Linear`, among
    them parametrised, lazy and quantised ones and ``MultiheadAttention.out_proj``; parts of
    adapters such as LoRA; layers with other parameters (weight norm, pruning), with hooks on their
    weight or state_dict, with a replaced forward; layers that a list, a closure or the like holds
    too (`nas.layers.references` says what is searched), which would go on calling the old one; and
    layers whose weight the forward of a module around them reads, as far as its code shows it as
    ``self.….weight``.  The inference fast path of `torch.nn.TransformerEncoder` and its layers,
    which does so too, is turned off instead.
    Reported beside them are linear maps that are no linear layers: layers that only a list or the
    like holds, those of TorchScript, and matrices that are parameters of other modules, such as the
    weights of experts in one tensor.

    The ``config`` of each Hugging Face model in `model` is marked, so that ``from_pretrained``
    fails on what ``save_pretrained`` writes instead of drawing dense weights anew;
    `nas.layers.load` reads it.  Give the whole model: of a part alone, such as its list of blocks,
    the model around it is not known.

    Raises
    ------
    InvalidInput
        Not a module, itself a linear layer, or wrapped for data-parallel training; a θ that cannot
        be built; a pattern or function that selects no layer; different θ for one shared weight;
        ``@heads`` without `heads`; heads that do not divide a dimension, or for a design without
        ``@heads``; with `from_dense`, a weight on the meta device or with NaN, a mixture, or
        `normalize`, which would change the fitted matrix.  The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    >>> surgery = replace_linears(model, "monarch")
    >>> surgery.params_before, surgery.params_after
    (33088, 6464)
    >>> model(torch.zeros(2, 64)).shape
    torch.Size([2, 64])
    """
    if from_dense and normalize:
        raise InvalidInput("normalize", normalize, "False with from_dense")
    linears = _find(model)
    _choose(linears, theta, select, heads)
    return _replace(model, linears, from_dense, normalize, gain)


def rebuild(model: nn.Module, records: Mapping[str, LayerRecord]) -> None:
    """Replace the linear layers of these names by layers as recorded, drawn anew.

    Structured layers that are there already stay as they are.

    Raises
    ------
    InvalidInput
        The model has no linear layer of that name, or one that cannot be replaced.
    """
    linears = _find(model)
    for linear in linears:
        name = next((name for name in linear.names if name in records), None)
        linear.design = None if name is None else records[name]
        linear.reason = "not selected" if name is None else None
    _replace(model, linears, False, False, False)
    reasons = {name: linear.reason for linear in linears for name in linear.names}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, record in records.items():
        if isinstance(modules.get(name), StructuredLinear):
            continue
        why = reasons.get(name) or "the model has no linear layer there"
        raise InvalidInput("model", f"{record} for {name}", f"layers that can take it: {why}")


@torch.inference_mode(False)
def _replace(
    model: nn.Module, linears: list[_Linear], from_dense: bool, normalize: bool, gain: bool
) -> Surgery:
    """Replace the chosen layers that can be, and give the others the reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for linear in linears:
        linear.reason = linear.reason or _obstacle(linear, modules)
    others = _other_maps(model, linears)
    shared = _sharing(model, linears)

    layers: dict[nn.Module, StructuredLinear] = {}
    originals: dict[Hashable, StructuredLinear] = {}
    rows: list[Replaced] = []
    for linear in linears:
        if linear.reason is None:
            key = shared[linear.module]
            layer = _build(linear, originals.get(key), from_dense, normalize, gain)
            originals.setdefault(key, layer)
            layers[linear.module] = layer
            rows.append(_row(linear, layer))

    # nothing has been changed so far, and nothing below can fail
    model_before, before = _count([model]), _count(layers)
    for parent in list(model.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    _avoid_fast_paths(model)
    if not all(layer.is_plain_matrix for layer in layers.values()):
        _mark(model)
    left_out = [LeftOut(tuple(x.names), x.reason) for x in linears if x.reason is not None]
    return Surgery(
        replaced=tuple(rows),
        left_out=(*left_out, *others),
        params_before=before,
        params_after=_count(layers.values()),
        model_params_before=model_before,
        model_params_after=_count([model]),
    )


def _mark(model: nn.Module) -> None:
    """Keep transformers from taking what it saves of the model for dense weights.

    A class that replaces its layers in its constructor will do so again, and is not marked.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        maker = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "__init__" else None
        if isinstance(maker, nn.Module) and hasattr(maker, "save_pretrained"):
            return
        frame = frame.f_back
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        saves = hasattr(module, "save_pretrained") and hasattr(config, "to_json_string")
        if saves and not hasattr(config, "quantization_config"):
            config.quantization_config = dict(_MARK)


def _other_maps(model: nn.Module, linears: list[_Linear]) -> list[LeftOut]:
    """Linear maps that are not among the model's linear layers; layers that are, but that something
    else holds too, get that as their reason."""
    registered = {linear.module: linear for linear in linears}
    weights: dict[Hashable, list[_Linear]] = {}
    for linear in linears:
        if (weight := linear.module._parameters.get("weight")) is not None:
            weights.setdefault(_memory(weight, whole=True), []).append(linear)
    others: dict[Any, LeftOut] = {}
    for held in held_elsewhere(model):
        if held is None:
            reason = f"only the first {MOST_OBJECTS:,} objects were searched for other holders"
            others[None] = LeftOut(("what the model refers to",), reason)
            continue
        where, value = held
        if isinstance(value, Tensor):
            for linear in weights.get(_memory(value, whole=True), ()):
                linear.reason = linear.reason or f"{where} holds its weight too"
        elif value in registered:
            reason = f"{where} holds it too, and would call the old layer"
            registered[value].reason = registered[value].reason or reason
        elif isinstance(value, nn.Linear) or is_conv1d(value):
            reason = f"it is a {type(value).__name__} that the model does not register"
            others.setdefault(value, LeftOut((where,), reason))
    found = list(others.values())
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in ("Linear", "Conv1D"):
                found.append(LeftOut((name,), f"it is a {module.original_name} of TorchScript"))
            continue
        if module in registered or isinstance(module, StructuredLinear):
            continue
        for slot, parameter in module._parameters.items():
            if parameter is not None and _is_matrices(module, slot, parameter):
                path, shape = f"{name}.{slot}".lstrip("."), tuple(parameter.shape)
                reason = f"it is a parameter {shape} of {kind}, not a plain torch.nn.Linear"
                found.append(LeftOut((path,), reason))
    return found


def _is_matrices(module: nn.Module, slot: str, parameter: Tensor) -> bool:
    """Whether it may be the weight of a linear map: of experts in one tensor, of a projection."""
    if nn.parameter.is_lazy(parameter) or isinstance(module, _OWN_KINDS):
        return False
    if parameter.dim() not in (2, 3) or 1 in parameter.shape:
        return False
    return parameter.dim() == 3 or "weight" in slot or "proj" in slot


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a `Conv1D` of Hugging Face transformers: a linear layer, weight (d_in, d_out).

    Told by its class's name and attributes, so that transformers need not be installed.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and weight is not None
        and weight.dim() == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )


def _find(model: nn.Module) -> list[_Linear]:
    """The linear layers of the model with all their names, in its order."""
    if not isinstance(model, nn.Module):
        raise InvalidInput("model", type(model).__name__, "a torch.nn.Module")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise InvalidInput(
            "model",
            f"a {type(model).__name__}, which nothing holds",
            "a module with linear layers; for one layer build an EinsumLinear, or "
            "EinsumLinear.from_linear",
        )
    found: dict[nn.Module, _Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ in _WRAPPERS:  # they have taken hold of the parameters already
            got = f"{type(module).__name__} at {name or 'its root'}"
            raise InvalidInput("model", got, "a model that is wrapped afterwards")
        if isinstance(module, nn.Linear | StructuredLinear) or is_conv1d(module):
            found.setdefault(module, _Linear(module, [])).names.append(name)
    return list(found.values())


def _choose(
    linears: list[_Linear],
    theta: AnyDesign | Mapping[str, AnyDesign],
    select: Select | None,
    heads: Mapping[str, Heads] | None,
) -> None:
    """Give each selected layer its θ and heads, each other one the reason."""
    by_pattern = theta if isinstance(theta, Mapping) else {"*": theta}
    if not by_pattern:
        raise InvalidInput("theta", theta, "a structure, or a structure for each pattern on names")
    thetas = {
        _pattern("theta", pattern): _design(t, heads is not None)
        for pattern, t in by_pattern.items()
    }
    of_attention = {} if heads is None else _checked_heads(heads)
    if of_attention:
        _matching("heads", list(of_attention), linears)
    if select is None:
        chosen = set(linears)
    elif callable(select):
        chosen = {x for x in linears if any(select(name, x.module) for name in x.names)}
        if not chosen:
            raise InvalidInput("select", select, _some_names(linears))
    else:
        chosen = _matching("select", [select] if isinstance(select, str) else select, linears)
    if isinstance(theta, Mapping):
        chosen &= _matching("theta", list(thetas), linears)
    for linear in linears:
        if linear not in chosen:
            linear.reason = "not selected"
            continue
        linear.design = next(t for pattern, t in thetas.items() if _matches(linear, pattern))
        found = (h for pattern, h in of_attention.items() if _matches(linear, pattern))
        linear.heads = next(found, None)


def _checked_heads(heads: object) -> dict[str, Heads]:
    """Heads by pattern, each a pair; whether they divide a dimension shows when it is built."""
    accepted = 'by pattern on names the number of heads and their side, such as (12, "out")'
    if not isinstance(heads, Mapping):
        raise InvalidInput("heads", heads, accepted)
    for pattern, found in heads.items():
        _pattern("heads", pattern)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise InvalidInput("heads", found, accepted)
    return dict(heads)


def _design(given: AnyDesign, knows_heads: bool) -> Design:
    """A design that single layers can have."""
    design = as_design(given)
    if knows_heads and isinstance(design, Aligned):
        return design
    if accepted := family_of(design).alone(design):
        raise InvalidInput("theta", design.text, accepted)
    return design


def _matching(field: str, patterns: Sequence[str], linears: list[_Linear]) -> set[_Linear]:
    """The layers that any of the patterns matches; each must match one."""
    if not isinstance(patterns, Sequence) or not patterns:
        raise InvalidInput(field, patterns, "a function of (name, module), or patterns on names")
    chosen: set[_Linear] = set()
    for pattern in patterns:
        matched = {x for x in linears if _matches(x, _pattern(field, pattern))}
        if not matched:
            raise InvalidInput(field, pattern, _some_names(linears))
        chosen |= matched
    return chosen


def _pattern(field: str, pattern: str) -> str:
    if not isinstance(pattern, str):
        raise InvalidInput(field, pattern, "a pattern on names, such as '*.mlp.*'")
    return pattern


def _matches(linear: _Linear, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in linear.names)


def _some_names(linears: list[_Linear]) -> str:
    names = [name for linear in linears for name in linear.names]
    more = f" and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return "what selects a linear layer, of " + (", ".join(names[:_NAMES_LISTED]) or "none") + more


def _obstacle(linear: _Linear, modules: dict[str, nn.Module]) -> str | None:
    """Why the layer, seen alone and from the modules around it, cannot be replaced."""
    module = linear.module
    kind = type(module).__name__
    if isinstance(module, StructuredLinear):
        return f"it is a structured layer, {kind}"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"it is a {kind}, not a plain torch.nn.Linear"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it has other parameters, buffers or modules than weight and bias"
    if "forward" in module.__dict__ or "_compiled_call_impl" in module.__dict__:
        return "its forward was replaced or compiled"
    if any(getattr(module, hooks, None) for hooks in _STATE_HOOKS):
        return "it has hooks on its state_dict"
    weight = module._parameters["weight"]
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        got = "none" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        return f"its weight is {got}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has hooks"
    d_in, d_out = weight.shape if is_conv1d(module) else weight.shape[::-1]
    expected = getattr(module, "in_features", d_in), getattr(module, "out_features", d_out)
    if (d_in, d_out) != expected or not all(1 <= d <= MAX_DIMENSION for d in (d_in, d_out)):
        return f"its weight has shape {tuple(weight.shape)}"
    for name in linear.names:
        if reason := _reader(name, modules):
            return reason
    return None


def _reader(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why a module around the layer `name` needs it as it is, if one does."""
    path = name.split(".")
    for depth in range(len(path)):
        outer = modules[".".join(path[:depth])]
        if "base_layer" in outer._modules:  # as adapters of peft hold what they adapt
            return f"it is part of an adapter, {type(outer).__name__}"
        if type(outer) is nn.TransformerEncoderLayer:
            continue  # whose fast path is turned off
        inner = ".".join(path[depth:])
        if f"{inner}.weight" in _attributes_read(type(outer)):  # type: ignore[arg-type]
            return f"{type(outer).__name__} reads its weight directly"
    return None


@lru_cache(maxsize=1024)
def _attributes_read(cls: type) -> frozenset[str]:
    """Dotted attributes, such as ``proj.weight``, in `forward` and what it calls of its class."""
    chains: set[str] = set()
    waiting, done = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for code in _code(cls, name):
            waiting += code.co_names
            chain: list[str] = []
            for instruction in dis.get_instructions(code):
                if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    chain.append(str(instruction.argval))
                    chains.update(".".join(chain[i:]) for i in range(len(chain)))
                elif instruction.opname != "EXTENDED_ARG":
                    chain = []
    return frozenset(chains)


def _code(cls: type, name: str) -> Iterator[CodeType]:
    """The code of a method, of those it overrides short of `nn.Module`, and of functions inside."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        function = base.__dict__.get(name)
        function = inspect.unwrap(function) if callable(function) else function
        nested = [function.__code__] if isinstance(function, FunctionType) else []
        while nested:
            code = nested.pop()
            nested += [c for c in code.co_consts if isinstance(c, CodeType)]
            yield code


def _sharing(model: nn.Module, linears: list[_Linear]) -> dict[nn.Module, Hashable]:
    """Which memory each layer's weight is; ties that replacing would break leave layers out."""
    holders: dict[Hashable, list[tuple[str, nn.Module, Tensor]]] = {}
    for name, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for slot, tensor in slots.items():
                if tensor is not None:
                    path = f"{name}.{slot}".lstrip(".")
                    holders.setdefault(_memory(tensor), []).append((path, module, tensor))
    by_module = {linear.module: linear for linear in linears}
    keys: dict[nn.Module, Hashable] = {}
    for key, held in holders.items():
        group = [by_module[m] for path, m, _ in held if m in by_module and path.endswith("weight")]
        going = [linear for linear in group if linear.reason is None]
        if not going:
            continue
        kept = [
            (path, m)
            for path, m, _ in held
            if m not in by_module or by_module[m].reason is not None
        ]
        # factors can stand for all only if the weights are the same in every respect
        forms = {(type(m), t.shape, t.stride(), t.requires_grad) for _, m, t in held}
        if kept or len(forms) > 1:
            for linear in going:
                others = kept or [(path, m) for path, m, _ in held if m is not linear.module]
                path, other = others[0]
                how = "is also" if kept else "has, in another form, the memory of"
                linear.reason = f"its weight {how} {path} ({type(other).__name__})"
            continue
        for linear in going:
            keys[linear.module] = key
            if _factors_of(linear) != _factors_of(going[0]):
                raise InvalidInput(
                    "theta",
                    f"{linear.design} for {linear.names[0]}",
                    f"{going[0].design}, as for {going[0].names[0]}, whose weight it shares",
                )
    return keys


def _factors_of(linear: _Linear) -> object:
    """Equal for layers that can share their factors."""
    found = linear.design
    return (found.computes, found.gain) if isinstance(found, LayerRecord) else (found, linear.heads)


def _memory(tensor: Tensor, *, whole: bool = False) -> Hashable:
    """Equal for tensors that begin at the same place in memory, or are the same object; `whole`:
    for all that share memory, such as views."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if plain and not tensor.is_meta and tensor.numel():
        at = tensor.untyped_storage() if whole else tensor
        return tensor.device, at.data_ptr()
    return id(tensor)


@torch.no_grad()
def _build(
    linear: _Linear, shared: StructuredLinear | None, from_dense: bool, normalize: bool, gain: bool
) -> StructuredLinear:
    """The new layer; with the factors of `shared` if another layer already has them."""
    module = linear.module
    stored, bias = module._parameters["weight"], module._parameters["bias"]
    assert stored is not None
    assert linear.design is not None
    weight = stored.detach().T if is_conv1d(module) else stored.detach()
    d_out, d_in = weight.shape
    zero_init = not weight.is_meta and not bool(weight.any())
    place: dict[str, Any] = {
        "device": weight.device if shared is None else "meta",
        "dtype": weight.dtype,
    }
    try:
        if isinstance(linear.design, LayerRecord):
            options = {**linear.design.options, "bias": False, **place}
            layer = build_layer(sized(linear.design.structure, d_in, d_out), **options)
        else:
            heads, side = linear.heads or (None, "out")
            layer = layer_of(
                linear.design, d_in, d_out, heads=heads, side=side, bias=False,
                zero_init=zero_init, normalize=normalize, gain=gain, **place,
            )  # fmt: skip
            if from_dense and not layer.is_matrix:
                accepted = f"{OF_ONE_MATRIX}; or from_dense=False"
                raise InvalidInput("from_dense", linear.design.text, accepted)
        if from_dense and shared is None:
            layer.take_nearest(weight)
    except InvalidInput as error:
        field = f"{linear.names[0]}.{error.field}"
        raise InvalidInput(field, error.value, error.accepted) from error
    if shared is not None:
        layer._parameters.update(shared._parameters)
        layer.relative_error = shared.relative_error
    else:
        layer.requires_grad_(stored.requires_grad)
    layer._parameters["bias"] = bias
    layer.in_place_of_conv1d = is_conv1d(module)
    layer.train(module.training)
    for name, value in module.__dict__.items():
        # the same dictionaries of hooks, so that the handles that remove them go on working
        if name in _RUN_HOOKS or name not in layer.__dict__:
            layer.__dict__[name] = value
    return layer


def _row(linear: _Linear, layer: StructuredLinear) -> Replaced:
    from nas.planning.cost import FLOPS_PER_MAC  # with pydantic, without which layers run

    structure = layer.structure
    assert linear.design is not None
    return Replaced(
        names=tuple(linear.names),
        structure=structure,
        design="" if isinstance(linear.design, LayerRecord) else linear.design.text,
        params_before=_count([linear.module]),
        params_after=_count([layer]),
        flops_before=FLOPS_PER_MAC * structure.d_in * structure.d_out,
        flops_after=FLOPS_PER_MAC * structure.macs,
        relative_error=layer.relative_error,
    )


def _count(modules: Iterable[nn.Module]) -> int:
    """Parameters of the modules, each once; those of lazy modules are not there yet."""
    parameters = {p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p))


def _avoid_fast_paths(model: nn.Module) -> None:
    """Keep torch's encoders from reading dense weights of feed-forward layers that have none."""

    def structured(module: nn.Module) -> bool:
        return type(module) is nn.TransformerEncoderLayer and any(
            isinstance(child, StructuredLinear) for child in module.children()
        )

    for module in model.modules():
        if structured(module):
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        if isinstance(module, nn.TransformerEncoder) and any(map(structured, module.layers)):
            module.use_nested_tensor = False
