"""Tensors whose elements no kernel can read, or not even sizes: what stock PyTorch computes and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import fastnorm
from fastnorm import functional
from fastnorm.backend import CHANNEL_NORMS, ROW_NORMS
from helpers.environment import TORCH
from helpers.stock import error_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*quantize:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]parse.*beta:UserWarning"),
]


@pytest.fixture(autouse=True)
def automatic():
    with fastnorm.use(None):
        yield


def nested(x: torch.Tensor, layout=torch.strided) -> torch.Tensor:
    """Of samples that differ in length, the first by one element of their first dimension."""
    return torch.nested.nested_tensor([x[0][1:], *x[1:]], layout=layout)


def quantised(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


KINDS = {
    "nested": nested,
    "jagged": lambda x: nested(x, torch.jagged),
    "sparse": torch.Tensor.to_sparse,
    "sparse rows": lambda x: x.to_sparse(1),
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
    "quantised": quantised,
    "masked": lambda x: masked_tensor(x, x > 0),
    "TwoTensor": lambda x: TwoTensor(x, 2 * x),
    "negative view": torch._neg_view,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "uninitialised": lambda x: torch.nn.UninitializedParameter(),
    "uninitialised buffer": lambda x: torch.nn.UninitializedBuffer(),
}
REASONS = {"jagged": "NestedTensor", "sparse rows": "sparse_coo", "quantised": "quint8", "masked": "MaskedTensor",
           "negative view": "sign", "zero": "memory", "uninitialised": "UninitializedParameter",
           "uninitialised buffer": "UninitializedBuffer"}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
W = torch.tensor([0.7, -1.2, 0.4, 1.5, -0.3, 0.9])  # of both signs: the masks are of what is positive
B, MEAN, VARIANCE = torch.randn(6), torch.randn(6), torch.rand(6) + 1
STATISTICS = {"running_mean": MEAN, "running_var": VARIANCE}
CALLS = {
    "layer_norm": ((5, 3, 6), dict(normalized_shape=(6,), weight=W, bias=B)),
    "rms_norm": ((5, 3, 6), dict(normalized_shape=(6,), weight=W)),
    "add_layer_norm": ((5, 3, 6), dict(normalized_shape=(6,), weight=W, bias=B)),
    "add_rms_norm": ((5, 3, 6), dict(normalized_shape=(6,), weight=W)),
    "group_norm": ((5, 6, 3, 2), dict(num_groups=2, weight=W, bias=B)),
    "batch_norm": ((5, 6, 3, 2), dict(running_mean=None, running_var=None, weight=W, bias=B, training=True)),
    "batch_norm_evaluation": ((5, 6, 3, 2), dict(weight=W, bias=B, **STATISTICS)),
}
calls = pytest.mark.parametrize("op", CALLS)


def call(module, op: str, x: torch.Tensor, **changes):
    """By fastnorm.functional, or by torch.nn.functional with an addition in front; y, or y and h."""
    arguments = CALLS[op][1] | changes
    name = op.removesuffix("_evaluation")
    if not op.startswith("add_"):
        return getattr(module, name)(x, **arguments)
    if module is functional:
        return getattr(module, name)(x, x, **arguments)
    h = x + x
    return getattr(module, name.removeprefix("add_"))(h, **arguments), h


def outcome(module, op: str, x: torch.Tensor, **changes):
    """Type, layout and plain tensors of each result, plain tensors of the gradient, the type of what was raised."""
    found = []
    try:
        leaf = x.detach().requires_grad_() if x.is_floating_point() else x
        results = call(module, op, leaf, **changes)
        results = results if isinstance(results, tuple) else (results,)
        for result in results:
            found += [(type(result), result.layout), plain(result)]
        if leaf.requires_grad:
            total = sum(sum(part.sin().sum() for part in parts(r)) for r in results)
            found.append(plain(torch.autograd.grad(total, leaf)[0]))
    except Exception as error:  # noqa: BLE001, whatever it is, it is compared
        found.append(type(error))
    return found


def parts(t: torch.Tensor):
    return t.unbind() if t.is_nested else (t.to_dense() if t.layout is not torch.strided else t,)


def plain(t: torch.Tensor):
    return [part.detach() for part in parts(t)]


@calls
@kinds
def test_what_stock_does(op, kind):
    """Bit by bit, because its own operations do it; under a backend's name there is nothing but a refusal."""
    shape, _ = CALLS[op]
    x = KINDS[kind](torch.randn(shape[:2] if kind == "sparse_csr" and op in ROW_NORMS else shape))
    changes = {}
    if kind == "sparse_csr" and op in ROW_NORMS:
        changes = {"normalized_shape": (3,)} | {n: W[:3] for n in ("weight", "bias") if n in CALLS[op][1]}
    expected = outcome(F, op, x, **changes)
    for name in (None, "reference"):
        with fastnorm.use(name):
            actual = outcome(functional, op, x, **changes)
            assert len(actual) == len(expected)
            for ours, stocks in zip(actual, expected, strict=True):
                if not isinstance(stocks, list):
                    assert ours == stocks
                else:
                    torch.testing.assert_close(ours, stocks, rtol=0, atol=0)
    for name in ("native", "triton"):
        if fastnorm.backend.statuses()[name].available and kind != "quantised":  # of a dtype, its error tells more
            with fastnorm.use(name), pytest.raises(RuntimeError, match="can't serve this call"):
                call(functional, op, x, **changes)


@calls
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("uninit") and kind != "sparse_csr"])
def test_what_stock_does_with_such_a_weight(op, kind):
    if (kind, op) == ("zero", "group_norm") and TORCH < (2, 12):
        pytest.skip("stock's own forward reads memory that isn't there")
    x, weight = torch.randn(CALLS[op][0]), KINDS[kind](torch.randn(6, 1) if kind in ("nested", "jagged") else W)
    ours, stocks = (error_of(call, dict(module=m, op=op, x=x, weight=weight)) for m in (functional, F))
    assert isinstance(ours, type(stocks)), "stock's type, or what is caught as such"
    if stocks is None:
        torch.testing.assert_close(call(functional, op, x, weight=weight), call(F, op, x, weight=weight))


@pytest.mark.parametrize("op", (*ROW_NORMS, *CHANNEL_NORMS))
@kinds
def test_explain_says_so(op, kind):
    x = torch.randn((2, 6) if kind == "sparse_csr" else (5, 3, 6))
    x = KINDS[kind](x)
    explanation = fastnorm.explain(x, op)
    assert explanation.backend == "reference" and REASONS.get(kind, kind) in explanation.reason


def test_modules_take_nested_tensors():
    """Forward and backward, and in the middle of a model."""
    samples = [torch.randn(2, 6), torch.randn(4, 6)]
    for ours, stock in ((fastnorm.LayerNorm(6), torch.nn.LayerNorm(6)), (fastnorm.AddLayerNorm(6), None)):
        x = torch.nested.nested_tensor(samples, requires_grad=True)
        y = ours(x) if stock is not None else ours(x, x)[0]
        rows = torch.cat(samples).requires_grad_()
        expected = F.layer_norm(rows if stock is not None else rows + rows, (6,))
        torch.testing.assert_close(torch.cat(y.unbind()), expected)
        torch.cat(y.unbind()).sin().sum().backward()
        expected.sin().sum().backward()
        torch.testing.assert_close(torch.cat(x.grad.unbind()), rows.grad)
        assert ours.weight.grad is not None


class Watch(torch.overrides.TorchFunctionMode):
    """Keeps the names of what is called under it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@calls
def test_a_mode_sees_stocks_function(op):
    """As it does in stock; it is asked neither for sizes nor for devices before."""
    x, watch = torch.randn(CALLS[op][0]), Watch()
    expected = call(F, op, x)
    with watch:
        actual = call(functional, op, x)
    torch.testing.assert_close(actual, expected)
    stock = getattr(F, op.removeprefix("add_").removesuffix("_evaluation"))
    assert stock in watch.seen and not {torch.Tensor.numel, torch.Tensor.dim, torch.Tensor.size} & set(
        watch.seen[: watch.seen.index(stock)]
    )
    assert "Watch" in explained_under(watch, op, x)


def explained_under(mode, op, x):
    with mode:
        return str(fastnorm.explain(x, op))


@calls
def test_a_default_device_is_no_onlooker(op, device):
    """torch.set_default_device is a mode too; kernels stay at work."""
    x = torch.randn(CALLS[op][0])
    alone = fastnorm.explain(x, op)
    assert explained_under(torch.device("cpu"), op, x) == str(alone)
