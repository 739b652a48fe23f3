"""What the row norms have in common: values, gradients, shapes, strides."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastnorm
from fastnorm import backend
from fastnorm.backend import ROW_NORMS
from helpers.drawing import examples
from helpers.environment import SIMULATED
from helpers.layouts import LAYOUTS, relaid
from helpers.norms import DTYPES, Case, call, check, forward, inputs, plain_case

# (rows, columns): one row, one column, odd columns, fewer and more rows than programs, widths that models use
SHAPES = [(1, 1), (3, 1), (2, 2), (1, 7), (5, 8), (2, 33), (70, 64), (9, 100), (33, 128), (3, 257), (5, 1000)]
SHAPES += [(2, 1025), (3, 2560)]
# what one program holds, what it reads twice, and what goes through the looped kernels; 11 rows: more than programs, so
# that the next row is loaded beside this one's work
LONG = [
    ("rms_norm", torch.float32, (2, 8200)),
    ("add_layer_norm", torch.bfloat16, (2, 8200)),
    ("layer_norm", torch.float32, (1, 16384)),
    ("add_rms_norm", torch.bfloat16, (1, 16384)),
    ("layer_norm", torch.bfloat16, (2, 16400)),
    ("add_rms_norm", torch.float32, (2, 16400)),
    ("rms_norm", torch.bfloat16, (11, 7168)),  # without the weight, which is read again; and at the next two
    ("layer_norm", torch.bfloat16, (11, 12288)),
    ("rms_norm", torch.float16, (11, 9000)),
    ("add_rms_norm", torch.float16, (2, 16384)),
    ("layer_norm", torch.bfloat16, (11, 7168)),
    ("add_rms_norm", torch.float32, (2, 11001)),  # read twice, as the next
    ("rms_norm", torch.bfloat16, (2, 32768)),
    ("rms_norm", torch.bfloat16, (1, 65536)),
    ("add_layer_norm", torch.float32, (1, 65536)),
    ("layer_norm", torch.float32, (1, 131072)),
    ("add_rms_norm", torch.bfloat16, (1, 131072)),
]
GRID = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
if SIMULATED:  # every shape and dtype is a compilation
    LONG = LONG[4:14]
    GRID = [(dtype, shape) for dtype in DTYPES[1:3] for shape in [(3, 1), (33, 128), (2, 1025), (7, 2560)]]
    GRID += [(torch.float32, (33, 128)), (torch.float32, (7, 2560)), (torch.float64, (33, 128))]
# one row, one column, odd columns, several rows a program, a row in several tiles; test_gated_norms.py has the variants
GATED_SHAPES = [(3, 1), (1, 7), (33, 128), (2, 1025)]
GATED_GRID = [(dtype, shape) for dtype, shape in GRID if shape in GATED_SHAPES]
VALUES = [(op, *case) for op in ROW_NORMS for case in (GATED_GRID if op.startswith("gated_") else GRID)]
operations = pytest.mark.parametrize("op", ROW_NORMS)
adding = pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])


@pytest.mark.parametrize("op, dtype, shape", VALUES, ids=lambda value: str(value).removeprefix("torch."))
def test_values_and_gradients(op, dtype, shape, device):
    case = plain_case(op, shape, dtype)
    check(case, inputs(case, device))


@pytest.mark.slow
@pytest.mark.parametrize("op, dtype, shape", LONG, ids=str)
def test_long_rows(op, dtype, shape, kernel_device):
    case = plain_case(op, shape, dtype)
    check(case, inputs(case, kernel_device))


OPTIONS = [
    dict(weight=None),
    dict(weight=torch.float32, dtype=torch.bfloat16),
    dict(weight=torch.bfloat16, dtype=torch.float32),
    dict(options={"zero_centered": True}),
    dict(options={"out_dtype": torch.float32}, dtype=torch.float16),
    dict(options={"out_dtype": torch.bfloat16}, dtype=torch.float32),
    dict(weight=torch.float32, dtype=torch.float64),
]
LAYER_OPTIONS = [dict(bias=None), dict(weight=None, bias=torch.float32), dict(bias=torch.float16, dtype=torch.bfloat16)]
RMS_OPTIONS = [
    dict(options={"rounding": "llama"}, dtype=torch.bfloat16),
    dict(options={"rounding": "llama"}, dtype=torch.float16, weight=torch.float32),
    dict(options={"rounding": "llama", "zero_centered": True}, dtype=torch.bfloat16, weight=torch.bfloat16),
    dict(options={"rounding": "llama"}, weight=None, dtype=torch.bfloat16),
]
GATED_OPTIONS = [
    dict(bias=None),
    dict(gate=None),
    dict(gate=torch.float32, dtype=torch.bfloat16, bias=torch.float16),
    dict(gate=torch.float64, dtype=torch.bfloat16, options={"norm_before_gate": False}),
]
ADD_OPTIONS = [
    dict(residual=torch.float32, dtype=torch.bfloat16),
    dict(residual=torch.bfloat16, dtype=torch.float32),
    dict(residual=torch.bfloat16, dtype=torch.bfloat16, options={"residual_dtype": torch.float32}),
    dict(residual=torch.float64, dtype=torch.float32),
    dict(residual=torch.float32, dtype=torch.float16, options={"residual_dtype": torch.bfloat16}),
]


def option_cases(op: str) -> list[Case]:
    case = plain_case(op, (6, 200), torch.float32)
    options = OPTIONS + (LAYER_OPTIONS if case.centers else RMS_OPTIONS)
    options = options + (ADD_OPTIONS if case.adds else GATED_OPTIONS if case.gated else [])
    return [case.alike(**changes) for changes in options]


@pytest.mark.parametrize("case", [case for op in ROW_NORMS for case in option_cases(op)], ids=str)
def test_options_and_mixed_dtypes(case, device):
    check(case, inputs(case, device))


@operations
@pytest.mark.parametrize("shape, normalized", [((4, 3, 5, 2), 2), ((2, 3, 4), 3), ((6,), 1), ((2, 2, 2, 9), 1)])
def test_many_dimensions(op, shape, normalized, device):
    case = plain_case(op, shape, torch.float32, normalized=normalized)
    check(case, inputs(case, device))


@operations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_layouts_of_input_and_gradient(op, layout, dtype, device):
    case = plain_case(op, (4, 3, 72), dtype)
    tensors = inputs(case, device)
    tensors |= {name: relaid(t, layout) for name, t in tensors.items() if name in ("x", "residual", "gate")}
    dy = relaid(torch.randn(case.shape, device=device).to(dtype), layout)
    dh = relaid(torch.randn(case.shape, device=device).to(dtype), layout) if case.adds else None
    before = {name: t.clone() for name, t in tensors.items()}
    check(case, tensors, dy, dh)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors), "an input was written to"
    y, _ = call(case, tensors)
    assert y.is_contiguous(), "stock returns contiguous results whatever the input's strides"


@operations
def test_expanded_gradient(op, device):
    """The gradient of a sum has stride zero everywhere."""
    case = plain_case(op, (5, 24), torch.float32)
    dy = torch.ones((), device=device).expand(case.shape)
    check(case, inputs(case, device), dy, dy if case.adds else None)


@operations
def test_empty_inputs(op, device):
    for shape in [(0, 8), (3, 0, 8), (0,), (4, 0)]:
        case = plain_case(op, shape, torch.float32)
        leaves = {name: t.requires_grad_() for name, t in inputs(case, device).items()}
        y, _ = call(case, leaves)
        assert y.shape == shape
        y.sum().backward()
        assert leaves["x"].grad.shape == shape
        assert torch.equal(leaves["weight"].grad, torch.zeros(shape[-1:], device=device))


@operations
@pytest.mark.triton
def test_kernels_take_zero_rows(op, triton_device):
    case = plain_case(op, (0, 40), torch.bfloat16)
    tensors = inputs(case, triton_device)
    kernels = fastnorm.backend._triton
    affine = tensors["weight"], tensors.get("bias")
    other = tensors.get("residual", tensors.get("gate"))
    results = forward(kernels, op, tensors["x"], other, *affine, residual_dtype=torch.float32)
    shapes = [(0, 40), (0, 40) if case.adds else None, (0,) if case.centers else None, (0,)]
    assert [None if t is None else tuple(t.shape) for t in results] == shapes


@operations
def test_mean_far_from_zero(op, device):
    """mean 1e4, std 1: E[x²] − E[x]² would lose every digit."""
    for dtype in (torch.float32, torch.float64)[: 1 if SIMULATED else 2]:
        case = plain_case(op, (16, 1000), dtype)
        check(case, inputs(case, device, mean=1e4))


@operations
def test_huge_values(op, device):
    """1e18 squared fits into float32; a sum of many such squares does not."""
    case = plain_case(op, (4, 300), torch.float32)
    check(case, inputs(case, device, std=1e18))


@operations
@pytest.mark.parametrize("cols", [600] if SIMULATED else [600, 1500, 17000])
def test_huge_values_in_wide_rows(op, cols, kernel_device):
    case = plain_case(op, (1, cols), torch.float32)
    y, _ = call(case, inputs(case, kernel_device, std=1e18))
    assert torch.isfinite(y).all() and y.abs().max() > 0.1


@operations
def test_zero_weight_and_constant_rows(op, device):
    case = plain_case(op, (4, 96), torch.float32)
    tensors = inputs(case, device)
    tensors["weight"].zero_()
    tensors["x"][1] = 3.0
    tensors["x"][2] = 0.0
    check(case, tensors)


@operations
@pytest.mark.parametrize("bad, cols", [("nan", 96), ("inf", 96)] + [("-inf", 700), ("nan", 9000)] * (not SIMULATED))
def test_bad_rows_stay_in_their_rows(op, bad, cols, kernel_device):
    case = plain_case(op, (4, cols), torch.float32)
    tensors = inputs(case, kernel_device)
    good = {name: t.clone() for name, t in tensors.items()}
    tensors["x"][2, cols // 2] = float(bad)
    others = [0, 1, 3]
    results = []
    for leaves in (tensors, good):
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        y, _ = call(case, leaves)
        y.sum().backward()
        results.append((y.detach(), leaves["x"].grad))
    (y, dx), (expected_y, expected_dx) = results
    assert torch.equal(y[others], expected_y[others]) and torch.equal(dx[others], expected_dx[others])
    assert torch.isnan(y[2]).any() and torch.isnan(dx[2]).any()


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cols", [64, 98, 1000] if SIMULATED else [64, 98, 200, 1000])
def test_rows_do_not_depend_on_the_batch(op, dtype, cols, kernel_device):
    """y, h and dx of a row are bitwise the same alone, in a small batch and in a large one. Rows of 98 columns begin
    between multiples of 16 bytes."""
    case = plain_case(op, (37, cols), dtype)
    tensors = inputs(case, kernel_device)
    dy = torch.randn(case.shape, device=kernel_device).to(dtype)
    whole = results_of(case, tensors, dy)
    for rows in (slice(0, 1), slice(5, 6), slice(30, 37), slice(2, 20)):
        part = case.alike(shape=(rows.stop - rows.start, cols))
        some = {name: t[rows] if t.dim() == 2 else t for name, t in tensors.items()}
        for name, value in results_of(part, some, dy[rows]).items():
            if name in ("y", "h", "x", "residual", "gate"):
                assert torch.equal(value, whole[name][rows]), name


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_two_runs_are_bitwise_equal(op, dtype, kernel_device):
    case = plain_case(op, (43, 320), dtype)
    tensors, dy = inputs(case, kernel_device), torch.randn(43, 320, device=kernel_device).to(dtype)
    first, second = (results_of(case, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def results_of(case: Case, tensors: dict, dy: torch.Tensor) -> dict:
    """y, h and the gradients, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = call(case, leaves)
    found = torch.autograd.grad((y, h) if case.adds else y, list(leaves.values()), (dy, dy) if case.adds else dy)
    return {"y": y.detach(), "h": h.detach()} | dict(zip(leaves, found, strict=True))


@operations
@pytest.mark.parametrize(
    "frozen", [("weight",), ("bias",), ("weight", "bias"), ("x", "residual"), ("residual", "gate")], ids="-".join
)
def test_frozen_parameters_get_no_gradient_and_change_no_other(op, frozen, device):
    case = plain_case(op, (6, 80), torch.float32)
    tensors = inputs(case, device)
    gradients = []
    for without in ((), frozen):
        leaves = {name: t.clone().requires_grad_(name not in without) for name, t in tensors.items()}
        call(case, leaves)[0].square().sum().backward()
        gradients.append({name: t.grad for name, t in leaves.items()})
    everything, rest = gradients
    for name in tensors:
        if name in frozen:
            assert rest[name] is None
        else:  # a kernel without the other sums is another kernel: its multiply-adds may be joined differently
            torch.testing.assert_close(rest[name], everything[name], rtol=1e-6, atol=1e-6)


@adding
def test_each_output_of_an_add_norm_has_its_own_gradient(op, device):
    """One of two outputs unused: the other's gradient still flows, and alone."""
    case = plain_case(op, (5, 40), torch.float32)
    tensors = inputs(case, device)
    found = {}
    for used in ("y", "h", "both"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        y, h = call(case, leaves)
        losses = {"y": y.square().sum(), "h": h.pow(3).sum()}
        (losses["y"] + losses["h"] if used == "both" else losses[used]).backward()
        found[used] = leaves["x"].grad, leaves["residual"].grad
    h = tensors["x"] + tensors["residual"]
    torch.testing.assert_close(found["h"][0], 3 * h**2)
    for i in range(2):
        torch.testing.assert_close(found["both"][i], found["y"][i] + found["h"][i])


@adding
def test_no_residual_starts_the_stream(op, device):
    case = plain_case(op, (5, 40), torch.bfloat16, residual=None)
    tensors = inputs(case, device)
    y, h = call(case, tensors)
    plain = case.alike(op=op.removeprefix("add_"))
    assert h is tensors["x"] and torch.equal(y, call(plain, tensors)[0])
    y, h = call(case.alike(options={"residual_dtype": torch.float32}), tensors)
    assert h.dtype == torch.float32 and y.dtype == torch.bfloat16 and torch.equal(h, tensors["x"].float())


@adding
def test_h_requires_a_gradient_only_where_it_has_one(op, device):
    """As x + residual does: else whatever h goes into would compute gradients that nobody wants."""
    case = plain_case(op, (5, 40), torch.float32)
    tensors = inputs(case, device)
    for wanted in tensors:
        y, h = call(case, {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()})
        assert y.requires_grad and h.requires_grad == (wanted in ("x", "residual"))


@adding
@pytest.mark.parametrize("residual", [None, torch.float64], ids=str)
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rounded_h_of_float64_is_normalised_in_float64(op, residual, h_dtype, device):
    case = plain_case(op, (5, 40), torch.float64, residual=residual, options={"residual_dtype": h_dtype})
    tensors = {name: t.requires_grad_() for name, t in inputs(case, device).items()}
    tensors["x"].data.flatten()[0] = -0.0
    y, h = call(case, tensors)
    total = tensors["x"] if residual is None else tensors["x"] + tensors["residual"]
    assert y.dtype == torch.float64 and h.dtype == h_dtype
    assert torch.equal(h, total.to(h_dtype)) and torch.equal(h.signbit(), total.to(h_dtype).signbit())
    values = total + (h.double() - total).detach()
    affine = [tensors[name] for name in ("weight", "bias") if name in tensors]
    expected = (F.layer_norm if case.centers else F.rms_norm)(values, (40,), *affine, eps=case.eps)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if backend._forced != "reference":  # autograd carries the gradient of h in its dtype
        found, right = (torch.autograd.grad(out.square().sum(), list(tensors.values())) for out in (y, expected))
        for gradient, wanted in zip(found, right, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-11)


@adding
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_that_can_be_differentiated_are_not_rounded_to_the_dtype_of_h(op, x_dtype, kernel_device):
    case = plain_case(op, (5, 40), x_dtype, residual=x_dtype, options={"residual_dtype": torch.bfloat16})
    tensors = {name: t.requires_grad_() for name, t in inputs(case, kernel_device).items()}
    y, h = call(case, tensors)
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    plain, differentiable = (
        torch.autograd.grad((y, h), list(tensors.values()), (dy, dh), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if x_dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for once, again in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(again, once, **close)


def test_eps_of_none_is_that_of_float64_statistics(device):
    """Those are float64 if x or the residual is, whatever h's dtype."""
    x = 1e-5 * torch.randn(3, 8, dtype=torch.float64, device=device)
    for residual in (None, x.float()):
        y, h = fastnorm.functional.add_rms_norm(x, residual, (8,), residual_dtype=torch.float32)
        torch.testing.assert_close(y, F.rms_norm(h.double(), (8,)), rtol=1e-12, atol=1e-12)


@operations
@pytest.mark.parametrize("affine", [True] if SIMULATED else [True, False])
def test_gradcheck_and_gradgradcheck(op, affine, device):
    case = plain_case(op, (3, 5), torch.float64)
    if not affine:
        case = case.alike(weight=None, bias=None)
    tensors = inputs(case, device)
    names = list(tensors)

    def outputs(*leaves):
        y, h = call(case, dict(zip(names, leaves, strict=True)))
        return (y, h) if case.adds else y

    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(outputs, leaves)
    assert SIMULATED or torch.autograd.gradgradcheck(outputs, leaves)  # a double backward runs PyTorch's operations



@operations
@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradients_that_can_be_differentiated_are_the_same(op, zero_centered, device):
    """gradgradcheck does not miss what they leave out, such as dh."""
    case = plain_case(op, (3, 8), torch.float64, options={"zero_centered": zero_centered})
    leaves = {name: t.requires_grad_() for name, t in inputs(case, device).items()}
    y, h = call(case, leaves)
    outputs = (y, h) if case.adds else (y,)
    dy = [torch.randn_like(t) for t in outputs]
    plain, differentiable = (
        torch.autograd.grad(outputs, list(leaves.values()), dy, retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for a, b in zip(plain, differentiable, strict=True):
        assert b.requires_grad and not a.requires_grad
        torch.testing.assert_close(a, b)


if not SIMULATED:  # hypothesis draws shapes at will, and each would be compiled

    def subsets(draw, *names):
        return {name: draw(st.sampled_from(DTYPES)) for name in names if draw(st.booleans())}

    @st.composite
    def cases(draw) -> tuple[Case, str]:
        op = draw(st.sampled_from(ROW_NORMS))
        lead = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
        cols = draw(st.integers(1, 70) | st.sampled_from([127, 129, 255, 300, 777]))
        case = Case(op, (*lead, cols), draw(st.sampled_from(DTYPES)), eps=draw(st.sampled_from([1e-5, 1e-12, 0.1])))
        names = ["weight", *(["bias"] if case.has_bias else []), *(["gate"] if case.gated else [])]
        case = case.alike(**subsets(draw, *names))
        if case.adds:
            case.residual = draw(st.sampled_from(DTYPES))
            case.options["residual_dtype"] = draw(st.sampled_from([None, *DTYPES]))
        if case.gated:
            case.options["activation"] = draw(st.sampled_from(["silu", "sigmoid"]))
            case.options["norm_before_gate"] = draw(st.booleans())
            divisors = [n for n in range(1, cols + 1) if cols % n == 0]
            case.options["group_size"] = draw(st.sampled_from([None, *divisors]))
        case.options["zero_centered"] = draw(st.booleans())
        case.options["out_dtype"] = draw(st.sampled_from([None, *DTYPES]))
        if not case.centers:
            case.options["rounding"] = draw(st.sampled_from(["torch", "llama"]))
        return case, draw(st.sampled_from(["contiguous", *LAYOUTS]) if lead else st.just("contiguous"))

    @given(drawn=cases())
    @examples(40)
    def test_any_shape_layout_dtype_and_option(drawn, device):
        case, layout = drawn
        tensors = inputs(case, device)
        tensors |= {name: relaid(t, layout) for name, t in tensors.items() if name in ("x", "residual", "gate")}
        check(case, tensors)
