"""What every structured linear layer has, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from nas.designs.structure import PARAMETRIZATIONS, LinearStructure, Parametrization
from nas.errors import InvalidInput
from nas.layers.alternating import drawn, nearest_factors
from nas.layers.fitting import Fit, check_weight
from nas.layers.kernels import measuring
from nas.layers.modes import (
    autocast_dtype,
    is_recorded,
    over_nested,
    plus_bias,
    reshaped_like,
)
from nas.layers.normalization import cap_rms
from nas.layers.record import LayerRecord
from nas.rates import current_rates

if TYPE_CHECKING:
    from cola.ops import LinearOperator

_Structure = TypeVar("_Structure", bound=LinearStructure)


#: Tensor operations of a layer that runs by itself, forward and backward.
APART_OPERATIONS = 30
#: Time of a structure's multiply-accumulates over that of a dense layer's.
_SLOWER = 3.0
#: What a dense weight can be projected to.
OF_ONE_MATRIX = (
    "a design of one matrix: two factors, chains, blast, block-sparse, convolutions, and sums of "
    "these"
)
#: Ends the name under which a state_dict holds what a layer is.
RECORD = "_extra_state"


class StructuredLinear(nn.Module):
    """A map (..., d_in) → (..., d_out) of some structure, in the place of a dense linear one.

    It is linear itself, but for mixtures and `nas.layers.ActivatedLinear`.

    A family's class gives `_shapes`, `product`, `plain`,
    `_checked_plan` and `_chosen_plan`.  Parameters lie in the order factors, gains, others of
    `_shapes`, bias.

    A `state_dict` holds a record of what the layer is beside its tensors; a layer that computes
    something else from the same tensors refuses them.  See `nas.layers.saving`.
    """

    structure: LinearStructure
    in_features: int
    out_features: int
    #: input dimension of this layer in the base model at which the learning rate was tuned
    d_in_base: int
    normalize: bool
    zero_init: bool
    #: by which rule the factors were drawn and `param_groups` sets their learning rates
    parametrization: Parametrization = "published"
    bias: Tensor | None
    #: Frobenius ‖W − Ŵ‖ / ‖W‖ of the dense matrix this layer was fitted to, if it was
    relative_error: float | None = None
    #: whether it multiplies every token by one matrix, which may be near to a dense one
    is_matrix: ClassVar[bool] = True
    #: whether it took the place of a layer whose weight is the transpose of its own
    in_place_of_conv1d: bool = False
    _plan: Any = None

    def __init__(
        self,
        structure: LinearStructure,
        d_in: int,
        d_out: int,
        bias: bool,
        zero_init: bool,
        normalize: bool,
        gain: bool,
        d_in_base: int | None,
        plan: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.structure = sized(structure, d_in, d_out)
        self.plan = plan
        self.in_features, self.out_features = d_in, d_out
        self.zero_init, self.normalize = zero_init, normalize
        self.d_in_base = d_in if d_in_base is None else d_in_base
        shapes = dict(self._shapes())
        #: name, parameter and initial standard deviation of each factor, which compiled code
        #: cannot work out
        self._factors = tuple(
            (name, parameter, structure.init_std(name))
            for name, parameter in zip(structure.factors, shapes, strict=False)
        )

        def register(name: str, shape: tuple[int, ...] | None) -> None:
            empty = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))

        for _, parameter, _ in self._factors:
            register(parameter, shapes.pop(parameter))
        for name, _, _ in self._factors:
            register(f"gain_{name}", (1,) if normalize and gain else None)
        for name, shape in shapes.items():
            register(name, shape)
        register("bias", (d_out,) if bias else None)
        self.reset_parameters()

    def _shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """The shapes of the learned tensors by parameter name: those of `structure.factors` in
        their order, then others, None for one that this layer does not have."""
        raise NotImplementedError

    def blocks(self, factor: str, t: Tensor) -> Tensor:
        """A factor, or what has its shape, as the matrices by which it multiplies where factors are
        contracted in their order: (..., its shape) → (..., blocks, f_out, f_in), a view."""
        fan_in, fan_out = self.structure.fans(factor)
        lead = t.shape[: t.dim() - self.factors()[factor].dim()]
        if factor == self.structure.factors[0]:
            return t.view(*lead, -1, fan_out, fan_in)
        return t.view(*lead, -1, fan_in, fan_out).mT  # later ones are stored the other way round

    def reparametrize(self, parametrization: Parametrization) -> None:
        """Draw the factors anew by a rule, by which `param_groups` then sets their learning rates.

        Raises
        ------
        InvalidInput
            No such rule.
        """
        if parametrization not in PARAMETRIZATIONS:
            accepted = " | ".join(PARAMETRIZATIONS)
            raise InvalidInput("parametrization", parametrization, accepted)
        self.parametrization = parametrization
        self._factors = tuple(
            (name, parameter, self.structure.init_std(name) * self._gains(name)[0])
            for name, parameter, _ in self._factors
        )
        self.reset_parameters()

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """That of the structure under the layer's parametrization."""
        return self.structure.adam_lr_multiplier(factor, d_in_base) * self._gains(factor)[1]

    def _gains(self, factor: str) -> tuple[float, float]:
        """Of standard deviation and Adam learning rate over the published ones; a gate has none."""
        if self.parametrization == "spectral" and factor in self.structure.factors:
            return self.structure.spectral_gains(factor)
        return 1.0, 1.0

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors anew: normal, by the layer's parametrization."""
        for name, parameter, std in self._factors:
            factor, gain = getattr(self, parameter), getattr(self, f"gain_{name}")
            factor.normal_(0.0, std, generator=generator)
            if gain is not None:
                gain.fill_(1.0)
        if self.zero_init:  # the factor that is contracted last alone, so that gradients flow
            factor.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out); no tokens give an empty output.

        Raises
        ------
        ValueError
            Another last dimension than d_in.
        TypeError
            A dtype that is not the layer's, unless autocast is on; integers and complex numbers.
        """
        if is_recorded(x):
            y = self.plain(x.reshape(-1, self.in_features), self.effective_factors())
            y = y if self.bias is None else y + self.bias.to(y.dtype)
            return reshaped_like(y, x, self.out_features)
        if x.is_nested:
            return over_nested(self, x)
        self._check(x)
        y = self.product(x.reshape(-1, self.in_features), self.effective_factors())
        return self._finished(y, x)

    def _finished(self, y: Tensor, x: Tensor) -> Tensor:
        """A product (n, d_out), not saved by autograd, with the bias and the input's dimensions."""
        if self.bias is not None:
            y = plus_bias(y, self.bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """(n, d_in) → (n, d_out), contiguous, without the bias; as fast as can be.

        `factors` are what `effective_factors` gives, of this layer or of one like it.
        """
        raise NotImplementedError

    def plain(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The same by operators of torch alone, which a program without this package can run.

        Nothing depends on the values or the number of rows of `x`, which may be a proxy.
        """
        raise NotImplementedError

    def matrices(self, factors: Sequence[Tensor]) -> Tensor:
        """W (n, d_out, d_in) of n layers like this one, whose factors are stacked: (n, *shape)."""
        eye = torch.eye(self.in_features, dtype=factors[0].dtype, device=factors[0].device)
        rows = torch.func.vmap(lambda *own: self.plain(eye, own))(*factors)
        return rows.transpose(1, 2)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, design: Any, *, d_in_base: int | None = None) -> Self:
        """The layer of a design nearest to a dense one in Frobenius norm, with its bias.

        How near is in `relative_error`: ‖W − Ŵ‖ / ‖W‖.

        - Two factors: a truncated SVD per pair (γ, φ), and so globally optimal, where nothing is
          padded: the SVD of low-rank, the rearranged SVD of Kronecker and Tensor-Train, the block
          SVD of Monarch and BTT.  Where padding leaves entries of the matrix free, alternating
          least squares goes on from it.
        - Block-sparse layers and convolutions: least squares in their one factor, the optimum.
        - Chains, from a truncated SVD for each bond, and BLAST, from the SVD of its rank:
          alternating least squares; a local optimum that is no farther than its start.
        - Sums: each part in turn is fitted to what the other leaves, beginning with the better of
          both; no farther than either part alone.

        Raises
        ------
        InvalidInput
            Not a `torch.nn.Linear`; a weight with NaN or infinity or on the meta device; a mixture,
            whose matrix is another for each token.

        >>> from nas.layers import EinsumLinear
        >>> dense = nn.Linear(64, 64)
        >>> layer = EinsumLinear.from_linear(dense, "btt:rho=1/2")
        >>> layer.relative_error < 1e-6  # at ρ = 1/2 a square BTT can be any matrix
        True
        """
        if not isinstance(linear, nn.Linear):
            raise InvalidInput("linear", type(linear).__name__, "a torch.nn.Linear")
        if not cls.is_matrix:
            raise InvalidInput("linear", f"a weight for a {cls.__name__}", OF_ONE_MATRIX)
        made: Any = cls  # whose constructor is that of a family
        layer: Self = made(
            design, linear.in_features, linear.out_features, linear.bias is not None,
            d_in_base=d_in_base, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        layer.take_nearest(linear.weight)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def take_nearest(self, weight: Tensor) -> None:
        """Set the factors, which nothing normalises, to those nearest to `weight` (d_out, d_in)."""
        if weight.is_meta:
            raise InvalidInput("linear", "a weight on the meta device", "a weight with values")
        fit = self.nearest(weight)
        for (_, parameter, _), factor in zip(self._factors, fit.factors, strict=True):
            getattr(self, parameter).copy_(factor)
        self.relative_error = fit.relative_error

    def nearest(self, weight: Tensor, start: Sequence[Tensor] | None = None) -> Fit:
        """The factors nearest to `weight` (d_out, d_in), in its dtype; see `from_linear`.

        From a `start`, where a family begins with one, alternating least squares makes one sweep.
        """
        check_weight(weight, self.structure)
        return nearest_factors(
            weight,
            lambda factors: self.matrices([factor.unsqueeze(0) for factor in factors])[0],
            self._start(weight.double()) if start is None else start,
            [std for _, _, std in self._factors],
            **({} if start is None else {"max_sweeps": 1}),
        )

    def _start(self, weight: Tensor) -> Sequence[Tensor]:
        """Factors from which those nearest to `weight` (d_out, d_in) are sought."""
        shapes = [getattr(self, parameter).shape for _, parameter, _ in self._factors]
        if len(shapes) == 1:
            return [weight.new_zeros(shapes[0])]
        return drawn(shapes, [std for _, _, std in self._factors])

    @property
    def record(self) -> LayerRecord:
        """What this layer is built from."""
        gain = any(name.startswith("gain_") for name, _ in self.named_parameters(recurse=False))
        return LayerRecord(
            self.structure,
            self.bias is not None, self.normalize, gain, self.zero_init, self.d_in_base,
            self.parametrization,
        )  # fmt: skip

    def get_extra_state(self) -> Tensor:
        """The record of the layer, for its state_dict."""
        return self.record.to_tensor()

    def set_extra_state(self, state: Any) -> None:
        """Checks that the tensors beside this record mean the same here.

        Raises
        ------
        InvalidInput
            They do not, or this is no record.
        """
        found = LayerRecord.of_tensor(state)
        if found.computes != self.record.computes:
            raise InvalidInput("state_dict", f"the tensors of {found}", f"those of {self.record}")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_plain_matrix:
            del destination[prefix + RECORD]

    @property
    def is_plain_matrix(self) -> bool:
        """Whether `torch.nn.Linear` computes the same from the same state_dict."""
        weight = self._parameters.get("weight")
        plain = not self.normalize and self.d_in_base == self.in_features
        plain = plain and not self.in_place_of_conv1d
        return plain and weight is not None and weight.dim() == 2

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + RECORD
        for name, parameter in self.named_parameters(recurse=False):
            stored = state_dict.get(prefix + name)
            if parameter.shape == (1,) and isinstance(stored, Tensor) and not stored.dim():
                state_dict[prefix + name] = stored.reshape(1)  # as gains were stored once
        try:
            if key in state_dict:
                self.set_extra_state(state_dict[key])
        except InvalidInput as error:  # before any tensor is taken over
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:  # of before there were records
            missing_keys.remove(key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # memory formats are for images, which factors of four or five axes are not
        def flat(tensor: Tensor) -> Tensor:
            plain = type(tensor) in (Tensor, nn.Parameter)  # nor a shard of one
            if plain and tensor.dim() in (4, 5) and tensor.is_contiguous():
                return fn(tensor.view(-1)).view(tensor.shape)
            return fn(tensor)

        applied: Self = super()._apply(flat, recurse)  # type: ignore[no-untyped-call]
        return applied

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "weight":
                raise
            matrix = "its matrix is to_matrix(), and " if self.structure.is_linear else ""
            raise AttributeError(
                f"{self._described()} has no weight: {matrix}select= of replace_linears leaves out "
                "a layer whose weight is read"
            ) from None

    def factors(self) -> dict[str, nn.Parameter]:
        """The learned tensors with a learning rate of their own, by the names that
        `structure.adam_lr_multiplier` knows: factors, and a gate."""
        return {name: getattr(self, parameter) for name, parameter, _ in self._factors}

    def effective_factors(self) -> list[Tensor]:
        """The factors as they enter the product: capped at their initial RMS and scaled."""
        if not self.normalize:
            return [getattr(self, parameter) for _, parameter, _ in self._factors]
        return [
            cap_rms(getattr(self, parameter), std, getattr(self, f"gain_{name}"))
            for name, parameter, std in self._factors
        ]

    def _any_factor(self) -> Tensor:
        """A factor, for the layer's dtype and device."""
        factor: Tensor = getattr(self, self._factors[0][1])
        return factor

    def _check(self, x: Tensor) -> None:
        """Raise `ValueError` or `TypeError` for an input of another dimension or dtype."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._described()} got an input of shape {tuple(x.shape)}; "
                f"its last dimension must be {self.in_features}"
            )
        dtype = self._any_factor().dtype
        if x.dtype == dtype:
            return
        alike = autocast_dtype(x.device, x.dtype) == autocast_dtype(x.device, dtype)
        if not (x.is_floating_point() and alike):
            raise TypeError(
                f"{self._described()} got an input of dtype {x.dtype}; "
                f"it must be {dtype}, the dtype of the layer, or floating point under autocast"
            )

    def _described(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    @property
    def plan(self) -> Any:
        """The execution plan that was fixed, or None where each input chooses its own.

        Set it to a plan of the layer's family, to its text, or to None.  Plans change speed and
        memory, and the result by rounding only; they are no part of `state_dict`.

        >>> from nas.layers import layer_of
        >>> layer = layer_of("monarch", 64, 64)
        >>> layer.plan = "a-first tile=128 first=batched second=batched gemm=blas"
        >>> str(layer.plan_for(1024))
        'a-first tile=128 first=batched second=batched gemm=blas'
        >>> str(layer_of("btt-moe", 64, 64, plan="grouping=batched").plan_for(1024))
        'grouping=batched'
        """
        return self._plan

    @plan.setter
    def plan(self, value: Any) -> None:
        self._plan = None if value is None else self._checked_plan(value)

    def _checked_plan(self, value: Any) -> Any:
        """The plan of this value, if it can run the layer's structure; else `InvalidInput`."""
        raise NotImplementedError

    def plan_for(
        self, tokens: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The plan that runs an input of `tokens` tokens: the fixed one, else the chosen one.

        `device` and `dtype` are those of the product (under autocast its dtype); the layer's by
        default.
        """
        if self._plan is not None:
            return self._plan
        factor = self._any_factor()
        device = factor.device if device is None else device
        return self._chosen_plan(tokens, device, factor.dtype if dtype is None else dtype)

    def _chosen_plan(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The plan for `tokens` tokens where none is fixed."""
        raise NotImplementedError

    def measure_plan(self, tokens: int, dtype: torch.dtype | None = None) -> Any:
        """Time the plans worth trying on inputs of `tokens` tokens; remember, return the fastest.

        From then on every layer of this structure that has no fixed plan runs it on inputs of so
        many tokens, on this device, in this dtype and with this number of threads; see
        `nas.layers.kernels.measuring`.  Where there is one way to run the layer, that is returned.

        Raises
        ------
        InvalidInput
            No token.
        """
        measuring.check_tokens(tokens)
        factor = self._any_factor()
        device, dtype = factor.device, factor.dtype if dtype is None else dtype
        plans = self._plans_to_try(tokens, device, dtype)
        if len(plans) == 1:
            return plans[0]
        kind: Any = type(self)  # whose constructor is that of a family
        layer = kind(
            self.structure, self.in_features, self.out_features, False, device=device, dtype=dtype
        )
        draw = torch.Generator(device).manual_seed(0)
        for parameter in layer.parameters():  # gates too, which begin at zero
            if not parameter.any():
                with torch.no_grad():
                    parameter.normal_(generator=draw)
        shape = tokens, self.in_features
        x = torch.randn(shape, generator=draw, device=device, dtype=dtype, requires_grad=True)

        def run(plan: Any) -> None:
            layer.plan = plan
            layer(x).sum().backward()

        with torch.enable_grad():
            return measuring.fastest(self.structure, tokens, device, dtype, plans, run)

    def _plans_to_try(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Sequence[Any]:
        """The plans among which `measure_plan` looks for the fastest."""
        return [self._chosen_plan(tokens, device, dtype)]

    def expected_seconds(self, tokens: int) -> float:
        """Seconds of forward and backward on a CPU, roughly; see `nas.rates`.

        A family with a cost model of its own knows better than this.
        """
        macs = 3 * tokens * self.structure.macs
        return (
            APART_OPERATIONS * current_rates().operation + macs * _SLOWER * current_rates().blas_mac
        )

    def to_matrix(self) -> Tensor:
        """The matrix W (d_out, d_in) that the layer applies, without the bias."""
        factor = self._any_factor()
        eye = torch.eye(self.in_features, dtype=factor.dtype, device=factor.device)
        # one token for each input
        return self.product(eye, self.effective_factors()).t().contiguous()

    def as_operator(self) -> LinearOperator:
        """W (d_out, d_in) as a linear operator of CoLA (extra ``cola``), without the bias.

        Products with it, ``A @ x`` for x (d_in,) or (d_in, k) and ``y @ A``, are those of the
        layer, in its dtype and on its device; W is not built for them.  Normalised factors and
        gains are in it as they are now: after a training step, or a backward pass through them,
        ask for another operator.  `cola.linalg` has solves, log-determinants, traces and more;
        gradients reach the factors through its direct algorithms and CG.

        What cola can take apart it gets in parts, so that its solves and log-determinants are
        direct at any size: a `cola.ops.Kronecker` of two square factors, and a structure of two
        factors with square blocks in both, such as a square Monarch.  Any other it solves by
        default by an LU decomposition of W up to 10^6 entries, else by GMRES.
        Source: arXiv:2309.03060.

        Raises
        ------
        InvalidInput
            A layer that is not one matrix: a mixture, or one with an activation inside.
        ImportError
            cola is not installed.

        >>> import cola
        >>> from nas.layers import EinsumLinear
        >>> _ = torch.manual_seed(0)
        >>> layer = EinsumLinear("kronecker", 64, 64, dtype=torch.float64)
        >>> A, b = layer.as_operator(), torch.ones(64, dtype=torch.float64)
        >>> x = cola.linalg.solve(A, b)
        >>> torch.allclose(layer.to_matrix() @ x, b)
        True
        """
        from nas.layers.operators import operator_of

        return operator_of(self)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense `torch.nn.Linear` that computes the same, with parameters of its own."""
        w = self.to_matrix()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, w.device, w.dtype
        )
        linear.weight.copy_(w)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def _design_repr(self) -> str:
        """How `extra_repr` begins: which of the family's designs this is."""
        return f"theta={self.structure.theta}"  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        s = self.structure
        rank = f", rank={s.rank}" if hasattr(s, "rank") else ""
        return (
            f"{self._design_repr()}, d_in={s.d_in}, d_out={s.d_out}, "
            f"bias={self.bias is not None}, macs={s.macs}{rank}"
        )


def sized(structure: _Structure, d_in: int, d_out: int) -> _Structure:
    """The structure itself; `InvalidInput` unless it is of a layer d_in → d_out."""
    if (structure.d_in, structure.d_out) != (d_in, d_out):
        accepted = f"{structure.d_in}, {structure.d_out}, the dimensions of the structure"
        raise InvalidInput("d_in, d_out", f"{d_in}, {d_out}", accepted)
    return structure
