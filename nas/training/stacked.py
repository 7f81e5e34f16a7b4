"""R models of equal shape, which differ in their seeds, computed as one.

Every tensor has a leading axis of R models.  Parameters of one learning rate lie in one tensor
(R, P), so that an optimiser has a few of them; what the models need is a view of these.  Structured
layers of equal structure, whatever their block and role, are normalised together, and where their
plan is `STACKED` also multiplied out together: their products are then dense, three at once where
they share an input.  So a step has about as many operations as that of a dense model, which is what
decides its time while layers are small.  Nothing mixes models: one whose numbers overflow leaves
the others as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.layers import StructuredLinear
from nas.layers.kernels.mixture_kernels import Form, loads
from nas.layers.kernels.mixture_plan import MixturePlan, choose_for_sizes
from nas.layers.kernels.plan import bucket
from nas.layers.mixture import MixtureFFN, MixtureLinear
from nas.layers.modes import autocast_dtype, without_autocast
from nas.layers.normalization import cap_rms_each
from nas.layers.routing import Routing, gate_loss, routing_statistics, softmax

#: The plan under which a structure's layers are multiplied out together.
STACKED = "stacked"
#: Layers that share their input.
_SHARED = ("query", "key", "value")


@dataclass
class _Slot:
    """Parameters of equal shape and learning rate, one beside the other."""

    names: list[str]
    shape: torch.Size
    #: (R, names · numbers of each) in the present step
    value: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def numel(self) -> int:
        return len(self.names) * self.shape.numel()


@dataclass
class _Stack:
    """Layers of equal structure."""

    layer: StructuredLinear
    members: list[StructuredLinear]
    #: sizes of the parts that are used together
    parts: list[int]
    plan: str
    factors: list[_Slot]
    bias: _Slot | None
    gate: _Slot | None


@dataclass(frozen=True)
class _Part:
    """Layers of one stack that share an input, as they are in the present step."""

    layer: StructuredLinear
    #: how many
    count: int
    #: W (R, layers · d_out, d_in) where they are multiplied out; of one model without R
    matrix: Tensor | None
    #: factors (R, layers, ...) elsewhere
    factors: tuple[Tensor, ...]
    #: (R, layers · d_out); of one model without R
    bias: Tensor | None
    #: (R, layers · routed experts, d_in); of one model without R
    gate: Tensor | None


class Stacked:
    """R models as one; see `nas.training.models.ops.Ops`.

    Parameters
    ----------
    models
        Freshly built, of equal shape.  The first is used for its shapes and methods from then on.
    groups
        Parameter groups of the first one: which parameters have which learning rate.
    plans
        Execution plan of each structure by fingerprint: `STACKED`, or one of its layers' own.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        groups: Sequence[Mapping[str, Any]],
        plans: Mapping[str, str],
    ) -> None:
        self.count = len(models)
        self.model = models[0]
        self._names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self._slots: dict[str, _Slot] = {}
        #: what is capped, in one order: slots of factors and of gains, largest norm of each weight,
        #: and for each where its gain stands among all
        self._capped: list[_Slot] = []
        self._gains: list[_Slot] = []
        self._limits: list[float] = []
        self._gain_places: list[int] = []
        self._gain_count = 0
        self._stacks = [self._stack(members, plans) for members in _equal(self.model)]
        for module in self.model.modules():
            for run in _runs_of_norms(module):
                self._slot([norm.weight for norm in run])
                self._slot([norm.bias for norm in run])
        for parameter in self._names:
            if self._names[parameter] not in self._slots:
                self._slot([parameter])
        #: slots of each group in the order in which they lie in its tensor
        self._layout: list[list[_Slot]] = []
        #: learned tensors (R, P), one a learning rate
        self.parameters: list[nn.Parameter] = []
        every = [dict(model.named_parameters()) for model in models]
        for group in groups:
            inside = {self._names[p] for p in group["params"]}
            slots = list({id(s): s for n, s in self._slots.items() if n in inside}.values())
            assert sum(len(s.names) for s in slots) == len(inside)
            rows = [
                torch.cat([named[n].detach().reshape(-1) for s in slots for n in s.names])
                for named in every
            ]
            self._layout.append(slots)
            self.parameters.append(nn.Parameter(torch.stack(rows)))
        like = self.parameters[0]
        self._limits_held = torch.tensor(self._limits, dtype=like.dtype, device=like.device)
        self._places_held = torch.tensor(self._gain_places, device=like.device)
        #: of the present step: parameters by name, parts by layer
        self._values: dict[str, Tensor] = {}
        self._parts: dict[StructuredLinear, tuple[_Part, int]] = {}
        #: number of layers, logits and chosen routed experts of each gate of the last run
        self._routed: list[tuple[int, Tensor, Tensor]] = []

    def _slot(self, parameters: Sequence[Tensor]) -> _Slot:
        slot = _Slot([self._names[p] for p in parameters], parameters[0].shape)
        self._slots.update(dict.fromkeys(slot.names, slot))
        return slot

    def _stack(
        self, members: list[tuple[str, StructuredLinear]], plans: Mapping[str, str]
    ) -> _Stack:
        layers = [layer for _, layer in members]
        first = layers[0]

        def slot(name: str) -> _Slot | None:
            found = [layer._parameters.get(name) for layer in layers]
            own = [p for p in found if p is not None]
            return self._slot(own) if own else None

        factors = []
        for name, parameter, std in first._factors:
            of_factor = slot(parameter)
            assert of_factor is not None
            factors.append(of_factor)
            if first.normalize:
                self._cap(layers, of_factor, f"gain_{name}", std)
        shared = [
            (name.rpartition(".")[0], name.rpartition(".")[2] in _SHARED, name)
            for name, _ in members
        ]
        # a part is one layer, or the consecutive ones of a block that share their input
        keys = [
            (block, True, "") if together else (block, False, name)
            for block, together, name in shared
        ]
        parts = [len(list(run)) for _, run in groupby(keys)]
        plan = plans[first.structure.fingerprint]
        if plan != STACKED:
            first.plan = plan
        return _Stack(first, layers, parts, plan, factors, slot("bias"), slot("gate"))

    def _cap(
        self, layers: Sequence[StructuredLinear], factor: _Slot, gain: str, std: float
    ) -> None:
        """Note that the RMS of each layer's factor is capped, and its gain."""
        self._capped.append(factor)
        self._limits += [std * factor.shape.numel() ** 0.5] * len(layers)
        own = [p for layer in layers if (p := layer._parameters[gain]) is not None]
        if own:
            self._gains.append(self._slot(own))
        for layer in layers:
            has_one = layer._parameters[gain] is not None
            self._gain_count += has_one
            self._gain_places.append(self._gain_count if has_one else 0)  # place 0 is that of a 1

    # --- the parameters of a step

    def prepare(self) -> None:
        """Take the parameters as they are now; every `run` uses these."""
        for parameter, slots in zip(self.parameters, self._layout, strict=True):
            pieces = torch.split(parameter, [s.numel for s in slots], dim=1)
            for slot, piece in zip(slots, pieces, strict=True):
                slot.value = piece
        self._values.clear()
        self._parts.clear()
        capped = self._effective()
        for stack in self._stacks:
            self._prepare_stack(stack, [capped.get(id(f), f.value) for f in stack.factors])

    def _effective(self) -> dict[int, Tensor]:
        """The factors that are capped, by the id of their slot."""
        if not self._capped:
            return {}
        weights = [s.value.view(self.count, len(s.names), -1) for s in self._capped]
        one = self._limits_held.new_ones(self.count, 1)
        gains = one.expand(-1, len(self._limits))
        if self._gains:
            held = torch.cat([one, *(slot.value for slot in self._gains)], dim=1)
            gains = held.index_select(1, self._places_held)
        found = cap_rms_each(weights, self._limits_held, gains)
        return {id(s): factor for s, factor in zip(self._capped, found, strict=True)}

    def _prepare_stack(self, stack: _Stack, factors: Sequence[Tensor]) -> None:
        """`factors`: of all layers together, in any shape of models first and numbers last."""
        layer, total = stack.layer, len(stack.members)
        each = [(f, slot.shape) for f, slot in zip(factors, stack.factors, strict=True)]
        none: Sequence[Tensor | None] = [None] * len(stack.parts)
        matrix = none
        own: Sequence[tuple[Tensor, ...]] = [()] * len(stack.parts)
        if stack.plan == STACKED and not isinstance(layer, MixtureLinear):
            w = layer.matrices([f.reshape(-1, *shape) for f, shape in each])
            if torch.is_autocast_enabled(w.device.type):
                w = w.to(torch.get_autocast_dtype(w.device.type))
            matrix = self._split(w.reshape(*self._leading, -1, layer.in_features), stack)
        else:
            split = [
                torch.split(f.view(self.count, total, *shape), stack.parts, dim=1)
                for f, shape in each
            ]
            own = list(zip(*split, strict=True))
        bias = (
            none
            if stack.bias is None
            else self._split(stack.bias.value.view(*self._leading, -1), stack)
        )
        gate = none
        if stack.gate is not None:
            gate = self._split(stack.gate.value.view(*self._leading, -1, layer.in_features), stack)
        begin = 0
        for i, size in enumerate(stack.parts):
            part = _Part(layer, size, matrix[i], own[i], bias[i], gate[i])
            for at, member in enumerate(stack.members[begin : begin + size]):
                self._parts[member] = part, at
            begin += size

    @property
    def _leading(self) -> tuple[int, ...]:
        """The axis of models, which products of one model do without."""
        return () if self.count == 1 else (self.count,)

    def _split(self, t: Tensor, stack: _Stack) -> list[Tensor]:
        """A tensor (R, layers · rows, ...), or of one model (layers · rows, ...), by parts."""
        axis = len(self._leading)
        rows = t.shape[axis] // len(stack.members)
        return list(torch.split(t, [size * rows for size in stack.parts], dim=axis))

    def views(self, index: int) -> Iterator[tuple[list[str], Tensor]]:
        """(names, (R, names, ...)) of the parameters that lie in `parameters[index]`; they have its
        memory."""
        slots, whole = self._layout[index], self.parameters[index].detach()
        for slot, piece in zip(
            slots, torch.split(whole, [s.numel for s in slots], dim=1), strict=True
        ):
            yield slot.names, piece.view(self.count, len(slot.names), *slot.shape)

    @torch.no_grad()
    def model_of(self, run: int) -> nn.Module:
        """A model with the parameters of a run as they are now; until the next call."""
        named = dict(self.model.named_parameters())
        for index in range(len(self.parameters)):
            for names, values in self.views(index):
                for name, value in zip(names, values[run], strict=True):
                    named[name].copy_(value)
        return self.model

    # --- of models in general, see `nas.training.separate`

    def evaluating(self) -> AbstractContextManager[None]:
        """The same: nothing in these models differs between training and evaluation."""
        return nullcontext()

    def extra_state(self) -> dict[str, Any]:
        """None: they have no buffers."""
        return {}

    def load_extra_state(self, saved: Mapping[str, Any], runs: Sequence[int]) -> None:
        """Nothing; see `extra_state`."""

    # --- operations

    def run(self, x: Tensor) -> Tensor:
        """The models' outputs (R, ...) for inputs (R, ...)."""
        self._routed.clear()
        y: Tensor = self.model.run(self, x)  # type: ignore[operator]
        return y

    def structured(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        part, at = self._parts[layers[0]]  # type: ignore[index]
        if at or part.count != len(layers):
            return torch.cat([self._one(layer, x) for layer in layers], dim=-2)
        return self._together(part, x)

    def _one(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A layer of a part alone."""
        part, at = self._parts[layer]  # type: ignore[index]
        axis = len(self._leading)

        def mine(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.chunk(part.count, dim=axis)[at]

        factors = tuple(f[:, at : at + 1] for f in part.factors)
        own = _Part(part.layer, 1, mine(part.matrix), factors, mine(part.bias), mine(part.gate))
        return self._together(own, x)

    def _together(self, part: _Part, x: Tensor) -> Tensor:
        """All layers of a part on x (R, ..., d_in) → (R, ..., layers, d_out)."""
        layer = part.layer
        shape = *x.shape[:-1], part.count, layer.out_features
        if part.matrix is not None:
            return self._dense(x, part.matrix, part.bias).view(shape)
        rows = x.reshape(self.count, -1, layer.in_features)
        if isinstance(layer, MixtureLinear):
            y = self._mixed(part, layer, rows)
        else:
            y = self._apart(part, rows)
        y = y.reshape(self.count, -1, part.count * layer.out_features)
        if part.bias is not None:
            y = y + part.bias.view(self.count, 1, -1)
        return y.view(shape)

    def _dense(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """x (R, ..., d_in), w (R, d_out, d_in), bias (R, d_out) → (R · n, d_out) or (R, n, d_out).

        Of one model w and bias have no first axis.
        """
        if self.count == 1:
            return functional.linear(x.reshape(-1, x.shape[-1]), w, bias)
        rows = x.reshape(self.count, -1, x.shape[-1])
        if bias is None:
            return torch.bmm(rows, w.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), rows, w.transpose(1, 2))

    def _apart(self, part: _Part, rows: Tensor) -> Tensor:
        """Each layer of each model by a kernel of its own: (R, n, d_in) → (R, n, layers, d_out)."""
        found = [
            part.layer.product(rows[r], [f[r, i] for f in part.factors])
            for r in range(self.count)
            for i in range(part.count)
        ]
        if len(found) == 1:
            return found[0]
        n, d_out = found[0].shape
        return torch.stack(found).view(self.count, part.count, n, d_out).transpose(1, 2)

    # --- mixtures

    def _route(self, part: _Part, layer: MixtureLinear, rows: Tensor) -> Routing:
        """Of rows (R, n, d_in): weights, chosen (R, layers, n, k), logits (R, layers, n, E - S)."""
        assert part.gate is not None
        dtype = torch.promote_types(rows.dtype, torch.float32)
        with without_autocast(rows.device):
            logits = self._dense(rows.to(dtype), part.gate.to(dtype), None)
            logits = logits.view(self.count, rows.shape[1], part.count, -1).transpose(1, 2)
            s = layer.structure
            best, chosen = torch.topk(logits, s.active - s.shared, dim=-1)
            weights = softmax(best)
        self._routed.append((part.count, logits, chosen))
        return Routing.of(weights, chosen, logits, s.shared)

    def _plan_of(
        self, layer: MixtureLinear, layers: int, routing: Routing, form: Form
    ) -> MixturePlan | None:
        """The plan for the experts of so many layers of each model; None for a layer's own."""
        stacked = self.count * layers
        if stacked == 1:
            return None
        n, k = routing.chosen.shape
        device = routing.chosen.device
        return choose_for_sizes(
            layer.structure.expert, stacked * layer.structure.experts, k, bucket(n), device.type,
            autocast_dtype(device, self.parameters[0].dtype), form != "both", self.count > 1,
            layer.structure.shared > 0,
        )  # fmt: skip

    def _mixed(self, part: _Part, layer: MixtureLinear, rows: Tensor) -> Tensor:
        """(R, n, d_in) → (R, n, layers, d_out)."""
        routing = self._route(part, layer, rows)
        layers, n = routing.chosen.shape[1:3]
        if layers > 1:
            rows = rows.unsqueeze(1).expand(-1, layers, -1, -1)
        routing = self._as_one(routing)
        plan = self._plan_of(layer, layers, routing, "both")
        y = layer.mixed(rows.reshape(-1, rows.shape[-1]), routing, _flat(part), "both", plan)
        return y.view(self.count, layers, n, -1).transpose(1, 2)

    def _as_one(self, routing: Routing) -> Routing:
        """The gates of several layers (R, layers, n, ·) as one, whose experts are those of all.

        Its logits are one layer's, for the number of experts alone is of use.
        """
        (models, layers), chosen = routing.chosen.shape[:2], routing.chosen
        if models * layers > 1:
            first = torch.arange(models * layers, device=chosen.device) * routing.experts
            chosen = chosen + first.view(models, layers, 1, 1)
        weights, chosen, logits = (
            t.flatten(0, 2) for t in (routing.weights, chosen, routing.logits)
        )
        return Routing(weights, chosen, logits, routing.shared)

    def mixture_block(self, block: MixtureFFN, x: Tensor) -> Tensor:
        (first, _), (second, _) = self._parts[block.mlp_in], self._parts[block.mlp_out]
        one, other = block.mlp_in, block.mlp_out
        rows = x.reshape(self.count, -1, one.in_features)
        routing = self._as_one(self._route(first, one, rows))
        plan = self._plan_of(one, 1, routing, "gather")
        hidden = one.mixed(rows.flatten(0, 1), routing, _flat(first), "gather", plan)
        if first.bias is not None:
            # rows are sorted by expert, and so by model
            total = self.count * one.structure.experts
            each = loads(routing.chosen.flatten(), total).view(self.count, -1).sum(1)
            hidden = hidden + first.bias.view(self.count, -1).repeat_interleave(
                each, dim=0, output_size=len(hidden)
            )
        plan = self._plan_of(other, 1, routing, "combine")
        y = other.mixed(functional.gelu(hidden), routing, _flat(second), "combine", plan)
        y = y.view(*x.shape[:-1], other.out_features)
        if second.bias is None:
            return y
        return y + self._broadcast(second.bias, y)

    def auxiliary_losses(self) -> Tensor | None:
        """Mean over gates of the auxiliary loss of each model in the last run (R,), or None."""
        if not self._routed:
            return None
        losses = [gate_loss(logits, chosen) for logits, chosen in self._grouped()]
        return torch.cat(losses, dim=1).mean(1)

    def _grouped(self) -> list[tuple[Tensor, Tensor]]:
        """Logits (R, gates, n, E) and chosen (R, gates, n, k), both of routed experts, of gates of
        equal shape together."""
        groups: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
        for _, logits, chosen in self._routed:
            groups.setdefault((logits.shape[2:], chosen.shape[2:]), []).append((logits, chosen))
        return [
            (torch.cat([logits for logits, _ in g], 1), torch.cat([chosen for _, chosen in g], 1))
            for g in groups.values()
        ]

    def routers(self) -> list[list[dict[str, Any]]]:
        """What the gates of each model did in the last run; see `routing_statistics`."""
        return [
            [
                routing_statistics(logits[r, i], chosen[r, i])
                for layers, logits, chosen in self._routed
                for i in range(layers)
            ]
            for r in range(self.count)
        ]

    # --- other operations

    def _value(self, parameter: Tensor) -> Tensor:
        """(R, *shape) of one parameter; of one model (*shape)."""
        name = self._names[parameter]
        found = self._values.get(name)
        if found is None:
            slot = self._slots[name]
            value = slot.value
            if len(slot.names) > 1:
                value = value.chunk(len(slot.names), dim=1)[slot.names.index(name)]
            found = self._values[name] = value.view(*self._leading, *slot.shape)
        return found

    def _broadcast(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (R, n), of one model (n), beside x (R, ..., n)."""
        return values if self.count == 1 else values.view(self.count, *(1,) * (x.dim() - 2), -1)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else self._value(layer.bias)
        y = self._dense(x, self._value(layer.weight), bias)
        return y.view(*x.shape[:-1], layer.out_features)

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        weight, bias = self._value(layer.weight), self._value(layer.bias)
        if self.count == 1:
            return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        normed = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        return torch.addcmul(self._broadcast(bias, x), normed, self._broadcast(weight, x))

    def norms(self, layers: Sequence[nn.LayerNorm], x: Tensor) -> Sequence[Tensor]:
        if self.count == 1:
            return [self.norm(n, part) for n, part in zip(layers, x.unbind(-3), strict=True)]
        shape = (self.count, *(1,) * (x.dim() - 4), len(layers), 1, x.shape[-1])
        weight, bias = (
            self._beside([getattr(n, name) for n in layers]).view(shape)
            for name in ("weight", "bias")
        )
        normed = functional.layer_norm(x, layers[0].normalized_shape, eps=layers[0].eps)
        return torch.addcmul(bias, normed, weight).unbind(-3)

    def _beside(self, parameters: Sequence[Tensor]) -> Tensor:
        """(R, parameters · numbers) of neighbours in a slot."""
        names = [self._names[p] for p in parameters]
        slot = self._slots[names[0]]
        if slot.names == names:
            return slot.value
        return torch.cat([self._value(p).view(self.count, -1) for p in parameters], dim=1)

    def embedded(self, table: nn.Embedding, tokens: Tensor) -> Tensor:
        rows = self._value(table.weight)
        if self.count > 1:  # each model its own rows of one table
            first = torch.arange(self.count, device=tokens.device) * table.num_embeddings
            tokens = tokens + first.view(-1, *(1,) * (tokens.dim() - 1))
        return functional.embedding(tokens, rows.reshape(-1, rows.shape[-1]))

    def positions(self, table: nn.Embedding, count: int) -> Tensor:
        rows = self._value(table.weight).unsqueeze(-3)
        return rows if count == rows.shape[-2] else rows[..., :count, :]


def _flat(part: _Part) -> list[Tensor]:
    """The factors of all experts of a part (R · layers · E, ...)."""
    return [factor.flatten(0, 2) for factor in part.factors]


def _equal(model: nn.Module) -> list[list[tuple[str, StructuredLinear]]]:
    """The structured layers with their names, those that differ in their values only together."""
    groups: dict[Any, list[tuple[str, StructuredLinear]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, StructuredLinear):
            gated = layer._parameters.get("gate") is not None
            bias = layer.bias is not None
            key = (
                type(layer),
                layer.structure.fingerprint,
                layer.normalize,
                layer.d_in_base,
                bias,
                gated,
            )
            groups.setdefault(key, []).append((name, layer))
    return list(groups.values())


def _runs_of_norms(module: nn.Module) -> list[list[nn.LayerNorm]]:
    """Neighbours among a module's children that are norms of equal shape."""
    shapes = [
        (c.normalized_shape if isinstance(c, nn.LayerNorm) else None, c) for c in module.children()
    ]
    return [
        [norm for _, norm in run]  # type: ignore[misc]
        for shape, run in groupby(shapes, key=lambda pair: pair[0])
        if shape is not None
    ]
