"""Mistakes in a call: the exception type that stock PyTorch has for them, and a message that names the argument."""

import re

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import functional
from fastnorm.backend import ROW_NORMS
from helpers.environment import TORCH
from helpers.norms import plain_case
from helpers.stock import error_of

NAN = float("nan")
FLOAT8 = torch.float8_e4m3fn
operations = pytest.mark.parametrize("op", ROW_NORMS)


def arguments(op: str, **changes) -> dict:
    """A right call's arguments, by name, with some of them replaced."""
    case = plain_case(op, (4, 8), torch.float32)
    first = "x" if case.adds or case.gated else "input"
    right = {first: torch.randn(4, 8), "normalized_shape": (8,), "weight": torch.randn(8)}
    right |= {"residual": torch.randn(4, 8)} if case.adds else {}
    right |= {"gate": torch.randn(4, 8)} if case.gated else {}
    right |= {"bias": torch.randn(8)} if case.centers else {}
    if "input" in changes:
        changes[first] = changes.pop("input")
    return right | changes


def stock_name(op: str) -> str:
    return op.removeprefix("add_").removeprefix("gated_")


def stock_error(op: str, given: dict) -> Exception | None:
    """What stock PyTorch raises for these arguments, without the addition in front of it or the product behind it."""
    given = dict(given)
    if "x" in given:
        given["input"] = given.pop("x")
    for name in ("residual", "gate"):
        given.pop(name, None)
    return error_of(getattr(F, stock_name(op)), given)


def check_mistake(op: str, name: str, given: dict, expected: type[Exception]) -> None:
    """Raises `expected` itself, with a message that names the operation and the argument, and writes nothing."""
    before = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    error = error_of(getattr(functional, op), given)
    assert type(error) is expected, f"{error!r}, but stock has {expected.__name__}"
    name = "x" if name == "input" and "x" in given else name
    assert str(error).startswith(f"{op}(): ") and re.search(rf"\b{name}\b", str(error))
    for key, value in before.items():
        assert value.is_meta or torch.equal(as_bytes(given[key]), as_bytes(value)), f"{key} was written to"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def like_stock(op: str, name: str, given: dict) -> None:
    expected = stock_error(op, given)
    assert expected is not None, "stock takes it: what is to be compared?"
    check_mistake(op, name, given, type(expected))


def too_few_dimensions(name: str) -> type[Exception]:
    """Stock's rms_norm has ValueError for an input of too few dimensions since 2.11 at the latest; ours has always."""
    return ValueError if name.lower().endswith(("rms_norm", "rmsnorm")) else RuntimeError


def nobody_raises(op: str, given: dict) -> None:
    assert stock_error(op, given) is None and error_of(getattr(functional, op), given) is None


@operations
@pytest.mark.parametrize("shape", [(7,), (4,), (3, 8), (-1,), (1,)], ids=str)
def test_input_of_another_shape(op, shape):
    like_stock(op, "normalized_shape", arguments(op, normalized_shape=shape))
    like_stock(op, "input", arguments(op, normalized_shape=shape))


@operations
def test_more_dimensions_than_the_input_has(op):
    parameters = {name: torch.ones(2, 4, 8) for name in arguments(op) if name in ("weight", "bias")}
    for given in (arguments(op, normalized_shape=(2, 4, 8), **parameters), arguments(op, input=torch.tensor(1.0))):
        check_mistake(op, "normalized_shape", given, too_few_dimensions(op))
        assert type(stock_error(op, given)) is (RuntimeError if TORCH < (2, 11) else too_few_dimensions(op))


@operations
@pytest.mark.parametrize("shape", [(), [], 8, None, 8.0, "8", (7.5,), ("8",)], ids=repr)
def test_what_is_no_shape(op, shape):
    like_stock(op, "normalized_shape", arguments(op, normalized_shape=shape))


@operations
@pytest.mark.parametrize("shape", [[8], (8,), torch.Size([8])], ids=repr)
def test_what_is_a_shape(op, shape):
    nobody_raises(op, arguments(op, normalized_shape=shape))


@operations
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(7,), (1, 8), (), (8, 1), (4, 8)], ids=str)
def test_parameter_of_another_shape(op, name, shape):
    given = arguments(op, **{name: torch.ones(shape)})
    if name == "bias" and op.endswith("rms_norm"):
        return check_bias_of_rms_norm(op, given)
    like_stock(op, name, given)


def check_bias_of_rms_norm(op: str, given: dict) -> None:
    """Stock's has none, and of ours the gated one alone."""
    assert type(stock_error(op, given)) is TypeError
    if op.startswith("gated_"):
        check_mistake(op, "bias", given, RuntimeError)
    else:
        assert type(error_of(getattr(functional, op), given)) is TypeError


@operations
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameter_on_another_device(op, name):
    given = arguments(op, **{name: torch.ones(8, device="meta")})
    if name == "bias" and op.endswith("rms_norm"):
        return check_bias_of_rms_norm(op, given)
    like_stock(op, name, given)


@operations
def test_input_on_another_device(op):
    given = arguments(op, input=torch.ones(4, 8, device="meta"))
    check_mistake(op, "weight", given, type(stock_error(op, given)))


@operations
@pytest.mark.parametrize("wrong", [[1.0] * 8, 1.0, "ones", torch.float32, [[1.0] * 8] * 4], ids=repr)
def test_what_is_no_tensor(op, wrong):
    names = {"input", *arguments(op)} & {"input", "weight", "bias"}
    for name in sorted(names):
        like_stock(op, name, arguments(op, **{name: wrong}))
    like_stock(op, "input", arguments(op, input=None))
    if op.startswith("add_"):
        check_mistake(op, "residual", arguments(op, residual=wrong), TypeError)


@operations
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, FLOAT8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_input_that_is_not_floating(op, dtype, affine):
    """Beside a float weight stock's CPU kernel has RuntimeError; whoever catches that one catches this one."""
    given = arguments(op, input=torch.ones(4, 8).to(dtype))
    if not affine:
        given = {key: value for key, value in given.items() if key not in ("weight", "bias")}
        assert type(stock_error(op, given)) is NotImplementedError
    assert issubclass(NotImplementedError, type(stock_error(op, given)))
    check_mistake(op, "input", given, NotImplementedError)


@operations
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, FLOAT8], ids=str)
def test_parameters_that_are_not_floating(op, dtype):
    """Stock's rms_norm multiplies by integers and booleans; they are nobody's weight, and no kernel reads them."""
    wrong = torch.ones(8).to(dtype)
    expected = type(stock_error("layer_norm", arguments("layer_norm", weight=wrong)))
    assert expected is RuntimeError
    check_mistake(op, "weight", arguments(op, weight=wrong), expected)
    if op.endswith("layer_norm"):
        like_stock(op, "bias", arguments(op, bias=wrong))


ADDS = pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])


@ADDS
@pytest.mark.parametrize("shape", [(4, 7), (3, 8), (2, 4, 8), (8,), (1, 8), (4, 1), ()], ids=str)
def test_residual_of_another_shape(op, shape):
    """A residual that would broadcast is a mistake too: h could not be handed on as the next residual."""
    x, residual = torch.randn(4, 8), torch.randn(shape)
    stock = error_of(torch.add, {"input": x, "other": residual})
    assert stock is None or type(stock) is RuntimeError
    check_mistake(op, "residual", arguments(op, residual=residual), RuntimeError)


@ADDS
def test_residual_on_another_device(op):
    residual = torch.randn(4, 8, device="meta")
    stock = error_of(torch.add, {"input": torch.randn(4, 8), "other": residual})
    check_mistake(op, "residual", arguments(op, residual=residual), type(stock))


@ADDS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, FLOAT8], ids=str)
def test_residual_that_is_not_floating(op, dtype):
    stock = error_of(torch.add, {"input": torch.randn(4, 8), "other": torch.ones(4, 8).to(FLOAT8)})
    check_mistake(op, "residual", arguments(op, residual=torch.ones(4, 8).to(dtype)), type(stock))


@operations
@pytest.mark.parametrize("eps", ["1e-5", [1e-5], 1j, torch.float32, (1e-5, 1e-5)], ids=repr)
def test_eps_that_is_no_number(op, eps):
    like_stock(op, "eps", arguments(op, eps=eps))


@operations
def test_eps_of_none(op):
    given = arguments(op, eps=None)
    if op.endswith("rms_norm"):
        nobody_raises(op, given)
    else:
        like_stock(op, "eps", given)


@operations
@pytest.mark.parametrize(
    "eps", [0, 0.0, 1, True, float("inf"), torch.tensor(0.5), -0.5, -1e-12, -1, NAN, float("-inf")], ids=repr
)
def test_eps_that_stock_takes(op, eps, device):
    if device != "cpu":
        eps = eps.to(device) if isinstance(eps, torch.Tensor) else eps
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments(op, eps=eps).items()}
    actual = getattr(functional, op)(**given)
    factor = F.silu(given.pop("gate")) if op.startswith("gated_") else 1.0
    if op.startswith("add_"):
        actual, given["input"] = actual[0], given.pop("x") + given.pop("residual")
    elif op.startswith("gated_"):
        given["input"] = given.pop("x")
    torch.testing.assert_close(actual, getattr(F, stock_name(op))(**given) * factor, equal_nan=True)


@operations
def test_eps_beyond_every_float(op):
    given = arguments(op, eps=10**400)
    error = error_of(getattr(functional, op), given)
    assert type(error) is type(stock_error(op, given)) is OverflowError


@operations
@pytest.mark.parametrize("dtype, expected", [
    (torch.int64, NotImplementedError), (torch.bool, NotImplementedError), (torch.complex64, NotImplementedError),
    (FLOAT8, NotImplementedError), ("float32", TypeError), (32, TypeError),
], ids=str)  # fmt: skip
def test_result_dtypes(op, dtype, expected):
    """softmax is the stock normalisation with a dtype argument: it has the same two exceptions."""
    stock = error_of(torch.softmax, {"input": torch.randn(4, 8), "dim": -1, "dtype": dtype})
    assert type(stock) is expected
    names = ["out_dtype", "residual_dtype"] if op.startswith("add_") else ["out_dtype"]
    for name in names:
        check_mistake(op, name, arguments(op, **{name: dtype}), expected)
        module = getattr(fastnorm, op.title().replace("_", "").replace("Rms", "RMS"))
        with pytest.raises(expected, match=name):
            module(8, **{name: dtype})


@pytest.mark.parametrize("rounding", ["hf", "", None, 1, ["torch"]], ids=repr)
def test_unknown_rounding(rounding):
    """As torch.nn.functional has it for an unknown word, such as gelu's or a loss's."""
    for op in ("rms_norm", "add_rms_norm", "gated_rms_norm"):
        check_mistake(op, "rounding", arguments(op, rounding=rounding), ValueError)
    for module in (fastnorm.RMSNorm, fastnorm.AddRMSNorm, fastnorm.GatedRMSNorm):
        with pytest.raises(ValueError, match="rounding"):
            module(8, rounding=rounding)
    with pytest.raises(ValueError):
        F.mse_loss(torch.ones(1), torch.ones(1), reduction="hf")


@operations
@pytest.mark.parametrize("wrong", ["no", "", 1, 0.0, None, torch.tensor(True)], ids=repr)
def test_options_that_are_no_truth(op, wrong):
    """Kernels and formulas would see another truth in them."""
    check_mistake(op, "zero_centered", arguments(op, zero_centered=wrong), TypeError)
    module = getattr(fastnorm, op.title().replace("_", "").replace("Rms", "RMS"))
    with pytest.raises(TypeError, match=rf"^{module.__name__}\(\): argument 'zero_centered' must be bool"):
        module(8, zero_centered=wrong)


@operations
def test_numpys_truths(op):
    numpy = pytest.importorskip("numpy")
    given = arguments(op)
    found, expected = (getattr(functional, op)(**given, zero_centered=yes) for yes in (numpy.bool_(True), True))
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


class Renamed(fastnorm.GatedRMSNorm):
    """Somebody's own."""


def test_constructors_name_their_class():
    """Not the one that they are derived from."""
    for module in (fastnorm.AddRMSNorm, fastnorm.AddLayerNorm, fastnorm.GatedRMSNorm, fastnorm.GatedLayerNorm, Renamed):
        for options in ({"out_dtype": torch.int32}, {"zero_centered": None}):
            assert str(error_of(lambda m=module, o=options: m(8, **o), {})).startswith(f"{module.__name__}(): ")


@operations
def test_unknown_and_missing_arguments(op):
    """What Python itself checks is as in stock: unknown names, and options that are given by position."""
    function = getattr(functional, op)
    assert type(error_of(function, arguments(op, epsilon=1e-5))) is TypeError
    assert type(stock_error(op, arguments(op, epsilon=1e-5))) is TypeError
    given = arguments(op, eps=1e-5)
    given |= {"bias": None} if op == "gated_rms_norm" else {}
    order = ["x", "residual", "gate", "input", "normalized_shape", "weight", "bias", "eps"]
    with pytest.raises(TypeError, match="positional"):
        function(*(given[name] for name in order if name in given), False)
    with pytest.raises(TypeError, match="normalized_shape"):
        function(*[torch.randn(4, 8)] * (1 if op in ("layer_norm", "rms_norm") else 2))


MODULE_INPUTS = [torch.randn(4, 7), torch.randn(3), torch.tensor(1.0), torch.randn(8, device="meta"), None, [1.0]]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("x", MODULE_INPUTS, ids=lambda x: str(getattr(x, "shape", x)))
def test_modules_raise_as_stock_modules_do(name, x):
    error, expected = (error_of(lambda m=m: getattr(m, name)(8)(x), {}) for m in (fastnorm, torch.nn))
    if TORCH < (2, 11) and getattr(x, "shape", None) == ():
        assert type(expected) is RuntimeError and type(error) is too_few_dimensions(name)
    else:
        assert expected is not None and type(error) is type(expected)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("options", [
    {"normalized_shape": 8.0}, {"normalized_shape": None}, {"normalized_shape": -1}, {"normalized_shape": "8"},
    {"normalized_shape": 8, "dtype": torch.int64}, {"normalized_shape": 8, "dtype": "float32"},
    {"normalized_shape": 8, "device": "nowhere"}, {},
], ids=str)  # fmt: skip
def test_constructors_raise_as_stock_constructors_do(name, options):
    error, expected = (error_of(getattr(m, name), options) for m in (fastnorm, torch.nn))
    assert expected is not None and type(error) is type(expected)


@operations
def test_mistakes_are_told_whatever_the_backend(op, device):
    """The same words from every backend, before anything runs."""
    with fastnorm.use("reference"):
        expected = error_of(getattr(functional, op), arguments(op, weight=torch.ones(7)))
    error = error_of(getattr(functional, op), arguments(op, weight=torch.ones(7)))
    assert type(error) is type(expected) and str(error) == str(expected)
