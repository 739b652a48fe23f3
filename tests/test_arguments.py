"""What stands for a number: all functionals take what torch's parser of arguments takes, and refuse what it refuses."""

import fractions

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import functional
from helpers.environment import TORCH
from helpers.stock import error_of

numpy = pytest.importorskip("numpy", reason="half of these numbers are its own")


class Float:
    def __float__(self):
        return 0.5


class Index:
    def __index__(self):
        return 8


class Half(float):
    pass


class Eight(int):
    pass


FLOATS = [
    numpy.float16(0.5), numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1), numpy.uint8(1), numpy.bool_(True),
    torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64),
    torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(1), torch.tensor(True), Half(0.5), Eight(8), 1, True, 0.1,
]  # fmt: skip
NO_FLOATS = [
    torch.tensor(0.5, requires_grad=True), torch.nn.Parameter(torch.tensor(0.5)), torch.ones(2), torch.tensor(1j),
    numpy.array(0.5), numpy.array([0.5]), fractions.Fraction(1, 2), Float(), Index(), 1j, "1", None, [0.5], 10**400,
]  # fmt: skip
INTS = [8, numpy.int64(8), numpy.int8(8), numpy.uint64(8), torch.tensor(8), torch.tensor(8).byte(), Eight(8)]
NO_INTS = [
    8.0, True, numpy.bool_(True), numpy.float64(8), torch.tensor(8.0), numpy.array([8]), fractions.Fraction(8), "8",
    None, Float(), torch.tensor(8, device="meta"),
]  # fmt: skip
X, W, B = torch.randn(4, 8), torch.randn(8), torch.randn(8)
PLANES = torch.randn(4, 8, 3)


def batch_norm(module, device, training, **options):
    """y and the running statistics."""
    mean, variance = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = module.batch_norm(PLANES.to(device), mean, variance, W.to(device), B.to(device), training=training, **options)
    return torch.stack([y.mean(), y.std(), mean.sum(), variance.sum()])


def rows(name):
    """Stock's function, or ours; of ours, every second one is what adds: h is x again."""

    def call(module, device, **options):
        x = X.to(device)
        if module is functional:
            y, _ = getattr(module, f"add_{name}")(x, torch.zeros_like(x), **{"normalized_shape": (8,)} | options)
            options = {"normalized_shape": (8,)} | options
            torch.testing.assert_close(y, getattr(module, name)(x, **options))
            return y
        return getattr(module, name)(x, **{"normalized_shape": (8,)} | options)

    return call


CALLS = {
    "layer_norm eps": lambda m, d, v: rows("layer_norm")(m, d, eps=v),
    "rms_norm eps": lambda m, d, v: rows("rms_norm")(m, d, eps=v),
    "group_norm eps": lambda m, d, v: m.group_norm(PLANES.to(d), 2, W.to(d), B.to(d), v),
    "batch_norm eps": lambda m, d, v: batch_norm(m, d, True, eps=v),
    "batch_norm eps in evaluation": lambda m, d, v: batch_norm(m, d, False, eps=v),
    "batch_norm momentum": lambda m, d, v: batch_norm(m, d, True, momentum=v),
    "batch_norm momentum in evaluation": lambda m, d, v: batch_norm(m, d, False, momentum=v),
}
INT_CALLS = {
    "layer_norm tuple": lambda m, d, v: rows("layer_norm")(m, d, normalized_shape=(v,)),
    "rms_norm tuple": lambda m, d, v: rows("rms_norm")(m, d, normalized_shape=(v,)),
    "layer_norm list": lambda m, d, v: rows("layer_norm")(m, d, normalized_shape=[v]),
    "group_norm groups": lambda m, d, v: m.group_norm(torch.cat([PLANES, -PLANES], 1).to(d), v),
}
SHAPES = [torch.Size([8]), [8], type("T", (tuple,), {})((8,)), type("L", (list,), {})((8,)), [Index()],
          (numpy.array(8),), (torch.tensor([8]),)]  # fmt: skip
NO_SHAPES = [8, numpy.int64(8), torch.tensor(8), numpy.array([8]), torch.tensor([8]), range(8, 9), {8}, {8: 1}, "8",
             b"\x08", iter([8]), (8.0,), (True,), (numpy.bool_(True),)]  # fmt: skip


def like_stock(call, value, device) -> None:
    """The same values, or the same exception."""
    expected = error_of(lambda: call(F, device, value), {})
    actual = error_of(lambda: call(functional, device, value), {})
    assert type(actual) is type(expected), (actual, expected)
    if expected is None:
        torch.testing.assert_close(call(functional, device, value), call(F, device, value))


NUMBERS = [pytest.param(call, FLOATS, id=name) for name, call in CALLS.items()]
NUMBERS += [pytest.param(call, INTS, id=name) for name, call in INT_CALLS.items()]


@pytest.mark.parametrize("call, values", NUMBERS)
def test_numbers(call, values, device):
    is_interpreted = fastnorm.explain().backend == "triton" and device == "cpu"
    for value in values[::3] if is_interpreted else values:
        assert error_of(lambda v=value: call(F, device, v), {}) is None, f"stock refuses {value!r}"
        like_stock(call, value, device)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_float(call):
    for value in NO_FLOATS:
        is_incomparable = isinstance(value, torch.Tensor) and (value.numel() > 1 or value.is_complex())
        if is_incomparable and call.startswith("batch_norm eps") and TORCH < (2, 11):
            with pytest.raises(RuntimeError):  # ours compares every eps with zero, as stock does since
                CALLS[call](functional, "cpu", value)
        else:
            like_stock(CALLS[call], value, "cpu")


@pytest.mark.parametrize("call", INT_CALLS)
def test_what_is_no_integer(call):
    for value in NO_INTS:
        like_stock(INT_CALLS[call], value, "cpu")


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_shapes(op, device):
    for shape in SHAPES:
        assert error_of(lambda s=shape: getattr(F, op)(X, s), {}) is None, f"stock refuses {shape!r}"
        like_stock(lambda m, d, s: rows(op)(m, d, normalized_shape=s), shape, device)
    for shape in NO_SHAPES:
        like_stock(lambda m, d, s: rows(op)(m, d, normalized_shape=s), shape, device)


def test_momentum_keeps_all_its_bits(device):
    """A float64 tensor is a number, as in stock; one of 32 bits stays where it is, and may have any dimensions."""
    x = PLANES.double().to(device)
    for momentum in (torch.tensor(0.1, dtype=torch.float64), torch.tensor([[0.1]], device=device)):
        ours, stock = (torch.zeros(8, dtype=torch.float64, device=device) for _ in range(2))
        functional.batch_norm(x, ours, torch.ones_like(ours), training=True, momentum=momentum)
        F.batch_norm(x, stock, torch.ones_like(stock), training=True, momentum=momentum.item())
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


EMPTY = [(0,), (0, 6), (4, 0), (4, 6, 0), (0, 0, 3)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_batch_norm_of_nothing(shape, training, device):
    """Torch looks at nothing but the numbers then; the statistics do not move."""
    for statistics in (None, 6, 0):
        for weight in (None, 6):
            def call(m, shape=shape, statistics=statistics, weight=weight):
                lengths = statistics, statistics, weight
                vectors = [None if n is None else torch.ones(n, device=device) for n in lengths]
                x = torch.randn(shape, device=device, requires_grad=True)
                y = m.batch_norm(x, *vectors, None, training)
                y.sum().backward()
                assert all(v is None or torch.equal(v, torch.ones_like(v)) for v in vectors)
                return y.shape, x.grad.shape

            stock, ours = (error_of(lambda m=m: call(m), {}) for m in (F, functional))
            assert type(ours) is type(stock)
            if stock is None:
                assert call(functional) == call(F) == (shape, shape)


class Reshaped(torch.nn.Module):
    """Takes its numbers from the shape of its input."""

    def forward(self, x):
        y = functional.group_norm(x, x.shape[1] // 4)
        return functional.layer_norm(y, x.shape[-1:]) + functional.rms_norm(y, (x.shape[-1],))


@pytest.mark.parametrize("strict", [True, False])
def test_symbolic_numbers(strict):
    """The number of groups becomes a constant of the graph, as stock's does; sizes do not."""
    x, dynamic = torch.randn(4, 8, 6), torch.export.Dim.DYNAMIC
    with fastnorm.use(None):
        program = torch.export.export(Reshaped(), (x,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},),
                                      strict=strict)  # fmt: skip
        for shape in ((4, 8, 6), (3, 8, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), Reshaped()(x))
