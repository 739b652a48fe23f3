"""Modulated row norms in the compiled backend: h = residual + x_gate · x; weight, bias and x_gate of each sample."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastnorm import operators
from helpers.norms import DTYPES, assert_as_good_as_stock
from helpers.whole_calls import (
    NATIVE_ON_CPU,
    assert_declined_where_somebody_looks_on,
    assert_keeps_no_references,
    assert_same,
    is_by_cpp,
    native,
)

both = pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EVERYTHING = ("residual", "x_gate", "weight", "bias")


def make(samples, rows, cols, x=F32, residual=None, parameters=None, h=None, given=EVERYTHING, zero_centered=True):
    """The tensors of a call, and its options; rows: of each sample. A dtype that is not named is x's."""
    residual, parameters = residual or x, parameters or x
    h = h or (torch.promote_types(x, residual) if "residual" in given else x)

    def random(*shape, dtype):
        return torch.randn(shape, dtype=F64).to(dtype)

    count = samples * rows
    tensors = {name: random(samples, cols, dtype=parameters) for name in ("x_gate", "weight", "bias")}
    tensors |= {"x": random(count, cols, dtype=x), "residual": random(count, cols, dtype=residual)}
    tensors = {name: tensors[name] if name == "x" or name in given else None for name in ("x", *EVERYTHING)}
    makes_h = "residual" in given or "x_gate" in given
    gradients = {"dy": random(count, cols, dtype=x), "dh": random(count, cols, dtype=h) if makes_h else None}
    options = {"samples": samples, "zero_centered": zero_centered, "h_dtype": h if makes_h else None}
    return SimpleNamespace(**tensors, **gradients, **options)


def run(op, case):
    """All results of the operators."""
    centers, c = op == "layer_norm", case
    options = c.zero_centered, True, True, None
    y, h, mean, rstd = native.row_norm_forward(
        c.x, c.residual, None, c.x_gate, 1, 1, c.samples, c.weight, c.bias, 1e-5, centers, *options, c.x.dtype,
        c.h_dtype,
    )  # fmt: skip
    residual_dtype, *wanted = (None if t is None else t.dtype for t in (c.residual, c.weight, c.bias))
    dx, dresidual, dgate, dx_gate, dweight, dbias = native.row_norm_backward(
        c.dy, c.dh, c.x if h is None else h, None if c.x_gate is None else c.x, None, c.x_gate, 1, 1, c.samples,
        c.weight, c.bias, mean, rstd, *options, c.x.dtype, residual_dtype, *wanted,
    )  # fmt: skip
    assert dgate is None
    if c.x_gate is None and residual_dtype == c.x.dtype:
        assert dresidual is None
        dresidual = dx
    names = "y", "h", "mean", "rstd", "dx", "dresidual", "dx_gate", "dweight", "dbias"
    return dict(zip(names, (y, h, mean, rstd, dx, dresidual, dx_gate, dweight, dbias), strict=True))


def rows_of(parameter, case):
    """A parameter's row for each row of x."""
    return parameter.repeat_interleave(len(case.x) // len(parameter), 0)


def summed(values, case):
    """Over the rows of each sample."""
    return values.unflatten(0, (case.samples, -1)).sum(1)


def by_formula(op, case, h, dtype):
    """y and all gradients from h in a dtype. Those of the parameters are sums over the rows of a sample."""
    leaves = {"h": h, "weight": case.weight, "bias": case.bias}
    leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in leaves.items() if t is not None}
    norm = F.layer_norm if op == "layer_norm" else F.rms_norm
    y = norm(leaves["h"], h.shape[-1:], eps=1e-5)
    if "weight" in leaves:
        y = y * (rows_of(leaves["weight"], case) + case.zero_centered)
    if "bias" in leaves:
        y = y + rows_of(leaves["bias"], case)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.dy.to(dtype)), strict=True))
    total = found.pop("h") + (0 if case.dh is None else case.dh.to(dtype))
    results = {"y": y.detach(), "dx": total} | {f"d{name}": g for name, g in found.items()}
    if case.x_gate is not None:
        results["dx"] = total * rows_of(case.x_gate, case).to(dtype)
        results["dx_gate"] = summed(total * case.x.to(dtype), case)
    return results if case.residual is None else results | {"dresidual": total}


def check(op, case):
    """Every result against the formula in float64, from the h that the kernels have rounded."""
    found = run(op, case)
    if case.h_dtype is not None:
        exact = case.x.double() if case.x_gate is None else case.x.double() * rows_of(case.x_gate, case).double()
        exact = exact if case.residual is None else exact + case.residual.double()
        unit = max(torch.finfo(case.h_dtype).eps / 2, torch.finfo(torch.promote_types(F32, case.x.dtype)).eps)
        assert found["h"].dtype == case.h_dtype
        assert (found["h"].double() - exact).abs().max() <= unit * exact.abs().max() * 1.01
    h = case.x if found["h"] is None else found["h"]
    computed = found["rstd"].dtype
    expected, stock = (by_formula(op, case, h, dtype) for dtype in (F64, computed))
    gradient_terms = (case.dy.double().abs().max() * found["rstd"].max()).item()
    for name, right in expected.items():
        actual = found[name]
        assert actual.shape == right.shape and actual.is_contiguous()
        unit = max(torch.finfo(actual.dtype).eps, torch.finfo(computed).eps) * (64 if computed == F64 else 1)
        is_sum = name in ("dx_gate", "dweight", "dbias")
        scale = torch.tensor(gradient_terms if name in ("dx", "dresidual", "dx_gate") else 1.0)
        walk = (len(case.x) / case.samples) ** 0.5 * 2 * torch.finfo(computed).eps if is_sum else 0.0
        assert_as_good_as_stock(f"{op} {name}", actual, stock[name], right, unit, 4 * scale, walk)
        others = {"dx": case.x, "y": case.x} | {f"d{k}": getattr(case, k) for k in EVERYTHING}
        assert actual.dtype == others[name].dtype
    for name in found.keys() - expected.keys() - {"h", "mean", "rstd"}:
        assert found[name] is None


CASES = {
    **{str(dtype): {"samples": 3, "rows": 5, "cols": 64, "x": dtype} for dtype in DTYPES},
    "bf16 beside float32": {"samples": 2, "rows": 20, "cols": 96, "x": BF16, "residual": F32},
    "float32 parameters": {"samples": 2, "rows": 20, "cols": 96, "x": BF16, "parameters": F32},
    "16-bit parameters": {"samples": 3, "rows": 1, "cols": 96, "x": F32, "parameters": F16},
    "two 16-bit types": {"samples": 3, "rows": 2, "cols": 50, "x": F16, "residual": BF16, "h": BF16},
    "float64 residual": {"samples": 2, "rows": 3, "cols": 40, "x": BF16, "residual": F64, "parameters": F32},
    "float64 h": {"samples": 2, "rows": 3, "cols": 40, "residual": F32, "h": F64, "given": ("x_gate", "weight")},
    "one column": {"samples": 2, "rows": 3, "cols": 1},
    "odd columns": {"samples": 3, "rows": 7, "cols": 37, "x": BF16},
    "many columns": {"samples": 2, "rows": 2, "cols": 5001},
    "one row each": {"samples": 40, "rows": 1, "cols": 130},
    "many rows": {"samples": 2, "rows": 300, "cols": 48},
    "one sample": {"samples": 1, "rows": 1, "cols": 600},
    "no residual": {"samples": 2, "rows": 30, "cols": 64, "x": BF16, "h": F32, "given": ("x_gate", "weight", "bias")},
    "no x_gate": {"samples": 2, "rows": 30, "cols": 64, "given": ("residual", "weight", "bias")},
    "scale and shift": {"samples": 2, "rows": 30, "cols": 64, "given": ("weight", "bias")},
    "shift alone": {"samples": 2, "rows": 30, "cols": 64, "given": ("bias", "x_gate")},
    "neither": {"samples": 2, "rows": 30, "cols": 64, "given": ("residual", "x_gate")},
    "a plain weight": {"samples": 2, "rows": 30, "cols": 64, "zero_centered": False},
}


@pytest.mark.instruction_sets
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case):
    check("layer_norm", make(**case))
    check("rms_norm", make(**case))


@pytest.mark.instruction_sets
@both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_vector_tail(op, dtype):
    for cols in (*range(2, 36), 63, 65, 127, 129, 1041):
        check(op, make(2, 3, cols, dtype))


@both
def test_parameters_of_one_sample_may_have_the_normalised_shape(op):
    case = make(1, 20, 64)
    expected = run(op, case)
    case.weight, case.bias, case.x_gate = case.weight[0], case.bias[0], case.x_gate[0]
    found = run(op, case)
    for name in ("dweight", "dbias", "dx_gate"):
        assert found[name].shape == (64,)
        expected[name] = expected[name][0]
    assert_same(found.values(), expected.values())


@both
@pytest.mark.parametrize("rows", [1, 30])
def test_parameters_are_read_at_any_strides(op, rows):
    """Chunks of a projection, rows that are all the same, and columns that are not adjacent."""
    case = make(6, rows, 100, BF16)
    wide = torch.randn(6, 600, dtype=F64).to(BF16)
    case.bias, case.weight, case.x_gate = wide.chunk(6, 1)[:3]
    case.x_gate = wide[:1, 200:300].expand(6, 100)
    found = run(op, case)
    for weight in (case.weight.contiguous(), case.weight.t().contiguous().t()):
        case.weight, case.bias, case.x_gate = weight, case.bias.contiguous(), case.x_gate.contiguous()
        assert_same(found.values(), run(op, case).values())


@both
@pytest.mark.parametrize("samples, rows, parameters", [(1, 300, F32), (3, 70, F32), (150, 1, BF16)])
def test_the_number_of_threads_changes_nothing(op, samples, rows, parameters, threads):
    case = make(samples, rows, 800, parameters=parameters)
    threads(1)
    expected = run(op, case)
    for count in (2, 3, 7):
        threads(count)
        assert_same(run(op, case).values(), expected.values())


@both
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_a_sample_alone_has_the_same_bits(op, rows):
    case = make(5, rows, 130, BF16, residual=F32, parameters=F32)  # which show the order of a sum
    batch = run(op, case)
    per_row = dict.fromkeys(("y", "h", "mean", "rstd", "dx", "dresidual"), rows)
    for i in range(5):
        alone = SimpleNamespace(**vars(case))
        alone.samples = 1
        for name, tensor in vars(case).items():
            if isinstance(tensor, torch.Tensor):
                setattr(alone, name, tensor.unflatten(0, (5, -1))[i])
        for name, value in run(op, alone).items():
            count = per_row.get(name, 1)
            assert_same([value], [None if batch[name] is None else batch[name][i * count : (i + 1) * count]])


@pytest.mark.instruction_sets
@pytest.mark.parametrize("cols", [32, 64, 1000, 5000])
def test_a_mean_far_from_zero_costs_no_digits(cols):
    case = make(2, 3, cols)
    case.residual += 1e4
    found = run("layer_norm", case)
    y = F.layer_norm(found["h"].double(), (cols,)) * rows_of(case.weight + 1, case) + rows_of(case.bias, case)
    torch.testing.assert_close(found["y"].double(), y, rtol=1e-6, atol=1e-5)


@pytest.mark.instruction_sets
@both
def test_squares_that_fit_do_not_overflow_in_their_sum(op):
    case = make(2, 3, 1000, given=("residual", "x_gate"))
    case.x, case.x_gate = case.x.sign() * 1.5e16, torch.full_like(case.x_gate, 1e3)
    found = run(op, case)
    norm = F.layer_norm if op == "layer_norm" else F.rms_norm
    torch.testing.assert_close(found["y"].double(), norm(found["h"].double(), (1000,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["one row each", "no residual"])
def test_operators_keep_to_their_schemas(name):
    c = make(**CASES[name])
    tail, dtypes = (c.zero_centered, True, True, None), (c.x.dtype, c.h_dtype)
    forward = c.x, c.residual, None, c.x_gate, 1, 1, c.samples, c.weight, c.bias, 1e-5, True, *tail, *dtypes
    torch.library.opcheck(torch.ops.fastnorm.row_norm_forward.default, forward)
    _, h, *moments = native.row_norm_forward(*forward)
    x = None if c.x_gate is None else c.x
    backward = c.dy, c.dh, c.x if h is None else h, x, None, c.x_gate, 1, 1, c.samples, c.weight, None, *moments
    dtypes = c.x.dtype, None if c.residual is None else c.residual.dtype, F32, F32
    torch.library.opcheck(torch.ops.fastnorm.row_norm_backward.default, (*backward, *tail, *dtypes))
    assert operators.row_norm_backward(*backward, *tail, *dtypes)[5].shape == (c.samples, c.x.shape[1])


def test_wrong_arguments_raise():
    c = make(2, 3, 8)
    options = 1e-5, True, True, True, True
    for x_gate, groups, samples, weight, cast, h_dtype, message in (
        (c.x_gate, 1, 2, c.weight[0], None, F32, r"weight of shape \[2, 8\], got \[8\]"),
        (c.x_gate[:, :7], 1, 2, c.weight, None, F32, r"x_gate of shape \[2, 8\], got \[2, 7\]"),
        (c.x_gate, 1, 4, c.weight, None, F32, "a number of samples that divides 6 rows, got 4"),
        (c.x_gate, 1, 0, c.weight, None, F32, "a number of samples that divides 6 rows, got 0"),
        (c.x_gate, 2, 2, c.weight, None, F32, "samples or an x_gate with groups"),
        (c.x_gate, 1, 2, c.weight, None, None, "residual_dtype with a residual or an x_gate"),
        (None, 1, 2, c.weight, None, F32, "residual_dtype with a residual or an x_gate"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.row_norm_forward(
                c.x, None, None, x_gate, 1, groups, samples, weight, None, *options, cast, F32, h_dtype
            )
    mean, rstd = torch.zeros(6), torch.ones(6)
    types = True, True, True, None, F32, None, None, None
    for x, x_gate, message in (
        (None, c.x_gate, "x with an x_gate"), (c.x, None, "x with an x_gate"), (c.x[:5], c.x_gate, "x of shape"),
        (c.x.double(), c.x_gate, "x in Float, got Double"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            native.row_norm_backward(c.dy, None, c.x, x, None, x_gate, 1, 1, 2, None, None, mean, rstd, *types)


# Whole calls, with autograd


def in_samples(case):
    """The case with x as (samples, rows, columns), and parameters that are given as (samples, 1, columns)."""
    c = SimpleNamespace(**vars(case))
    for name in ("x", "residual", "dy", "dh", "x_gate", "weight", "bias"):
        if (tensor := getattr(case, name)) is not None:
            setattr(c, name, tensor.unflatten(0, (case.samples, -1)).detach())
    return c


def direct(op, c, served=NATIVE_ON_CPU, **changes):
    given = {"x": c.x, "residual": c.residual, "shape": None, "weight": c.weight, "bias": c.bias, "eps": 1e-5}
    given |= {"zero_centered": c.zero_centered, "out_dtype": None, "residual_dtype": c.h_dtype, "rounding": "torch"}
    given |= {"x_gate": c.x_gate}
    assert given.keys() >= changes.keys()
    return native.calls[f"modulated_{op}"](served, *(given | changes).values())


def leaves_of(case):
    return {k: t.requires_grad_() for k in ("x", *EVERYTHING) if (t := getattr(case, k)) is not None}


@pytest.mark.parametrize("name", [*map(str, DTYPES), "float64 residual", "one row each", "no residual", "no x_gate"])
def test_whole_calls_are_the_operators(name):
    flat = make(**CASES[name])
    case, results = in_samples(flat), run("layer_norm", flat)
    like = {"y": case.x, "h": case.x, **{f"d{k}": getattr(case, k) for k in ("x", *EVERYTHING)}}
    expected = {k: None if v is None else v.view_as(like[k]) for k, v in results.items() if k in like}
    with torch.no_grad():
        assert_same(direct("layer_norm", case), (expected["y"], expected["h"]))
    leaves = leaves_of(case)
    y, h = direct("layer_norm", case)
    assert is_by_cpp(y) and y.grad_fn is h.grad_fn
    found = torch.autograd.grad((y, h), list(leaves.values()), (case.dy, case.dh))
    assert_same((y.detach(), h.detach(), *found), [expected[k] for k in ("y", "h", *(f"d{k}" for k in leaves))])


@pytest.mark.parametrize("sizes", [(8,), (1, 8), (1, 1, 8), (2, 8), (2, 1, 8), (2, 3, 8)], ids=str)
def test_shapes_of_parameters(sizes):
    """In every shape that is allowed the call is one in C++, and gradients have the shape of what they are of."""
    c = in_samples(make(2, 3, 8))
    wide = torch.randn(*sizes[:-1], 3 * 8)
    c.x_gate, c.weight, c.bias = wide.chunk(3, -1)
    c.samples = wide.numel() // 24
    leaves = leaves_of(c)
    y, h = direct("layer_norm", c)
    assert is_by_cpp(y)
    found = torch.autograd.grad((y, h), list(leaves.values()), (c.dy, c.dh))
    assert [g.shape for g in found] == [t.shape for t in leaves.values()]
    flat = SimpleNamespace(**vars(c))
    for name in ("x", "residual", "dy", "dh"):
        setattr(flat, name, getattr(c, name).detach().flatten(0, 1))
    for name in ("x_gate", "weight", "bias"):
        setattr(flat, name, getattr(c, name).detach().reshape(c.samples, 8))
    expected = run("layer_norm", flat)
    assert_same([g.flatten() for g in found], [expected[f"d{k}"].flatten() for k in leaves])
    assert_same([y.detach().flatten(0, 1)], [expected["y"]])


@both
def test_h_is_x_without_a_residual_and_an_x_gate(op):
    case = in_samples(make(2, 3, 8, given=("weight", "bias")))
    y, h = direct(op, case)
    assert h is case.x and y.shape == h.shape


@both
def test_outputs_that_are_not_used(op):
    """A loss of y alone, and one of h alone, which no kernel serves."""
    case = in_samples(make(2, 3, 8))
    for only_h in (False, True):
        leaves = leaves_of(case)
        outputs = direct(op, case)
        found = torch.autograd.grad(outputs[only_h], list(leaves.values()), case.dy, allow_unused=True)
        other = SimpleNamespace(**vars(case) | ({"dy": 0 * case.dy, "dh": case.dy} if only_h else {"dh": None}))
        for name in ("x", *EVERYTHING, "dy", "dh"):
            tensor = getattr(other, name)
            setattr(other, name, None if tensor is None else tensor.detach().flatten(0, 1))
        expected = by_formula(op, other, outputs[1].detach().flatten(0, 1), F64)
        for name, gradient in zip(leaves, found, strict=True):
            gradient = torch.zeros(2, 1, 8) if gradient is None else gradient
            assert gradient.shape == leaves[name].shape
            torch.testing.assert_close(gradient.flatten(0, 1).double(), expected[f"d{name}"], rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("given", [EVERYTHING, ("x_gate", "weight"), ("weight", "bias")], ids=str)
def test_double_backward_goes_through_the_formula(op, given):
    case = in_samples(make(2, 2, 5, F64, given=given))
    leaves = leaves_of(case)

    def function(*tensors):
        given = SimpleNamespace(**vars(case) | dict(zip(leaves, tensors, strict=True)))
        return direct(op, given) if case.h_dtype is not None else direct(op, given)[0]

    assert torch.autograd.gradcheck(function, list(leaves.values()))
    assert torch.autograd.gradgradcheck(function, list(leaves.values()))


def test_defaults_of_dtypes_and_eps():
    case = in_samples(make(2, 3, 8, BF16))
    for changes, y_dtype, h_dtype in (
        ({}, BF16, BF16), ({"out_dtype": F16, "residual_dtype": F32}, F16, F32),
        ({"residual": None, "residual_dtype": F32}, BF16, F32),
        ({"residual": None, "residual_dtype": None}, BF16, BF16),
    ):  # fmt: skip
        y, h = direct("layer_norm", case, **changes)
        assert (y.dtype, h.dtype) == (y_dtype, h_dtype)
    by_default, _ = direct("rms_norm", case, eps=None)
    assert_same([by_default], [direct("rms_norm", case, eps=torch.finfo(F32).eps)[0]])
    assert direct("layer_norm", case, eps=None) is NotImplemented


@both
def test_calls_that_are_wrong_or_not_plain_are_declined(op):
    c = in_samples(make(2, 3, 8))
    assert direct(op, c) is not NotImplemented
    apart = torch.randn(3, 2, 8).transpose(0, 1)  # rows that no stride leads along
    for changes in (
        {"x_gate": c.x_gate[0]}, {"x_gate": c.x}, {"x_gate": c.x_gate.int()}, {"weight": c.weight[0, 0]},
        {"bias": c.bias[:1]}, {"bias": c.bias[..., :1]}, {"bias": c.bias[None, None]}, {"bias": c.bias.sum()},
        {"x_gate": 1.0}, {"rounding": "llama"}, {"eps": 1}, {"shape": (7,)}, {"shape": (3, 8)},
        {"residual": None, "x_gate": None, "residual_dtype": F64}, dict.fromkeys(("x_gate", "weight", "bias"), apart),
    ):  # fmt: skip
        assert direct(op, c, **changes) is NotImplemented, changes
    assert_declined_where_somebody_looks_on(lambda x: direct(op, c, x=x), c.x)
    with pytest.raises(TypeError, match="takes 13 arguments, but got 3"):
        native.calls[f"modulated_{op}"](1, 2)


def test_a_call_keeps_no_references():
    c = in_samples(make(2, 3, 8))
    given = c.x.requires_grad_(), c.residual, None, c.weight, c.bias, 1e-5, True, None, None, "torch"
    arguments, *mistakes = ([NATIVE_ON_CPU, *given, x_gate] for x_gate in (c.x_gate, c.x_gate[0], 1.0))
    assert_keeps_no_references(native.calls["modulated_layer_norm"], arguments, mistakes)
