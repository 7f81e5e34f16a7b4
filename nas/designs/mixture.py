"""Mixtures of experts: a structured layer whose slices are chosen token by token.

    y = Σ_{e shared} W_e x + Σ_{e chosen} g_e(x) W_e x

Of E experts a token uses k: the S shared ones, whatever it is, with weight 1, and k - S of the
others, the routed ones.  g is the softmax over the k - S largest of the E - S logits x·gateᵀ, so
that the weights of the chosen sum to 1.  S is 0 unless given.

Each of E experts W_e is a two-factor einsum: its share of the slices of the ρ axis of one layer, so
that only k of E shares are computed for a token.  With one slice each, experts of β = δ = 0 make up
BTT-MoE (arXiv:2410.02117, section 5).  In dense-MoE an expert is a matrix, in the standard mixture
("ffn-moe") a whole feed-forward block, or one of 1/m of its hidden dimension (`granularity` m).
Shared and fine-grained experts are those of DeepSeekMoE (arXiv:2401.06066), whose weights are
softmax values over all routed experts instead, not made to sum to 1.  1 MAC = 2 FLOPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from nas.designs.design import BlockOf, Choices, Design, Family, LinearRole, Proposals
from nas.designs.einsum import Sizes, Structure, fit_theta, theta_of, with_heads, with_zero
from nas.designs.structure import LinearStructure
from nas.designs.theta import (
    AXES,
    DENSE,
    Theta,
    exact_exponent,
    format_exponent,
    parse_exponent,
    read_options,
)
from nas.errors import InvalidInput

MAX_EXPERTS = 1024
MAX_GRANULARITY = 1024
#: Family → its exponents with their defaults.
_FAMILIES: dict[str, dict[str, float]] = {
    "btt-moe": {"alpha": 0.5, "epsilon": 0.5, "rho": 0.0},
    "low-rank-moe": {"rho": 0.5},
    "dense-moe": {},
    "ffn-moe": {},
    "einsum-moe": {},
}
_COUNTS = {"experts": 8, "active": 2, "shared": 0}
MIXTURE_FORMS = (
    "btt-moe (alpha=1/2, epsilon=1/2, rho=0), low-rank-moe (rho=1/2), dense-moe, ffn-moe "
    "(granularity=1) or einsum-moe:theta=alpha beta gamma delta epsilon phi rho, each with "
    "experts=8, active=2, shared=0, such as btt-moe:experts=16,active=2"
)


@dataclass(frozen=True, slots=True)
class Mixture(Design):
    """E experts of which each token uses k, whatever the dimensions.

    `experts` E and `active` k count the `shared` S, which every token uses: k - S of E - S are
    chosen.  `granularity` m is that of whole feed-forward blocks: each expert has 1/m of their
    hidden dimension, to the nearest whole number.

    `theta` is the structure of the whole layer, kept canonical, whose ρ axis is divided evenly
    among the experts (θρ = 0: one slice each; else the multiple of E nearest to it); None where
    experts are whole feed-forward blocks.

    >>> Mixture(Theta(0.5, 0, 0.5, 0, 0.5, 0.5, 0), 8, 2).name
    'btt-moe:alpha=1/2,epsilon=1/2,experts=8,active=2'
    >>> Mixture(None, 32, 8, shared=2, granularity=4).name
    'ffn-moe:experts=32,active=8,shared=2,granularity=4'

    Raises
    ------
    InvalidInput
        Not 2 to 1024 experts, not 1 to `experts` active ones, not 0 to `active` - 1 shared ones;
        a granularity that is not 1, with θ, or not 1 to 1024, without.
    """

    theta: Theta | None
    experts: int
    active: int
    shared: int = 0
    granularity: int = 1

    def __post_init__(self) -> None:
        if self.theta is not None:
            if not isinstance(self.theta, Theta):
                raise InvalidInput("theta", self.theta, "a Theta, or None for ffn-moe")
            object.__setattr__(self, "theta", self.theta.canonical())
        check_experts(self.experts, self.active, self.shared)
        most = MAX_GRANULARITY if self.theta is None else 1
        if not _is_whole(self.granularity, 1, most):
            accepted = f"a whole number from 1 to {most}"
            if self.theta is not None:
                accepted = "1: E and θρ say how fine the experts of single layers are"
            raise InvalidInput("granularity", self.granularity, accepted)

    @property
    def family(self) -> str:
        """dense-moe, low-rank-moe, btt-moe (Monarch included), einsum-moe or ffn-moe."""
        t = self.theta
        if t is None:
            return "ffn-moe"
        if t.is_dense:
            return "dense-moe"
        if t.beta or t.delta:
            return "einsum-moe"
        return "btt-moe" if t.gamma or t.phi else "low-rank-moe"

    @property
    def kind(self) -> str:
        """What a picture calls it."""
        return "mixture of experts"

    @property
    def exponents(self) -> tuple[float, ...]:
        """θ of the whole layer; none of whole feed-forward blocks."""
        return () if self.theta is None else self.theta.values

    @property
    def name(self) -> str:
        """For people: exponents as fractions or to four digits, those that are 0 left out."""
        t = self.theta
        options = []
        if t is not None and self.family == "einsum-moe":
            options = ["theta=" + " ".join(map(format_exponent, t.values))]
        elif t is not None:
            shown = [axis for axis in _FAMILIES[self.family] if axis != "rho" or t.rho]
            if self.family == "low-rank-moe":
                shown = ["rho"]  # whose default is not 0
            options = [f"{axis}={format_exponent(getattr(t, axis))}" for axis in shown]
        return self._joined(self.family, options)

    @property
    def text(self) -> str:
        """Exact: `parse_mixture` gives back an equal mixture."""
        t, family = self.theta, self.family
        if t is None:
            return self._joined(family, [])
        if family != "einsum-moe":
            exponents = {axis: getattr(t, axis) for axis in _FAMILIES[family]}
            if _theta_of(family, exponents).canonical() == t:
                return self._joined(
                    family, [f"{a}={exact_exponent(v)}" for a, v in exponents.items()]
                )
        return self._joined("einsum-moe", ["theta=" + " ".join(map(exact_exponent, t.values))])

    def _joined(self, family: str, options: list[str]) -> str:
        counts = [f"experts={self.experts}", f"active={self.active}"]
        if self.shared:
            counts.append(f"shared={self.shared}")
        if self.granularity != 1:
            counts.append(f"granularity={self.granularity}")
        return f"{family}:{','.join(options + counts)}"

    def __str__(self) -> str:
        return self.name


def check_experts(experts: Any, active: Any, shared: Any = 0) -> None:
    """Raises `InvalidInput` unless 2 ≤ experts ≤ 1024 and 0 ≤ shared < active ≤ experts."""
    if not _is_whole(experts, 2, MAX_EXPERTS):
        accepted = f"a whole number from 2 to {MAX_EXPERTS}; a mixture has at least 2 experts"
        raise InvalidInput("experts", experts, accepted)
    if not _is_whole(active, 1, experts):
        accepted = f"a whole number from 1 to {experts}, the number of experts"
        raise InvalidInput("active", f"active={active} of experts={experts}", accepted)
    if not _is_whole(shared, 0, active - 1):
        accepted = f"a whole number from 0 to {active - 1}; a token chooses at least one expert"
        raise InvalidInput("shared", f"shared={shared} of active={active}", accepted)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def parse_mixture(text: str) -> Mixture:
    """A mixture from its name and options.

    >>> parse_mixture("btt-moe:experts=16").text
    'btt-moe:alpha=0.5,epsilon=0.5,rho=0.0,experts=16,active=2'

    Raises
    ------
    InvalidInput
        Unknown name or option, an option twice, or a value off its range.
    """
    if not isinstance(text, str) or len(text) > 400:
        raise InvalidInput("mixture", text, MIXTURE_FORMS)
    family = text.strip().partition(":")[0]
    if family not in _FAMILIES:
        raise InvalidInput("mixture", text, MIXTURE_FORMS)
    exponents, counts = dict(_FAMILIES[family]), dict(_COUNTS)
    if family == "ffn-moe":
        counts["granularity"] = 1
    own = ["theta"] if family == "einsum-moe" else [*exponents]
    theta: Theta | None = None
    for key, value in read_options(text.strip(), (*own, *counts), "mixture").items():
        if key in counts:
            if not (value.isascii() and value.isdigit() and len(value) < 10):
                raise InvalidInput(key, value, "a whole number")
            counts[key] = int(value)
        elif key == "theta":
            parts = value.split()
            if len(parts) != len(AXES):
                raise InvalidInput("theta", value, "seven numbers with spaces between them")
            theta = Theta(
                *(_exponent(p, f"theta.{axis}") for p, axis in zip(parts, AXES, strict=True))
            )
        else:
            exponents[key] = _exponent(value, f"theta.{key}")
            if exponents[key] > 1:
                raise InvalidInput(f"theta.{key}", value, "a number from 0 to 1")
    if family == "einsum-moe":
        if theta is None:
            raise InvalidInput("mixture", text, "einsum-moe:theta= with seven numbers")
    elif family != "ffn-moe":
        theta = _theta_of(family, exponents)
    return Mixture(theta, **counts)


def _exponent(text: str, field: str) -> float:
    # as `repr` writes small numbers, which `parse_exponent` leaves out
    if re.fullmatch(r"\d(\.\d{1,17})?e-\d{1,3}", text.strip()):
        return float(text)
    return parse_exponent(text, field)


def _theta_of(family: str, e: dict[str, float]) -> Theta:
    if family == "dense-moe":
        return DENSE
    if family == "low-rank-moe":
        return Theta(1, 0, 0, 0, 1, 0, e["rho"])
    return Theta(e["alpha"], 0, 1 - e["alpha"], 0, e["epsilon"], 1 - e["epsilon"], e["rho"])


@dataclass(frozen=True, slots=True)
class MixtureStructure(LinearStructure):
    """The integers of a mixture for a layer d_in → d_out: one expert, and how many.

    `expert` is the two-factor structure of one expert, or dense; `gated` whether the layer has the
    gate (d_in → E - S), or is told which experts to use.  The last S experts are the shared ones,
    which every token uses; they count among the `experts` and among the `active`.  Fans, and with
    them initialisation and learning rates, are those of one expert, as if its slices were the ρ
    axis.

    >>> s = MixtureStructure.of(parse_mixture("btt-moe:experts=8,active=2"), 1024, 1024)
    >>> s.macs, s.params  # two experts and the gate; eight experts and the gate
    (139264, 532480)
    """

    expert: Structure
    experts: int
    active: int
    gated: bool = True
    shared: int = 0

    def __post_init__(self) -> None:
        check_experts(self.experts, self.active, self.shared)
        if not isinstance(self.expert, Structure):
            raise InvalidInput("expert", self.expert, "the Structure of one expert")

    @staticmethod
    def of(mixture: Mixture, d_in: int, d_out: int, gated: bool = True) -> MixtureStructure:
        """The structure of a mixture for a layer with `d_in` inputs and `d_out` outputs.

        θρ = 0 is one slice per expert; otherwise the slices of the whole layer are the multiple of
        E nearest to ρ = min(d_in, d_out)^θρ, divided evenly.  Where θ amounts to a dense layer, so
        does each expert.

        Raises
        ------
        InvalidInput
            More experts than ρ; a mixture of whole feed-forward blocks; a dimension that
            `Structure.of` refuses.
        """
        if mixture.theta is None:
            accepted = "a mixture with θ; ffn_structures gives the two layers of ffn-moe"
            raise InvalidInput("mixture", mixture.name, accepted)
        return _mixture_structure(mixture, d_in, d_out, gated)

    @staticmethod
    def split(whole: Structure, experts: int, active: int, gated: bool = True) -> MixtureStructure:
        """The structure whose experts share the ρ axis of `whole` evenly.

        Raises
        ------
        InvalidInput
            E does not divide ρ, or is no number of experts.
        """
        check_experts(experts, active)
        rho = whole.sizes.rho
        if rho % experts:
            raise InvalidInput("experts", experts, f"a divisor of the rank axis, ρ={rho}")
        return MixtureStructure(_with_rho(whole, rho // experts), experts, active, gated)

    @property
    def d_in(self) -> int:
        return self.expert.d_in

    @property
    def d_out(self) -> int:
        return self.expert.d_out

    @property
    def routed(self) -> int:
        """The experts that are not shared, E - S, of which a token chooses k - S."""
        return self.experts - self.shared

    @property
    def gate_macs(self) -> int:
        """Multiply-accumulates of the gate per token, and its parameters: d_in·(E - S); 0 if
        none."""
        return self.d_in * self.routed if self.gated else 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token: the k experts that are computed, and the gate."""
        return self.active * self.expert.macs + self.gate_macs

    @property
    def params(self) -> int:
        """Parameters of all experts and the gate, bias not counted."""
        return self.experts * self.expert.params + self.gate_macs

    @property
    def is_dense(self) -> bool:
        """Never: it is not one matrix."""
        return False

    @property
    def is_degenerate(self) -> bool:
        """Whether an expert costs more than a dense one, which can express the same operators."""
        return self.expert.is_degenerate

    @property
    def waste(self) -> float:
        """As `Structure.waste`, of one expert."""
        return self.expert.waste

    @property
    def whole(self) -> Structure:
        """The layer of all slices with equal gates: the expert with E times its ρ axis.

        Of dense experts that is one matrix.
        """
        expert = self.expert
        return _with_rho(expert, expert.sizes.rho * self.experts)

    @property
    def fingerprint(self) -> str:
        """Equal for equal integer operators."""
        gate = "" if self.gated else " ungated"
        if self.shared:
            gate = f" {self.shared}shared{gate}"
        return f"{self.active}of{self.experts}{gate}:{self.expert.fingerprint}"

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors of an expert, in the order they are contracted."""
        return self.expert.factors

    def fans(self, factor: str) -> tuple[int, int]:
        """(fan in, fan out) of a factor of one expert, or of the gate."""
        return (self.d_in, self.routed) if factor == "gate" else self.expert.fans(factor)

    def init_std(self, factor: str) -> float:
        """Standard deviation of a factor at initialisation, that of one expert; 0 of the gate."""
        return 0.0 if factor == "gate" else self.expert.init_std(factor)

    def uses(self, factor: str) -> int:
        """As of one expert; 1 of the gate."""
        return 1 if factor == "gate" else self.expert.uses(factor)

    def adam_lr_multiplier(self, factor: str, d_in_base: int | None = None) -> float:
        """As `Structure.adam_lr_multiplier` of one expert; d_in_base / d_in for the gate."""
        if factor != "gate":
            return self.expert.adam_lr_multiplier(factor, d_in_base)
        return (self.d_in if d_in_base is None else d_in_base) / self.d_in


def ffn_structures(
    mixture: Mixture, width: int, hidden: int
) -> tuple[MixtureStructure, MixtureStructure]:
    """The layers width → hidden/m, gated, and hidden/m → width, ungated, of an ffn-moe block.

    Of granularity m, to the nearest whole number.

    Raises
    ------
    InvalidInput
        A mixture with θ; a granularity above `hidden`.
    """
    if mixture.theta is not None:
        raise InvalidInput("mixture", mixture.name, "ffn-moe, whose experts are whole blocks")
    if mixture.granularity > hidden:
        accepted = f"at most the hidden dimension of the block, {hidden}"
        raise InvalidInput("granularity", mixture.granularity, accepted)
    each = round(hidden / mixture.granularity)
    one, other = Structure.of(DENSE, width, each), Structure.of(DENSE, each, width)
    counts = mixture.experts, mixture.active
    return (
        MixtureStructure(one, *counts, gated=True, shared=mixture.shared),
        MixtureStructure(other, *counts, gated=False, shared=mixture.shared),
    )


@lru_cache(maxsize=65536)
def _mixture_structure(mixture: Mixture, d_in: int, d_out: int, gated: bool) -> MixtureStructure:
    assert mixture.theta is not None
    expert, experts = Structure.of(mixture.theta, d_in, d_out), mixture.experts
    if expert.is_dense:
        expert = Structure.of(DENSE, d_in, d_out)
    elif mixture.theta.rho:
        rho = expert.sizes.rho
        if rho < experts:
            accepted = f"at most the rank axis of θ at {d_in} → {d_out}, ρ={rho}, or θρ = 0"
            raise InvalidInput("experts", experts, accepted)
        expert = _with_rho(expert, round(rho / experts))
    return MixtureStructure(expert, experts, mixture.active, gated, mixture.shared)


def _with_rho(structure: Structure, rho: int) -> Structure:
    """The same with another number of slices, with the θρ that it amounts to."""
    narrow = min(structure.d_in, structure.d_out)
    exponent = min(1.0, math.log(rho) / math.log(narrow)) if narrow > 1 else 0.0
    s = structure.sizes
    return Structure(
        replace(structure.theta, rho=exponent),
        structure.d_in,
        structure.d_out,
        Sizes(s.alpha, s.beta, s.gamma, s.delta, s.epsilon, s.phi, rho),
    )


def inspect_mixture(mixture: Mixture, d_in: int, d_out: int) -> dict[str, object]:
    """Everything exact about a mixture at d_in → d_out, as plain JSON values.

    `macs` and `flops` are per token and forward, the k experts that it uses and the gate;
    `experts_macs_all` is what computing all experts would take.  `sizes`, `rank`, `waste` and
    `factors` are those of one expert, `rho` the slices of all.

    Raises
    ------
    InvalidInput
        As `MixtureStructure.of`.
    """
    structure = MixtureStructure.of(mixture, d_in, d_out)
    assert mixture.theta is not None
    expert, s = structure.expert, structure.expert.sizes
    return {
        **structure.counts(),
        "theta": list(mixture.theta.values),
        "name": mixture.name,
        "text": mixture.text,
        "family": mixture.family,
        "experts": mixture.experts,
        "active": mixture.active,
        "shared": mixture.shared,
        "sizes": asdict(s),
        "rho": s.rho * mixture.experts,
        "expert_dense": expert.is_dense,
        "einsum": expert.einsum,
        "gate_macs": structure.gate_macs,
        "expert_macs": expert.macs,
        "experts_macs_all": mixture.experts * expert.macs,
        "rank": expert.rank,
        "padded_in": expert.padded_in,
        "padded_out": expert.padded_out,
        "waste": structure.waste,
        "factors": [structure.factor_row(f) for f in (*structure.factors, "gate")],
    }


def _inspect_feed_forward(mixture: Mixture, width: int, hidden: int) -> dict[str, object]:
    """A feed-forward block width → hidden → width of experts; dense MACs are those of the block
    without experts."""
    first, second = ffn_structures(mixture, width, hidden)
    macs = first.macs + second.macs
    return {
        "name": mixture.name,
        "family": mixture.family,
        "theta": [],
        "experts": mixture.experts,
        "active": mixture.active,
        "shared": mixture.shared,
        "granularity": mixture.granularity,
        "d_in": width,
        "d_out": hidden,
        "contraction": [f"{width} → {first.d_out} → {width}, experts whole"],
        "macs": macs,
        "gate_macs": first.gate_macs,
        "flops": 2 * macs,
        "params": first.params + second.params,
        "dense_macs": 2 * width * hidden,
        "fingerprint": f"{first.fingerprint} {second.fingerprint}",
    }


def _inspect(mixture: Mixture, d_in: int, d_out: int) -> dict[str, object]:
    inspect = _inspect_feed_forward if mixture.theta is None else inspect_mixture
    return inspect(mixture, d_in, d_out)


def _in_role(mixture: Mixture, role: LinearRole) -> LinearStructure:
    """Experts that are whole blocks take the place of both feed-forward layers; the rest is
    dense."""
    if mixture.theta is not None:
        return MixtureStructure.of(mixture, role.d_in, role.d_out)
    if role.name == "mlp_in":
        return ffn_structures(mixture, role.d_in, role.d_out)[0]
    if role.name == "mlp_out":
        return ffn_structures(mixture, role.d_out, role.d_in)[1]
    return Structure.of(DENSE, role.d_in, role.d_out)


def _with_heads(structure: MixtureStructure, heads: int, side: str) -> MixtureStructure:
    return replace(structure, expert=with_heads(structure.expert, heads, side))


def _fit(mixture: Mixture, width: int, block: BlockOf) -> Mixture:
    """The mixture with whole slices for each expert, of which none costs more than dense.

    Of one expert, for the experts together express more than a dense layer.  Dense experts and
    feed-forward experts are as they are.
    """
    theta, experts = mixture.theta, mixture.experts
    if theta is None or theta.is_dense:
        return mixture
    # as `MixtureStructure.of` divides them; a rank axis of exponent 0 says one slice an expert
    whole = round(width**theta.rho)
    divides = theta.rho == 0 or whole >= experts
    slices = max(1, round(whole / experts))
    one = replace(theta, rho=min(1.0, math.log(slices) / math.log(width)))
    own = fit_theta(one, width, block)
    if own.is_dense:
        return replace(mixture, theta=DENSE)
    if own == one and divides:
        return mixture
    slices = max(1, round(width**own.rho))
    rho = min(1.0, math.log(slices * experts) / math.log(width)) if slices > 1 else 0.0
    return replace(mixture, theta=replace(own, rho=rho))


def _alone(mixture: Mixture) -> str | None:
    if mixture.theta is not None:
        return None
    return "experts in each layer, such as dense-moe: these are whole feed-forward blocks"


def _low_rank(point: Mapping[str, Any]) -> Theta:
    # at least one slice for each expert; `_fit` makes it whole ones
    return Theta(1, 0, 0, 0, 1, 0, with_zero(point["rho_share"]))


def _btt(point: Mapping[str, Any]) -> Theta:
    return theta_of({**point, "beta_share": 0.0, "delta_share": 0.0})


def _proposals(
    name: str, theta: Callable[[Mapping[str, Any]], Theta | None], *, finer: bool = False
) -> Proposals:
    def examples(choices: Choices) -> dict[str, None]:  # the least and the most, if they differ
        found: dict[str, None] = {}
        for least, most in ((min, max), (max, min)):
            text = f"{name}:experts={least(choices.experts)},active={least(choices.active)}"
            if shared := most(choices.shared):
                text += f",shared={shared}"
            if finer and (granularity := most(choices.granularity)) != 1:
                text += f",granularity={granularity}"
            found[text] = None
        return found

    return Proposals(
        design=lambda point: Mixture(
            theta(point),
            point["experts"],
            point["active"],
            point["shared"],
            point["granularity"] if finer else 1,
        ),
        choices=("experts", "active", "shared", *(("granularity",) if finer else ())),
        examples=examples,
        # an expert costs at most a dense layer, and only routed ones a column of the gate
        dearest=lambda choices: Mixture(
            DENSE, max(choices.experts), max(choices.active), min(choices.shared)
        ),
    )


FAMILY = Family(
    design=Mixture,
    structure=MixtureStructure.of,
    layer="nas.layers.mixture:MixtureLinear",
    structures=MixtureStructure,
    forms="btt-moe:experts=8,active=2, low-rank-moe, dense-moe, ffn-moe",
    # a parenthesis opens a sum, whose parts are texts of their own
    reads=lambda text: text.partition(":")[0].endswith("-moe") and "(" not in text,
    parse=parse_mixture,
    inspect=_inspect,
    with_heads=_with_heads,
    has_blocks=lambda mixture: mixture.theta is not None and not mixture.theta.is_dense,
    in_role=_in_role,
    fit=_fit,
    alone=_alone,
    proposals={
        "btt-moe": _proposals("btt-moe", _btt),
        "low-rank-moe": _proposals("low-rank-moe", _low_rank),
        "dense-moe": _proposals("dense-moe", lambda point: DENSE),
        "ffn-moe": _proposals("ffn-moe", lambda point: None, finer=True),
    },
)
