"""Every execution plan of a layer: the same result, its gradients, its memory, its text."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, Plan, layer_of
from nas.layers.kernels import einsum as kernels
from nas.layers.kernels.contraction import contract, plain
from nas.layers.kernels.measuring import remember_plans, remembered_plans
from nas.layers.kernels.plan import candidates, choose, onednn_available
from tests.support.strategies import thetas
from tests.support.tiers import thinned

NAMES = ["monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "tensor-train:rho=1/4",
         "1/2,1/4,1/4,1/4,1/2,1/4,1/4"]  # fmt: skip
CPU = torch.device("cpu")
LIBRARIES = ["blas", "onednn"] if onednn_available() else ["blas"]
dimensions = st.integers(1, 40)
Out = TypeVar("Out")


def plans_of(structure: Structure, tile: int, libraries: list[str]) -> list[Plan]:
    """All plans that can run a structure, with this tile."""
    found = [Plan("materialised", gemm=g) for g in libraries]  # type: ignore[arg-type]
    if structure.is_dense:
        return found
    single = structure.sizes.gamma * structure.sizes.phi == 1
    orders, firsts = ("a-first", "b-first"), ("batched", "blocks")
    seconds = (*firsts, "tokens") if single else firsts
    for order, first, second, library in product(orders, firsts, seconds, libraries):
        found.append(Plan(order, tile, first, second, library))  # type: ignore[arg-type]
    return found


def gradients(layer: EinsumLinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dX and the gradients of all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def by_matrix(layer: EinsumLinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The same through W from its definition and automatic differentiation."""
    x = x.detach().requires_grad_()
    if layer.structure.is_dense:
        w: Tensor = layer.weight
    else:
        w = torch.einsum("grfda,fgrbe->fedgba", layer.A, layer.B)
        w = w.reshape(layer.structure.padded_out, layer.structure.padded_in)
        w = w[: layer.out_features, : layer.in_features]
    y = x @ w.T if layer.bias is None else x @ w.T + layer.bias
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@settings(max_examples=100, deadline=None)
@given(thetas(), dimensions, dimensions, st.integers(1, 7), st.integers(0, 4), st.booleans())
def test_every_plan_is_the_matrix_and_its_gradient(
    theta: Theta, d_in: int, d_out: int, n: int, tile: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = EinsumLinear(theta, d_in, d_out, bias, dtype=torch.float64)
    x, dy = torch.randn(n, d_in).double(), torch.randn(n, d_out).double()
    expected = by_matrix(layer, x, dy)
    for plan in plans_of(layer.structure, tile, ["blas"]):
        layer.plan = plan
        for got, want in zip(gradients(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=str(plan))


@pytest.mark.parametrize(("d_in", "d_out"), [(64, 96), (61, 101)])
@pytest.mark.parametrize("name", [*NAMES, "1/3,0,2/3,0,1/3,2/3,0", "1/3,0,2/3,0,2/3,1/3,1/4"])
def test_products_with_few_columns_are_transposed(name: str, d_in: int, d_out: int) -> None:
    """So many tokens that rows are many and columns few, which examples of any size leave out."""
    torch.manual_seed(0)
    layer = EinsumLinear(name, d_in, d_out, dtype=torch.float64)
    x, dy = torch.randn(70, d_in).double(), torch.randn(70, d_out).double()
    expected = by_matrix(layer, x, dy)
    for plan in (p for tile in (0, 33) for p in plans_of(layer.structure, tile, ["blas"])):
        layer.plan = plan
        for got, want in zip(gradients(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=str(plan))


def test_few_columns_are_met_by_these_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[torch.Size] = []
    into = kernels._transpose_into

    def noted(out: Tensor, product: Tensor) -> None:
        turned.append(out.shape)
        into(out, product)

    monkeypatch.setattr(kernels, "_transpose_into", noted)
    layer = EinsumLinear("1/3,0,2/3,0,1/3,2/3,0", 64, 96, plan=Plan("a-first"))
    layer(torch.randn(70, 64)).sum().backward()
    assert turned


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 36), (37, 29)])
@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_single_precision_plans_agree(name: str, d_in: int, d_out: int) -> None:
    torch.manual_seed(0)
    layer = EinsumLinear(name, d_in, d_out)
    x, dy = torch.randn(2, 9, d_in), torch.randn(2, 9, d_out)
    expected = by_matrix(layer, x, dy)
    for plan in plans_of(layer.structure, 4, LIBRARIES):
        layer.plan = plan
        for got, want in zip(gradients(layer, x, dy), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=str(plan))


def test_the_matrix_helper_notices_a_wrong_factor() -> None:
    layer = EinsumLinear("btt:rho=1/4", 24, 36)
    x, dy = torch.randn(3, 24), torch.randn(3, 36)
    right = gradients(layer, x, dy)
    with torch.no_grad():
        layer.B.copy_(layer.B.flip(2))
    assert not torch.allclose(by_matrix(layer, x, dy)[0], right[0], atol=1e-4)


@pytest.mark.parametrize("name", thinned(NAMES, 3))
@pytest.mark.parametrize("shape", [(6, 8), (7, 5)])
def test_first_and_second_derivatives_of_every_plan(name: str, shape: tuple[int, int]) -> None:
    structure = Structure.of(parse_theta(name), *shape)
    layer = EinsumLinear(name, *shape, bias=False, dtype=torch.float64)
    x = torch.randn(3, shape[0], dtype=torch.float64, requires_grad=True)
    for plan in plans_of(structure, 2, ["blas"]):
        arguments = (x, layer.A, layer.B)

        def product(x: Tensor, a: Tensor, b: Tensor, plan: Plan = plan) -> Tensor:
            return contract(x, a, b, shape[1], plan)

        assert torch.autograd.gradcheck(product, arguments)
    assert torch.autograd.gradgradcheck(product, arguments)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("name", ["btt:rho=1/4", "kronecker"])
def test_only_wanted_gradients_are_computed(name: str, needed: tuple[bool, ...]) -> None:
    layer = EinsumLinear(name, 12, 18, bias=False, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    for plan in plans_of(layer.structure, 2, ["blas"]):
        tensors = rows, a, b = [t.detach().clone() for t in (x, layer.A, layer.B)]
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.requires_grad_(need)
        torch.autograd.backward(contract(rows, a, b, 18, plan).sum())
        reference = rows, a, b = [t.detach().clone().requires_grad_() for t in tensors]
        torch.autograd.backward(plain(rows, a, b, layer.structure).sum())
        for got, want, need in zip(tensors, reference, needed, strict=True):
            assert (got.grad is not None) == need
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want.grad)


@settings(max_examples=60, deadline=None)
@given(thetas(), dimensions, dimensions)
def test_counted_flops_are_the_formula(theta: Theta, d_in: int, d_out: int) -> None:
    structure = Structure.of(theta, d_in, d_out)
    if structure.is_dense:
        return
    s, n = structure.sizes, 4
    layer = EinsumLinear(theta, d_in, d_out, bias=False)
    macs = {"a-first": s.macs_a_first, "b-first": s.macs_b_first}
    for plan in plans_of(structure, 2, LIBRARIES):
        if plan.order != "materialised":
            layer.plan = plan
            with FlopCounterMode(display=False) as counter:
                layer(torch.randn(n, d_in))
            assert counter.get_total_flops() == 2 * n * macs[plan.order], plan
    assert structure.flops == 2 * min(s.macs_a_first, s.macs_b_first)


@pytest.mark.parametrize("name", NAMES)
def test_backward_costs_twice_the_forward_and_what_is_computed_again(name: str) -> None:
    layer = EinsumLinear(name, 64, 256, bias=False)
    x = torch.randn(4, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(plain(x, layer.A, layer.B, layer.structure).sum())
    assert counter.get_total_flops() == 3 * 4 * layer.structure.flops
    s = layer.structure.sizes
    again = 2 * 4 * s.beta * s.gamma * s.delta * s.phi * s.rho * s.alpha  # the intermediate
    for plan in plans_of(layer.structure, 2, LIBRARIES):
        if plan.order == "a-first":
            layer.plan = plan
            with FlopCounterMode(display=False) as counter:
                layer(x).sum().backward()
            assert counter.get_total_flops() == 3 * 4 * layer.structure.flops + again, plan


@pytest.mark.parametrize("shape", [(256, 256), (250, 509)])
@pytest.mark.parametrize("name", thinned(["dense", *NAMES], 3))
def test_peak_memory_is_the_input_and_one_tile(name: str, shape: tuple[int, int]) -> None:
    tokens = 2048
    layer = EinsumLinear(name, *shape, bias=False)
    chosen = choose(layer.structure, tokens, CPU, torch.float32)
    for plan in {chosen, *plans_of(layer.structure, 128, LIBRARIES)}:
        s = layer.structure.sizes
        dear = plan.order == "b-first" and s.macs_b_first > 4 * s.macs_a_first
        if plan != chosen and (plan.second == "tokens" or dear):
            continue  # slow where it is not the choice
        layer.plan = plan
        kept, peak = activation_bytes(layer, tokens)
        assert kept == 0, plan  # nothing but the input, which the caller holds
        assert peak <= layer.workspace_bytes(tokens) + 4096, plan  # and a page for what is small


def test_a_tile_is_small_beside_the_input() -> None:
    for name in NAMES:
        layer = EinsumLinear(name, 1024, 1024)
        few, many = (layer.workspace_bytes(n) for n in (1 << 14, 1 << 17))
        if layer.plan_for(1 << 17).order != "materialised":
            assert many == few  # does not grow with the tokens
        assert many < 0.6 * 4 * (1 << 17) * 1024


def activation_bytes(layer: EinsumLinear, tokens: int) -> tuple[int, int]:
    """Bytes (held between forward and backward, allocated at most) besides x, y and gradients.

    From the allocator's own record of every allocation.
    """
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    dy = torch.randn(tokens, layer.out_features)

    def run() -> tuple[int, int]:
        def allocated(call: Callable[[], Out]) -> tuple[Out, int, int]:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                out = call()
            level = peak = 0
            for event in record.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    level += event.nbytes()
                    peak = max(peak, level)
            return out, level, peak

        y, after, most = allocated(lambda: layer(x))
        grads = [x, *layer.parameters()]
        results, _, most_back = allocated(lambda: torch.autograd.grad(y, grads, dy))
        own = y.numel() * y.element_size()
        theirs = sum(g.numel() * g.element_size() for g in results)
        return after - own, max(most - own, most_back - theirs)

    return run()


def test_the_memory_helper_sees_what_is_kept_and_what_passes() -> None:
    class Keeping(EinsumLinear):
        def forward(self, x: Tensor) -> Tensor:
            (x * 2 + x * 3).sum()
            self.kept = x[:, :8] * 2
            return super().forward(x)

    layer = Keeping("monarch", 64, 64, bias=False)
    layer.plan = Plan("a-first", 64)
    kept, peak = activation_bytes(layer, 512)
    del layer.kept
    kept, peak = activation_bytes(layer, 512)
    assert 512 * 8 * 4 <= kept < 512 * 8 * 4 + 64  # and the scalar that was not freed yet
    assert peak >= 512 * 64 * 4


@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_compiled_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    layer = EinsumLinear(name, 40, 56, normalize=True, gain=True)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(1.5)
    x, dy = torch.randn(6, 40), torch.randn(6, 56)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    eager, y = layer(x1), compiled(x2)
    torch.testing.assert_close(y, eager)
    want = torch.autograd.grad(eager, [x1, *layer.parameters()], dy)
    for got, wanted in zip(
        torch.autograd.grad(y, [x2, *layer.parameters()], dy), want, strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    layer = EinsumLinear("btt:rho=1/4", 32, 48, normalize=True)
    x = torch.randn(6, 32)
    try:
        y = torch.compile(layer, fullgraph=True)(x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("inductor needs a C++ compiler, and this machine has none")
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_autocast_in_every_plan(name: str) -> None:
    torch.manual_seed(0)
    layer = EinsumLinear(name, 64, 96)
    x = torch.randn(33, 64)
    exact = gradients(layer, x, torch.ones(33, 96))
    for plan in plans_of(layer.structure, 8, LIBRARIES):
        layer.plan = plan
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), list(layer.parameters()))
        for got, want in zip([y.float(), *grads], [exact[0], *exact[2:]], strict=True):
            assert got.dtype == torch.float32
            error = (got - want).norm() / want.norm()
            assert error < 0.03, plan


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_function_transforms() -> None:
    layer = EinsumLinear("btt:rho=1/4", 10, 14, normalize=True, gain=True, dtype=torch.float64)
    params: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 10, dtype=torch.float64)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(layer, params, (x,)).square().sum()
        return total

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for name, parameter in params.items():
        summed = torch.autograd.grad(loss(params, x), parameter)[0]
        torch.testing.assert_close(per_sample[name].sum(0), summed)
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, layer.to_matrix())
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), jacobian)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    torch.testing.assert_close(both[0], layer(x))


def test_gradient_checkpointing() -> None:
    model = torch.nn.Sequential(EinsumLinear("monarch", 16, 32), EinsumLinear("kronecker", 32, 8))
    x = torch.randn(4, 16)
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    y = checkpoint(model, x, use_reentrant=False)
    got = torch.autograd.grad(y.sum(), list(model.parameters()))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        layer = EinsumLinear("btt:rho=1/4", 16, 24)
        x = torch.randn(4, 16)
        want = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
        torch.nn.parallel.DistributedDataParallel(layer)(x).sum().backward()
        for parameter, w in zip(layer.parameters(), want, strict=True):
            torch.testing.assert_close(parameter.grad, w)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_a_checkpoint_knows_no_plan(name: str, tmp_path: Path) -> None:
    layer = EinsumLinear(name, 24, 36, normalize=True, gain=True)
    x = torch.randn(5, 24)
    y = layer(x)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for plan in plans_of(layer.structure, 2, LIBRARIES):
        other = EinsumLinear(name, 24, 36, normalize=True, gain=True, plan=plan)
        assert other.state_dict().keys() == layer.state_dict().keys()
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        torch.testing.assert_close(other(x), y)
        other.plan = None
        assert torch.equal(other(x), y)


def test_pickled_and_copied_layers_keep_their_plan() -> None:
    layer = EinsumLinear("btt:rho=1/4", 24, 36, plan=Plan("b-first", 2))
    x = torch.randn(5, 24)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert other.plan == layer.plan


@pytest.mark.parametrize("name", NAMES)
def test_the_same_plan_gives_the_same_bits(name: str) -> None:
    layer = EinsumLinear(name, 64, 48)
    x, dy = torch.randn(50, 64), torch.randn(50, 48)
    for plan in plans_of(layer.structure, 16, LIBRARIES):
        layer.plan = str(plan)
        one, two = gradients(layer, x, dy), gradients(layer, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_plan_reads_its_own_text() -> None:
    for structure in (Structure.of(parse_theta(n), 1024, 768) for n in NAMES):
        for plan in plans_of(structure, 128, LIBRARIES):
            assert Plan.parse(str(plan)) == plan
    assert Plan("materialised", tile=5) == Plan("materialised")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan: got "),
        ("c-first", "plan.order: got c-first; accepted: a-first | b-first | materialised"),
        ("a-first tile=-1", "plan.tile: got -1"),
        ("a-first tile=many", "plan.tile: got many"),
        ("a-first first=tokens", "plan.first: got tokens"),
        ("a-first speed=high", "plan: got a-first speed=high"),
        ("a-first order=b-first", "plan: got a-first order=b-first"),
        ("a-first second=tokens", "plan.second: got tokens; accepted: batched | blocks"),
        (7, "plan: got 7; accepted: a Plan, its text, or None"),
    ],
)
def test_a_bad_plan_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace("|", r"\|")):
        EinsumLinear("monarch", 16, 16, plan=text)


def test_a_dense_layer_has_one_order() -> None:
    with pytest.raises(InvalidInput, match=r"plan\.order: got a-first; accepted: materialised"):
        EinsumLinear("dense", 8, 8, plan=Plan("a-first"))


def test_a_measured_plan_is_remembered_and_can_be_carried_over() -> None:
    layer = EinsumLinear("btt:rho=1/4", 48, 80)
    before = set(remembered_plans())
    plan = layer.measure_plan(64)
    assert plan in candidates(layer.structure, 64, CPU, torch.float32)
    assert layer.plan_for(64) == plan
    assert EinsumLinear("btt:rho=1/4", 48, 80).plan_for(64) == plan
    (key,) = set(remembered_plans()) - before
    assert layer.structure.fingerprint in key
    other = "b-first tile=8 first=batched second=batched gemm=blas"
    remember_plans({key: other})
    assert str(layer.plan_for(64)) == str(layer.plan_for(50)) == other  # by powers of two
    assert layer.plan_for(65) == choose(layer.structure, 65, CPU, torch.float32)
    with pytest.raises(InvalidInput):
        remember_plans({key: "nonsense"})
    assert str(layer.plan_for(64)) == other
    remember_plans({key: "a-first second=tokens"})  # which this structure cannot run
    with pytest.raises(InvalidInput, match=r"plan\.second: got tokens"):
        layer(torch.zeros(64, 48))
    remember_plans({key: other})


def test_measuring_leaves_out_what_is_hopeless() -> None:
    layer = EinsumLinear("low-rank:rho=3/4", 512, 512)  # B first would need gigabytes
    assert layer.measure_plan(256).order != "b-first"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("btt:cores=3,rho=1/8", 4), ("btt-moe:experts=4,active=2", 4), ("pixelfly", 1),
        ("blast", 1), ("convolution", 1), ("block-sparse", 1),
    ],
)  # fmt: skip
def test_every_family_is_measured_or_says_its_one_way(text: str, count: int) -> None:
    layer = layer_of(text, 24, 32)
    before = dict(remembered_plans())
    assert len(layer._plans_to_try(32, CPU, torch.float32)) == count
    plan = layer.measure_plan(32)
    assert plan == layer.plan_for(32) == layer_of(text, 24, 32).plan_for(32)
    found = {key: said for key, said in remembered_plans().items() if key not in before}
    if count > 1:
        (said,) = found.values()
        assert said == str(plan)
        assert layer.structure.fingerprint in next(iter(found))
    else:  # of a sum that of its einsum
        assert len(found) == (text == "pixelfly")
    remember_plans(found)
    assert layer.plan_for(32) == plan
    layer.plan = plan
    fixed = layer(torch.ones(32, 24))
    layer.plan = None
    torch.testing.assert_close(layer(torch.ones(32, 24)), fixed)
    with pytest.raises(InvalidInput, match="tokens: got 0"):
        layer.measure_plan(0)


def test_a_remembered_plan_is_the_one_that_runs() -> None:
    def keys(fingerprint: str) -> list[str]:
        return [k for k in remembered_plans() if k.startswith(f"{fingerprint} tokens=64 ")]

    layer = layer_of("btt:cores=3,rho=1/8", 24, 32)
    layer.measure_plan(64)
    (key,) = keys(layer.structure.fingerprint)
    remember_plans({key: "path (0,1) (0,2) (0,1)"})
    assert layer.plan_for(64) == "path (0,1) (0,2) (0,1)"
    remember_plans({key: "path (0,9) (0,2) (0,1)"})  # which no chain of three has
    with pytest.raises(InvalidInput, match=r"plan: got path \(0,9\)"):
        layer(torch.zeros(64, 24))
    remember_plans({key: "path (0,3) (0,2) (0,1)"})
    mixture = layer_of("btt-moe:experts=4,active=2", 24, 32)
    mixture.measure_plan(64)
    (key,) = keys(mixture.structure.fingerprint)
    remember_plans({key: "grouping=batched"})
    assert str(mixture.plan_for(64)) == "grouping=batched"


@pytest.mark.parametrize("library", LIBRARIES)
def test_fixed_plans_run_in_every_mode(library: str) -> None:
    for order in ("a-first", "materialised"):
        plan = Plan(order, 0, "blocks", "blocks", library)  # type: ignore[arg-type]
        layer = EinsumLinear("btt:rho=1/4", 32, 48, plan=plan)
        x, dy = torch.randn(6, 32), torch.randn(6, 48)
        want = gradients(layer, x, dy)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True):
            y = layer(x.bfloat16())
            assert y.dtype == torch.bfloat16
        x1 = x.clone().requires_grad_()
        y = layer(x1)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # backward alone
            got = torch.autograd.grad(y, [x1, *layer.parameters()], dy)
        for g, w in zip(got, want[1:], strict=True):
            assert torch.equal(g, w)
        layer(torch.zeros(0, 32, requires_grad=True)).sum().backward()
        wide = copy.deepcopy(layer).double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert wide(x.double()).dtype == torch.float64  # which autocast leaves alone
        half = copy.deepcopy(layer).half()
        torch.testing.assert_close(half(x.half()).float(), want[0], rtol=0.02, atol=0.02)


def test_meta_tensors_and_strided_input() -> None:
    layer = EinsumLinear("monarch", 64, 48, device="meta")
    assert layer(torch.zeros(3, 64, device="meta")).shape == (3, 48)
    layer = EinsumLinear("btt:rho=1/4", 30, 48)
    wide = torch.randn(7, 60)
    torch.testing.assert_close(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))


def test_compiled_function_transforms() -> None:
    torch._dynamo.reset()
    layer = EinsumLinear("btt:rho=1/4", 10, 14, normalize=True)
    params: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(5, 10)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(layer, params, (x,)).square().sum()
        return total

    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager")(params, x)
    for name, gradient in torch.func.grad(loss)(params, x).items():
        torch.testing.assert_close(compiled[name], gradient)


def test_compiled_with_changing_tokens() -> None:
    # torch 2.13 compiles no module whole that it has compiled within functional_call before
    torch._dynamo.reset()
    layer = EinsumLinear("btt:rho=1/4", 10, 14, normalize=True)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 9, 33):
        x = torch.randn(tokens, 10)
        torch.testing.assert_close(whole(x), layer(x))
    layer.plan = Plan("b-first", 2)
    torch.testing.assert_close(whole(x), layer(x))


def test_compiled_code_runs_the_kernels_and_not_the_plain_einsum() -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def note(graph: torch.fx.GraphModule, _inputs: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer = EinsumLinear("btt:rho=1/4", 10, 14)
    torch.compile(layer, fullgraph=True, backend=note)(torch.randn(5, 10))
    assert any("einsum_nas.contract" in target for target in seen)
    assert not any("functional.einsum" in target for target in seen)


@pytest.mark.parametrize("gain", [False, True])
def test_forward_mode_derivatives(gain: bool) -> None:
    layer = EinsumLinear("btt:rho=1/4", 10, 14, normalize=True, gain=gain, dtype=torch.float64)
    x, v = torch.randn(2, 3, 10, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, v))  # type: ignore[no-untyped-call]
        tangent = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tangent, v @ layer.to_matrix().T)


def test_swapping_the_factors_exchanges_the_orders() -> None:
    theta = Theta(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25)
    one = EinsumLinear(theta, 24, 36, bias=False, sizing="paper", dtype=torch.float64)
    two = EinsumLinear(theta.swapped(), 24, 36, bias=False, sizing="paper", dtype=torch.float64)
    with torch.no_grad():
        two.A.copy_(one.B.permute(1, 2, 0, 4, 3))
        two.B.copy_(one.A.permute(2, 0, 1, 4, 3))
    x = torch.randn(5, 24, dtype=torch.float64)
    s = one.structure.sizes
    # the private axes of input and output change places
    x_swapped = x[:, : s.gamma * s.beta * s.alpha].view(5, s.gamma, s.beta, s.alpha)
    x_swapped = x_swapped.transpose(2, 3).reshape(5, -1)
    x_swapped = torch.nn.functional.pad(x_swapped, (0, 24 - x_swapped.shape[1]))
    y = one(x)[:, : s.phi * s.epsilon * s.delta].view(5, s.phi, s.epsilon, s.delta)
    z = two(x_swapped)[:, : s.phi * s.epsilon * s.delta]
    torch.testing.assert_close(z.view(5, s.phi, s.delta, s.epsilon).transpose(2, 3), y)


@pytest.mark.parametrize("name", ["kronecker", "1/2,1/4,1/4,1/4,1/2,1/4,0"])
def test_paper_sizing_drops_inputs_and_leaves_outputs_constant(name: str) -> None:
    layer = EinsumLinear(name, 3072, 3070, sizing="paper")
    structure = layer.structure
    assert structure.dropped_inputs + structure.constant_outputs > 0
    w = layer.to_matrix()
    assert w.shape == (3070, 3072)
    if structure.dropped_inputs:
        assert torch.count_nonzero(w[:, structure.padded_in :]) == 0
    if structure.constant_outputs:
        assert torch.count_nonzero(w[structure.padded_out :]) == 0
    x = torch.randn(3, 3072)
    assert layer.bias is not None
    for plan in plans_of(structure, 2, ["blas"]):
        layer.plan = plan
        torch.testing.assert_close(layer(x), x @ w.T + layer.bias, rtol=1e-3, atol=1e-3)
