"""What only the compiled backend has: threads, forks, instruction sets, vector tails, 16-bit rounding, checks."""

import itertools

import pytest
import torch

import fastnorm
from fastnorm.backend import ROW_NORMS
from helpers.norms import DTYPES, backward, check, forward, inputs, plain_case

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
operations = pytest.mark.parametrize("op", ROW_NORMS)


def random_rows(rows, cols, dtype=torch.float32):
    return torch.randn(rows, cols, dtype=torch.float64).to(dtype)


def everything(op, rows, cols, dtype):
    """All results of one forward and backward on inputs that depend on the seed alone."""
    torch.manual_seed(1)
    x, other, dy, dh = (random_rows(rows, cols, dtype) for _ in range(4))
    weight, bias = (random_rows(1, cols, dtype)[0] for _ in range(2))
    y, h, *moments = forward(native, op, x, other, weight, bias)
    h = x if h is None else h
    gradients = backward(native, op, dy, dh, h, weight, *moments, gate=other, bias=bias)
    return [t for t in (y, h, *moments, *gradients) if t is not None]


@operations
@pytest.mark.parametrize("rows, cols", [(8, 4096), (300, 1000), (300, 4096), (2000, 64), (1, 70000)])
def test_the_number_of_threads_changes_nothing(op, rows, cols, threads):
    threads(1)
    expected = everything(op, rows, cols, torch.float32)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, everything(op, rows, cols, torch.float32), expected))


@pytest.mark.instruction_sets
@operations
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cols", [5, 31, 64, 67, 256, 1000])
def test_a_row_is_the_same_wherever_it_lies(op, cols, dtype):
    row, residual, weight, bias = (random_rows(1, cols, dtype) for _ in range(4))
    expected, *_ = forward(native, op, row, residual, weight[0], bias[0])
    for offset in range(17):
        x = torch.zeros(3 * cols + 40, dtype=dtype)[offset:].as_strided((3, cols), (cols + 3, 1))
        x[:] = random_rows(3, cols, dtype)
        x[1] = row[0]
        y, *_ = forward(native, op, x, residual.expand(3, cols), weight[0], bias[0])
        assert torch.equal(y[1], expected[0])


@pytest.mark.instruction_sets
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cols", [1, 8, 24, 40, 64, 100, 128, 200])
def test_a_narrow_row_is_the_same_among_others(op, cols, dtype):
    """Kernels take several at once. Of these rows some need a third pass, double precision, or are not finite."""
    x, other, dy, dh = (random_rows(21, cols, dtype) for _ in range(4))
    weight, bias = (random_rows(1, cols, dtype)[0] for _ in range(2))
    x[3] += 1e4
    x[5], other[5] = torch.finfo(dtype).max / 4, 0
    x[9, 0] = float("nan")

    def results(rows, y_dtype):
        y, h, *moments = forward(native, op, x[rows], other[rows], weight, bias, out_dtype=y_dtype)
        gradients = backward(native, op, dy[rows], dh[rows], x[rows] if h is None else h, weight, *moments)
        return [t for t in (y, h, *moments, *gradients[:2]) if t is not None]

    for y_dtype in {dtype, torch.float32}:  # the other one is converted row by row
        whole = results(slice(None), y_dtype)
        for rows in [slice(3, 20), *(slice(r, r + 1) for r in range(21))]:
            for found, expected in zip(results(rows, y_dtype), whole, strict=True):
                torch.testing.assert_close(found, expected[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("cols", [*range(1, 71), 127, 128, 129, 256, 1023, 1025, 1041, 4095, 4097, 8191, 12290])
def test_every_vector_tail(cols):
    x, dy, w, b = (random_rows(3, cols) for _ in range(4))
    w, b = w[0], b[0]
    y, _, mean, rstd = forward(native, "layer_norm", x, None, w, b)
    dx, _, dw, db = backward(native, "layer_norm", dy, None, x, w, mean, rstd)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    oracle = torch.nn.functional.layer_norm(leaves[0], (cols,), *leaves[1:], 1e-5)
    expected = [oracle, *torch.autograd.grad(oracle, leaves, dy.double())]
    for actual, value in zip((y, dx, dw, db), expected, strict=True):
        scale = rstd.max().item() * 5 if value.shape == x.shape else 1.0  # one or two columns cancel to nearly nothing
        torch.testing.assert_close(actual.double(), value, rtol=3e-6, atol=3e-6 * max(1.0, scale))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("op", ["gated_layer_norm", "gated_rms_norm"])
@pytest.mark.parametrize("cols", [*range(1, 36), 63, 64, 65, 127, 129, 1041])
def test_every_vector_tail_beside_a_gate(op, cols):
    """Of groups, whose rows begin anywhere; both orders and both activations."""
    for norm_before_gate, activation in itertools.product((True, False), ("silu", "sigmoid")):
        options = {"norm_before_gate": norm_before_gate, "activation": activation, "group_size": cols}
        case = plain_case(op, (3, 2 * cols), torch.float32, options=options)
        with fastnorm.use("native"):
            check(case, inputs(case))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("computed", [torch.float32, torch.float64], ids=str)
def test_activations_of_every_16_bit_gate(silu, dtype, computed):
    """x̂ is 1, so that y is the activation and dgate its slope: to a few units in the last place, and NaN where
    PyTorch's are."""
    gate = ALL_BITS.view(dtype).view(512, 128)
    x, options = torch.ones(512, 128, dtype=computed), (False, silu, True, None)
    whole, plain = (None, 1, 1, 1), (None, None)
    y, _, _, rstd = native.row_norm_forward(x, None, gate, *whole, *plain, 0.0, False, *options, computed, None)
    given = x, None, x, None, gate.to(computed), *whole, *plain, None, rstd, *options, computed, None, None, None
    dgate = native.row_norm_backward(*given)[2]
    exact = gate.double().requires_grad_()
    expected = torch.nn.functional.silu(exact) if silu else torch.sigmoid(exact)
    slope = torch.autograd.grad(expected.sum(), exact)[0]
    unit = torch.finfo(computed).eps
    # of the slope, gate · (1 − σ) has an error of half a unit times the gate, until that has no more digits at 17 or 37
    for actual, right, units, scale in ((y, expected.detach(), 4, 0.0), (dgate, slope, 20, 1.0)):
        assert torch.equal(actual.isnan(), right.isnan())
        error = (actual.double() - right).nan_to_num(0.0, 0.0, 0.0).abs()
        allowed = units * unit * torch.maximum(right.abs().nan_to_num(1.0, 1.0, 1.0), torch.tensor(scale))
        # 0 where the exponential overflows, a little before gate · σ is itself too small
        assert (error <= allowed + torch.finfo(computed).smallest_normal * 512).all()


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_exactly(dtype):
    x = ALL_BITS.view(dtype).view(512, 128)
    _, h, *_ = forward(native, "add_rms_norm", x, torch.zeros_like(x), None, None, residual_dtype=torch.float32)
    assert torch.equal(h.isnan(), x.isnan())
    assert torch.equal(h.nan_to_num(1.5), x.float().nan_to_num(1.5))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
def test_16_bit_values_are_rounded_to_nearest_even(dtype, x_dtype):
    """Every value of the dtype, what lies between it and the next, ties, and one bit off them."""
    values = ALL_BITS.view(dtype).float().view(torch.int32)
    near = torch.stack([values + 2**shift + d for shift in (0, 11, 12, 13, 14, 15) for d in (-1, 0, 1)])
    x = near.view(torch.float32).to(x_dtype).view(-1, 1024)
    _, h, *_ = forward(native, "add_rms_norm", x, torch.zeros_like(x), None, None, residual_dtype=dtype)
    expected = x.to(dtype)
    assert torch.equal(h.isnan(), expected.isnan())
    assert torch.equal(h.nan_to_num(1.5), expected.nan_to_num(1.5))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("cols", [1, 15, 64, 256, 1000, 70000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_that_fit_do_not_overflow_in_their_sum(cols, dtype):
    x = (random_rows(2, cols).sign() * 1.5e19).to(dtype)
    y, *_ = forward(native, "rms_norm", x, out_dtype=torch.float32)
    torch.testing.assert_close(y, x.sign().float(), rtol=1e-6, atol=0)
    y, *_ = forward(native, "layer_norm", x, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), torch.nn.functional.layer_norm(x.double(), (cols,)), rtol=1e-5, atol=1e-6)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("cols", [2, 15, 64, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_rows_whose_sums_overflow(cols, dtype):
    """Their mean is exact all the same; what it missed would be all that x̂ is made of."""
    x = torch.full((2, cols), 3e38).to(dtype)
    y, _, mean, _ = forward(native, "layer_norm", x, out_dtype=torch.float32)
    assert torch.equal(mean, x[:, 0].float()) and not y.any()


@pytest.mark.instruction_sets
@pytest.mark.parametrize("cols", [32, 40, 64, 128, 256, 1000, 5000])
def test_a_mean_far_from_zero_costs_no_digits(cols):
    x = (random_rows(4, cols) + 1e4).float()
    y, *_ = forward(native, "layer_norm", x, out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), torch.nn.functional.layer_norm(x.double(), (cols,)), rtol=0, atol=3e-6)


class Normalised(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((64, 1024), float(index + 1))
        return forward(native, "rms_norm", x, eps=0.0)[0].mean()


@pytest.mark.slow
def test_forked_workers(threads):
    threads(2)
    everything("layer_norm", 256, 1024, torch.float32)  # threads that a fork would not take along
    loader = torch.utils.data.DataLoader(Normalised(), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [value.item() for value in loader] == [1.0] * 6


@operations
def test_inference_mode(op):
    name = op.title().replace("_", "").replace("Rms", "RMS")  # add_rms_norm: AddRMSNorm
    module = getattr(fastnorm, name)(100)
    with torch.inference_mode(), fastnorm.use("native"):
        result = module(random_rows(4, 100))
    for output in result if op.startswith("add_") else [result]:
        assert output.is_inference() and output.isfinite().all()


def test_wrong_arguments_raise():
    x, w = random_rows(3, 8), random_rows(1, 8)[0]
    with pytest.raises(RuntimeError, match="weight of shape"):
        forward(native, "rms_norm", x, weight=w[:7])
    with pytest.raises(RuntimeError, match="gate of shape"):
        forward(native, "gated_rms_norm", x, x[:2])
    with pytest.raises(RuntimeError, match="rstd without gaps"):
        backward(native, "rms_norm", x, None, x, w, None, torch.ones(6)[::2])
    for dims in (0, 3, -1):
        with pytest.raises(RuntimeError, match=f"in its last {dims} dimensions"):
            forward(native, "rms_norm", x, dims=dims)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        forward(native, "rms_norm", x.int(), weight=w, out_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="rstd in Double"):
        backward(native, "rms_norm", x, None, x.double(), w, None, torch.ones(3))
    with pytest.raises(RuntimeError, match="dy of shape"):
        backward(native, "rms_norm", x[:2], None, x, w, None, torch.ones(3))


def test_features_without_a_kernel_raise():
    """The schema has them, and no functional asks for them."""
    x, w = random_rows(3, 8), random_rows(1, 8)[0]
    bf16, f32 = torch.bfloat16, torch.float32
    for residual, gate, groups, cast_dtype, residual_dtype, message in (
        (None, None, 1, bf16, None, "cast_dtype with subtract_mean"),
        (None, None, 1, None, f32, "residual_dtype with a residual"),
        (x, x, 1, None, f32, "a gate with a residual"),
        (None, None, 3, None, None, "a number of groups that divides 8, got 3"),
        (None, None, 0, None, None, "a number of groups that divides 8, got 0"),
    ):
        options = 1e-5, True, False, True, True, cast_dtype, f32, residual_dtype
        with pytest.raises(RuntimeError, match=message):
            native.row_norm_forward(x, residual, gate, None, 1, groups, 1, w, w, *options)
    options = False, True, True, None, f32, None, None, None
    for dh, gate, groups, message in ((x, x, 1, "a gate with a residual"), (None, None, 3, "that divides 8, got 3")):
        with pytest.raises(RuntimeError, match=message):
            native.row_norm_backward(x, dh, x, None, gate, None, 1, groups, 1, w, None, None, torch.ones(3), *options)


def test_build_info():
    info = native.build_info()
    assert info["compiler"] and info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert native.serves("cpu") and not native.serves("mps")
