"""What a gate adds to a row norm: both orders, both activations, groups of columns, a bias of RMSNorm, the modules.

test_row_norms.py and the other files that go through all row norms have silu behind the norm of whole rows.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from fastnorm import backend
from fastnorm.functional import gated_layer_norm, gated_rms_norm
from helpers.environment import SIMULATED
from helpers.norms import Case, call, check, inputs, plain_case
from helpers.stock import error_of

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = ("gated_layer_norm", "gated_rms_norm")
operations = pytest.mark.parametrize("op", OPS)
orders = pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm first", "gate first"])
activations = pytest.mark.parametrize("activation", ["silu", "sigmoid"])


def gated_case(op: str, shape: tuple[int, ...], dtype: torch.dtype = F32, **options) -> Case:
    """With a weight and a bias; alike() leaves them out."""
    return plain_case(op, shape, dtype, options=options)


@operations
@orders
@activations
@pytest.mark.parametrize("group_size", [None, 8, 1])
def test_every_variant(op, norm_before_gate, activation, group_size, device):
    options = {"norm_before_gate": norm_before_gate, "activation": activation, "group_size": group_size}
    case = gated_case(op, (6, 24), BF16 if activation == "sigmoid" else F32, **options)
    check(case, inputs(case, device))


# beside the order: shapes, dtypes, and what is left out
FORMS = {
    "one row": dict(shape=(1, 257)),
    "one column": dict(shape=(5, 1), activation="sigmoid"),
    "odd columns in odd groups": dict(shape=(3, 33), group_size=11),
    "groups across dimensions": dict(shape=(2, 3, 4, 6), normalized=2, group_size=8),
    "many rows and short groups": dict(shape=(70, 128), group_size=64, dtype=F16),
    "a group in several tiles": dict(shape=(3, 2056), group_size=1028, dtype=BF16),
    "no bias": dict(bias=None, group_size=24),
    "no weight": dict(weight=None, activation="sigmoid"),
    "nothing but the gate": dict(weight=None, bias=None),
    "no gate": dict(gate=None, group_size=24, dtype=BF16, weight=F32),
    "zero_centered": dict(zero_centered=True, group_size=24),
    "float32 beside bfloat16": dict(dtype=BF16, gate=F32, weight=F32, bias=F16, activation="sigmoid"),
    "a bfloat16 gate": dict(gate=BF16, weight=BF16, bias=BF16, out_dtype=BF16),
    "float64": dict(dtype=F64, weight=F64, bias=F64, gate=F64, group_size=36),
    "a float64 gate": dict(gate=F64, out_dtype=F64),
    "float64 parameters": dict(weight=F64, bias=F64, out_dtype=F16),
}


def form(op: str, name: str, **options) -> Case:
    options |= FORMS[name]
    given = {key: options.pop(key) for key in ("shape", "dtype", "normalized", *PARTS) if key in options}
    return plain_case(op, given.pop("shape", (4, 72)), F32, options=options).alike(**given)


PARTS = ("weight", "bias", "gate")


@operations
@orders
@pytest.mark.parametrize("name", FORMS)
def test_forms(op, norm_before_gate, name, device):
    case = form(op, name, norm_before_gate=norm_before_gate)
    check(case, inputs(case, device))


@orders
@pytest.mark.parametrize("options", [
    dict(dtype=BF16, weight=BF16, bias=None, gate=BF16, group_size=24),
    dict(dtype=F16, weight=F32, bias=F32, gate=F32, zero_centered=True),
    dict(dtype=BF16, weight=None, bias=None, gate=BF16, out_dtype=F32),
    dict(dtype=BF16, weight=F32, gate=None, group_size=24),
], ids=str)  # fmt: skip
def test_llama_rounding(norm_before_gate, options, device):
    """x̂ is rounded to x's dtype, and the weight decides the result's only where it comes last."""
    options = dict(options)
    given = {key: options.pop(key) for key in ("dtype", *PARTS) if key in options}
    options |= {"rounding": "llama", "norm_before_gate": norm_before_gate}
    case = plain_case("gated_rms_norm", (6, 72), F32, options=options).alike(**given)
    tensors = inputs(case, device)
    y, _ = call(case, tensors)
    promoted = torch.promote_types(case.dtype, case.weight or case.dtype)
    assert y.dtype == options.get("out_dtype", case.dtype if norm_before_gate else promoted)
    check(case, tensors)


# held by the forward and read again by the backward; read again by both; groups of both kinds
LONG = [
    ("gated_rms_norm", F32, (2, 11001), None),
    ("gated_layer_norm", BF16, (2, 16400), None),
    ("gated_rms_norm", BF16, (2, 40000), None),
    ("gated_layer_norm", F32, (1, 32770), None),
    ("gated_rms_norm", F32, (2, 24000), 12000),
    ("gated_layer_norm", F64, (1, 34000), 17000),
]


@pytest.mark.slow
@orders
@pytest.mark.parametrize("op, dtype, shape, group_size", LONG[1:3] if SIMULATED else LONG, ids=str)
def test_long_rows(op, dtype, shape, group_size, norm_before_gate, kernel_device):
    activation = "sigmoid" if shape[0] == 1 else "silu"
    case = gated_case(
        op, shape, dtype, norm_before_gate=norm_before_gate, activation=activation, group_size=group_size
    )
    check(case, inputs(case, kernel_device))


@pytest.mark.parametrize("cols", [300] if SIMULATED else [300, 17000])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_product_whose_mean_is_far_from_zero(dtype, cols, device):
    """The gate is alike everywhere, so that x's mean of 1e4 is the product's, with a deviation of 1."""
    case = gated_case("gated_layer_norm", (4, cols), dtype, norm_before_gate=False)
    tensors = inputs(case, device, mean=1e4)
    tensors["gate"].fill_(4.0)
    check(case, tensors)


@operations
@orders
@activations
@pytest.mark.parametrize("dtype", [F32] if SIMULATED else [F32, F64, BF16], ids=lambda d: str(d)[6:])
def test_large_gates(op, norm_before_gate, activation, dtype, device):
    """exp overflows at 89, in float64 at 710."""
    case = gated_case(op, (4, 60), dtype, norm_before_gate=norm_before_gate, activation=activation, group_size=30)
    tensors = inputs(case, device)
    values = torch.tensor([100.0, -100.0, 1e4, -1e4, 88.5, -88.5, 740.0, -740.0, 0.0, -0.0, 1e-30, -17.0])
    tensors["gate"].copy_(values.repeat(20).view(4, 60))
    check(case, tensors)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, _ = call(case, leaves)
    assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), list(leaves.values()))))


@operations
@orders
@activations
def test_gates_that_are_not_finite(op, norm_before_gate, activation, device):
    """NaN and infinities where PyTorch's operations have them, in y and in the gradients, and in no other row."""
    case = gated_case(op, (5, 40), norm_before_gate=norm_before_gate, activation=activation)
    tensors = inputs(case, device)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        tensors["gate"][row, 7 * row] = value
    # without the parameters' sums over rows: a virtual GPU takes NaN of several kinds in one place for a race
    leaves, own = (
        {name: t.detach().clone().requires_grad_(t.dim() == 2) for name, t in tensors.items()} for _ in range(2)
    )
    y, _ = call(case, leaves)
    factor = (F.silu if activation == "silu" else torch.sigmoid)(own["gate"])
    norm = F.layer_norm if case.centers else F.rms_norm
    if norm_before_gate:
        expected = (norm(own["x"], (40,), own["weight"], eps=case.eps) + own["bias"]) * factor
    else:
        expected = norm(own["x"] * factor, (40,), own["weight"], eps=case.eps) + own["bias"]
    dy = torch.randn_like(expected)
    found = [y, *torch.autograd.grad(y, [leaves["x"], leaves["gate"]], dy)]
    wanted = [expected, *torch.autograd.grad(expected, [own["x"], own["gate"]], dy)]
    for i, (actual, right) in enumerate(zip(found, wanted, strict=True)):
        if i == 1:  # whether ∞ − ∞ comes up in a row of dx depends on the order of the sum
            assert torch.equal(actual.isfinite(), right.isfinite())
            actual, right = (t.nan_to_num(0.0, 0.0, 0.0) for t in (actual, right))
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not y[0].isfinite().all() and y[3:].isfinite().all()


GRADCHECKED = [("gated_layer_norm", True, "sigmoid"), ("gated_rms_norm", False, "silu")]
GRADCHECKED += [("gated_layer_norm", False, "sigmoid"), ("gated_rms_norm", True, "silu")] * (not SIMULATED)


@pytest.mark.parametrize("op, norm_before_gate, activation", GRADCHECKED)
def test_gradcheck_and_gradgradcheck(op, norm_before_gate, activation, device):
    case = gated_case(
        op, (2, 6), F64, norm_before_gate=norm_before_gate, activation=activation, group_size=3, zero_centered=True
    )
    leaves = {name: t.requires_grad_() for name, t in inputs(case, device).items()}

    def outputs(*tensors):
        return call(case, dict(zip(leaves, tensors, strict=True)))[0]

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)
    assert SIMULATED or torch.autograd.gradgradcheck(outputs, tuple(leaves.values()), fast_mode=True)
    y = outputs(*leaves.values())
    once, twice = (
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for name, gradient, differentiable in zip(leaves, once, twice, strict=True):
        # the bias that comes last has the gradient Σ dy, whatever the inputs are
        assert not gradient.requires_grad and (differentiable.requires_grad or name == "bias")
        torch.testing.assert_close(gradient, differentiable)


def results_of(case: Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, _ = call(case, leaves)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


@operations
@orders
@pytest.mark.parametrize("cols, group_size", [(96, 32), (98, 49), (1028, None)])
def test_rows_do_not_depend_on_the_batch(op, norm_before_gate, cols, group_size, kernel_device):
    """y, dx and dgate of a row are bitwise the same alone and in any batch; and all results are from run to run."""
    case = gated_case(op, (17, cols), BF16, norm_before_gate=norm_before_gate, group_size=group_size)
    tensors, dy = inputs(case, kernel_device), torch.randn(17, cols).to(BF16).to(kernel_device)
    whole, again = (results_of(case, tensors, dy) for _ in range(2))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for rows in (slice(0, 1), slice(3, 17)):
        part = case.alike(shape=(rows.stop - rows.start, cols))
        some = {name: t[rows] if t.dim() == 2 else t for name, t in tensors.items()}
        found = results_of(part, some, dy[rows])
        assert all(torch.equal(found[name], whole[name][rows]) for name in ("y", "dx", "dgate"))


@operations
@orders
@pytest.mark.parametrize(
    "shape, group_size", [((8, 4096), 1024), ((300, 1000), 8), ((300, 1000), None), ((2, 70000), None)]
)
def test_the_number_of_threads_changes_nothing(op, norm_before_gate, shape, group_size, threads):
    if not backend.statuses()["native"].available:
        pytest.skip("of native kernels")
    case = gated_case(op, shape, BF16, norm_before_gate=norm_before_gate, group_size=group_size)
    tensors, dy, found = inputs(case), torch.randn(shape).to(BF16), []
    for count in (1, 2, 3):
        threads(count)
        with fastnorm.use("native"):
            found.append(results_of(case, tensors, dy))
    assert all(torch.equal(one[name], found[0][name]) for one in found[1:] for name in one)


@operations
@orders
def test_what_is_saved(op, norm_before_gate, kernel_device):
    """The inputs as they are, and the statistics of each group."""
    case = gated_case(op, (4, 48), BF16, norm_before_gate=norm_before_gate, group_size=16)
    leaves = {name: t.requires_grad_() for name, t in inputs(case, kernel_device).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = call(case, leaves)
    places = {t.data_ptr() for t in leaves.values()}
    own = [t for t in saved if t.data_ptr() not in places]
    assert places <= {t.data_ptr() for t in saved}
    assert [(t.shape, t.dtype) for t in own] == [((12,), F32)] * (1 + case.centers)
    y.sum().backward()
    assert all(t.grad is not None for t in leaves.values())


@operations
@orders
def test_only_wanted_gradients(op, norm_before_gate, device):
    """Each alone, without the others and without parameters; what is found is what is found beside all others."""
    for given in ({}, {"weight": None}, {"weight": None, "bias": None}, {"gate": None}):
        case = gated_case(op, (3, 24), norm_before_gate=norm_before_gate, group_size=12).alike(**given)
        tensors = inputs(case, device)
        dy = torch.randn(case.shape, device=device)
        everything = results_of(case, tensors, dy)
        for wanted in tensors:
            leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
            call(case, leaves)[0].backward(dy)
            assert [name for name, t in leaves.items() if t.grad is not None] == [wanted]
            torch.testing.assert_close(leaves[wanted].grad, everything[f"d{wanted}"], rtol=1e-5, atol=1e-6)


@operations
def test_without_a_gate_it_is_the_plain_norm(op, device):
    """Bit by bit, but for RMSNorm's bias."""
    case = gated_case(op, (5, 96), BF16).alike(gate=None, bias=BF16 if "layer" in op else None)
    tensors, dy = inputs(case, device), torch.randn(5, 96).to(BF16).to(device)
    found = results_of(case, tensors, dy)
    expected = results_of(case.alike(op=op.removeprefix("gated_")), tensors, dy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    case, x, dy = case.alike(dtype=F32, bias=None, weight=None), tensors["x"].float(), dy.float()
    grouped = results_of(case.alike(options={"group_size": 32}), {"x": x}, dy)
    rows = results_of(case.alike(shape=(15, 32)), {"x": x.view(15, 32)}, dy.view(15, 32))  # each group is one
    for name, value in grouped.items():
        torch.testing.assert_close(value.view(15, 32), rows[name])


@pytest.mark.parametrize("norm", [gated_layer_norm, gated_rms_norm], ids=lambda norm: norm.__name__)
def test_no_activation_is_the_default_but_silu(norm, device):
    x, gate = torch.randn(2, 3, 8, device=device)
    y = norm(x, gate, (8,))
    stock = (F.layer_norm if norm is gated_layer_norm else F.rms_norm)(x, (8,)) * F.silu(gate)
    torch.testing.assert_close(y, stock)
    torch.testing.assert_close(norm(x, gate, (8,), None, None, 0.5), norm(x, gate, (8,), eps=0.5))


@orders
@pytest.mark.parametrize("x_dtype, gate_dtype", [(F32, F32), (BF16, BF16), (BF16, F64), (F64, F32)], ids=str)
def test_eps_of_none_is_that_of_the_statistics(norm_before_gate, x_dtype, gate_dtype, device):
    x = (1e-8 * torch.randn(3, 8, device=device)).to(x_dtype)  # mean square and eps are of one order
    gate = torch.ones(3, 8, device=device).to(gate_dtype)
    computed = F64 if F64 in (x_dtype, gate_dtype) else F32
    options = {"norm_before_gate": norm_before_gate, "out_dtype": F64}
    y, expected = (gated_rms_norm(x, gate, (8,), eps=eps, **options) for eps in (None, torch.finfo(computed).eps))
    assert torch.equal(y, expected) and y.any()


@pytest.mark.triton
@pytest.mark.parametrize("cols", [64, 40000], ids=["held", "long"])
def test_kernels_read_slices_of_a_projection(cols, triton_device, monkeypatch):
    """Its columns are the gate's, x's and another's; the kernels get their addresses and the projection's stride."""
    from fastnorm.triton_kernels import long_row_norm, row_gradients, row_norm

    modules = (row_norm, row_gradients) if cols == 64 else (long_row_norm, long_row_norm)
    prefix = "_row_norm" if cols == 64 else "_row_norm_long"
    groups = 4 if cols == 64 else 1
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments)

    def strides(arguments):
        return [a for a in arguments if isinstance(a, int)]

    for module, direction in zip(modules, ("forward", "backward"), strict=True):
        monkeypatch.setattr(module, f"{prefix}_{direction}_kernel", Recorder())
    wide = 3 * cols + 16
    projection = torch.zeros(6, wide, device=triton_device)
    gate, x, dy = (projection[:, i * cols : (i + 1) * cols] for i in range(3))
    *_, mean, rstd = row_norm.row_norm_forward(
        x, None, gate, None, 1, groups, 1, None, None, 1e-5, True, False, True, False, None, F32, None
    )
    row_gradients.row_norm_backward(
        dy, None, x, None, gate, None, 1, groups, 1, None, None, mean, rstd, False, True, False, None, F32, *[None] * 3
    )
    forward, backward = launched
    assert [t.data_ptr() for t in (forward[0], forward[2])] == [x.data_ptr(), gate.data_ptr()]
    assert [t.data_ptr() for t in (backward[0], backward[2], backward[4])] == [t.data_ptr() for t in (dy, x, gate)]
    assert strides(forward).count(wide) == 2 and strides(backward).count(wide) == 3


@operations
def test_result_dtypes_and_autocast(op, device):
    """Without a stock operation there is no rule of autocast's to follow: y has x's dtype."""
    function = getattr(fastnorm.functional, op)
    x, gate = torch.randn(2, 3, 8, device=device).to(BF16)
    for weight in (None, torch.ones(8, device=device)):
        for enabled in (False, True):
            with torch.autocast(torch.device(device).type, F16, enabled=enabled):
                assert function(x, gate.float(), (8,), weight).dtype == BF16
                assert function(x, gate, (8,), weight, out_dtype=F32).dtype == F32


MODULES = {"GatedLayerNorm": gated_layer_norm, "GatedRMSNorm": gated_rms_norm}
modules = pytest.mark.parametrize("name", MODULES)
EVERYTHING = {"activation": "sigmoid", "norm_before_gate": False, "group_size": 4, "zero_centered": True}
EVERYTHING |= {"out_dtype": F64}


def random_module(name: str, *args, **kwargs) -> torch.nn.Module:
    module = getattr(fastnorm, name)(*args, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@modules
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["defaults", "options"])
def test_modules_are_the_functionals(name, options, device):
    module = random_module(name, [2, 8], 0.1, bias=True, **options).to(device)
    x, gate = torch.randn(2, 5, 2, 8, device=device)
    expected = MODULES[name](x, gate, (2, 8), module.weight, module.bias, 0.1, **options)
    assert torch.equal(module(x, gate), expected) and expected.dtype == options.get("out_dtype", F32)
    assert not torch.equal(module(x), expected), "the gate may be left out"


@modules
def test_modules_are_copied_and_kept(name):
    module = random_module(name, 8, bias=True, **EVERYTHING, **({"rounding": "llama"} if "RMS" in name else {}))
    x, gate = torch.randn(2, 3, 8)
    other = getattr(fastnorm, name)(8, bias=True, **EVERYTHING, **({"rounding": "llama"} if "RMS" in name else {}))
    assert list(module.state_dict()) == ["weight", "bias"]
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, gate), module(x, gate)) and repr(twin) == repr(module)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    y = module(x, gate)
    y.sum().backward()
    assert module.weight.grad.any() and module.bias.grad.any()


@modules
def test_parameters_of_modules(name):
    cls = getattr(fastnorm, name)
    module = cls(8, bias=True, device="meta", dtype=BF16)
    assert {p.dtype for p in module.parameters()} == {BF16} and all(p.is_meta for p in module.parameters())
    assert len(list(module.parameters())) == 2 and module.to_empty(device="cpu").bias.device.type == "cpu"
    for centered, one in ((False, 1.0), (True, 0.0)):
        module = random_module(name, 8, bias=True, zero_centered=centered)
        module.reset_parameters()
        assert torch.equal(module.weight, torch.full((8,), one)) and not module.bias.any()
        fresh = cls(8, bias=True, zero_centered=centered)
        assert torch.equal(fresh.weight, module.weight) and not fresh.bias.any()
    bare = cls(8, elementwise_affine=False, bias=True)
    assert bare.weight is None and bare.bias is None and not bare.state_dict()
    bare.reset_parameters()
    assert cls(8, bias=False).bias is None and list(cls(8, bias=False).state_dict()) == ["weight"]
    assert (cls(8).bias is None) == (name == "GatedRMSNorm"), "LayerNorm has a bias by default, as torch's"
    assert isinstance(module, torch.nn.LayerNorm if "Layer" in name else torch.nn.RMSNorm)


def test_options_are_shown_where_they_are_set():
    stock = torch.nn.RMSNorm(8).extra_repr()
    assert fastnorm.GatedRMSNorm(8).extra_repr() == stock
    assert fastnorm.GatedRMSNorm(8, bias=True).extra_repr() == f"{stock}, bias=True"
    shown = fastnorm.GatedRMSNorm(8, **EVERYTHING, rounding="llama").extra_repr()
    assert shown.startswith(f"{stock}, ")
    assert set(shown.removeprefix(f"{stock}, ").split(", ")) == {
        "activation=sigmoid", "norm_before_gate=False", "group_size=4", "zero_centered=True", "out_dtype=torch.float64",
        "rounding=llama",
    }  # fmt: skip
    stock = torch.nn.LayerNorm(8).extra_repr()
    assert fastnorm.GatedLayerNorm(8, group_size=2).extra_repr() == f"{stock}, group_size=2"


MISTAKES = {
    "gate of another shape": ({"gate": torch.ones(4, 7)}, RuntimeError, "gate"),
    "gate of fewer rows": ({"gate": torch.ones(1, 8)}, RuntimeError, "gate"),
    "gate of one row": ({"gate": torch.ones(8)}, RuntimeError, "gate"),
    "gate on another device": ({"gate": torch.ones(4, 8, device="meta")}, RuntimeError, "gate"),
    "gate of integers": ({"gate": torch.ones(4, 8, dtype=torch.int64)}, RuntimeError, "gate"),
    "gate of truths": ({"gate": torch.ones(4, 8, dtype=torch.bool)}, RuntimeError, "gate"),
    "gate of complex numbers": ({"gate": torch.ones(4, 8, dtype=torch.complex64)}, RuntimeError, "gate"),
    "sparse gate": ({"gate": torch.ones(4, 8).to_sparse()}, RuntimeError, "gate"),
    "mkldnn gate": ({"gate": torch.ones(4, 8).to_mkldnn()}, RuntimeError, "gate"),
    "sparse bias": ({"bias": torch.ones(8).to_sparse()}, RuntimeError, "bias"),
    "sparse weight": ({"weight": torch.ones(8).to_sparse()}, RuntimeError, "weight"),
    "nested gate": ({"gate": torch.nested.nested_tensor([torch.ones(4, 8)])}, RuntimeError, "gate"),
    "nested x": ({"x": torch.nested.nested_tensor([torch.ones(4, 8)])}, RuntimeError, "x"),
    "gate that is no tensor": ({"gate": [1.0] * 8}, TypeError, "gate"),
    "gate that is a number": ({"gate": 1.0}, TypeError, "gate"),
    "no columns in a group": ({"group_size": 0}, ValueError, "group_size"),
    "negative group": ({"group_size": -4}, ValueError, "group_size"),
    "group that does not divide": ({"group_size": 3}, ValueError, "group_size"),
    "group longer than the row": ({"group_size": 16}, ValueError, "group_size"),
    "group beyond 64 bits": ({"group_size": 2**70}, ValueError, "group_size"),
    "group of a float": ({"group_size": 4.0}, TypeError, "group_size"),
    "group of a truth": ({"group_size": True}, TypeError, "group_size"),
    "group of a word": ({"group_size": "4"}, TypeError, "group_size"),
    "unknown activation": ({"activation": "relu"}, ValueError, "activation"),
    "no activation": ({"activation": None}, ValueError, "activation"),
    "activation of another case": ({"activation": "SiLU"}, ValueError, "activation"),
    "activation that is a function": ({"activation": F.silu}, ValueError, "activation"),
    "order that is a word": ({"norm_before_gate": "False"}, TypeError, "norm_before_gate"),
    "order that is a number": ({"norm_before_gate": 1}, TypeError, "norm_before_gate"),
    "bias of another shape": ({"bias": torch.ones(7)}, RuntimeError, "bias"),
    "result of integers": ({"out_dtype": torch.int32}, NotImplementedError, "out_dtype"),
}


@operations
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(op, mistake, device):
    """The message names the operation and the argument, on every backend alike; nothing is written to."""
    changes, expected, name = MISTAKES[mistake]
    given = {"x": torch.randn(4, 8), "gate": torch.randn(4, 8), "normalized_shape": (8,), "weight": torch.randn(8)}
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    given |= {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in changes.items()}
    error = error_of(getattr(fastnorm.functional, op), given)
    assert type(error) is expected and str(error).startswith(f"{op}(): ") and name in str(error)


@modules
def test_mistakes_of_constructors(name):
    cls = getattr(fastnorm, name)
    for options, expected in (({"activation": "relu"}, ValueError), ({"group_size": 3}, ValueError),
                              ({"group_size": 0}, ValueError), ({"group_size": 4.0}, TypeError),
                              ({"norm_before_gate": None}, TypeError), ({"zero_centered": None}, TypeError),
                              ({"out_dtype": torch.int32}, NotImplementedError)):  # fmt: skip
        with pytest.raises(expected, match=rf"^{name}\(\): .*{next(iter(options))}"):
            cls(8, **options)


@pytest.mark.parametrize("cols", [48, 40000])
def test_groups_after_a_residual_addition(cols, triton_device):
    """Nothing public asks for both, but the operators take them: each group is a row of its own."""
    kernels = backend._triton
    x, residual, dy, dh = torch.randn(4, 2, 2 * cols, device=triton_device).unbind()
    options = 1e-5, True, False, True, True, None
    dtypes = torch.float32, torch.float32
    split = [t.view(4, cols) for t in (x, residual, dy, dh)]

    def results(x, residual, dy, dh, groups):
        y, h, mean, rstd = kernels.row_norm_forward(
            x, residual, None, None, 1, groups, 1, None, None, *options, *dtypes
        )  # fmt: skip
        dx, *_ = kernels.row_norm_backward(
            dy, dh, h, None, None, None, 1, groups, 1, None, None, mean, rstd, *options[2:], *dtypes, None, None
        )
        return [t.reshape(4, -1) for t in (y, h, mean, rstd, dx)]

    whole, parts = results(x, residual, dy, dh, 2), results(*split, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_more_groups_than_a_grid_has(triton_device):
    x = torch.randn(1, 65536, device=triton_device, requires_grad=True)
    with pytest.raises(RuntimeError, match="a row has 65536 groups, but Triton's kernels take at most 65535"):
        gated_rms_norm(x, x, (65536,), group_size=1)


def test_a_frozen_bias_changes_no_bit_of_the_other_gradients(kernel_device):
    """At a width whose tiling depends on how many sums a program keeps."""
    x, gate, w, b = (torch.randn(*shape, device=kernel_device) for shape in ((5, 1024), (5, 1024), (1024,), (1024,)))
    results = []
    for trained in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, gate, w)]
        y = gated_rms_norm(*leaves[:2], (1024,), leaves[2], b.clone().requires_grad_(trained))
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", ["gated_layer_norm", "gated_rms_norm"])
def test_groups_of_no_columns(op):
    x = torch.empty(2, 0, requires_grad=True)
    y = getattr(fastnorm.functional, op)(x, x, (0,), group_size=4)
    assert y.shape == (2, 0) and torch.autograd.grad(y.sum(), x)[0].shape == (2, 0)
