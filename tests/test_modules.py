"""The four modules in the place of torch.nn's: everything that a model does with a norm beside calling it."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnorm
from helpers.environment import TORCH
from helpers.norms import DTYPES
from helpers.stock import STOCK, modules, pair, y_of

plain_modules = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

COMMON = [((8,), {}), (([2, 4], 1e-3), {}), ((torch.Size([2, 4]),), {}), ((8, 1e-3, False), {}), ((4, 1e-3, True), {}),
          ((8,), {"elementwise_affine": False}), ((8,), {"device": "meta", "dtype": torch.bfloat16}),
          ((8,), {"dtype": torch.float64}), ((), {"normalized_shape": 8, "eps": 0.5})]  # fmt: skip
LAYER = [((8, 1e-5, True, False), {}), ((8, 1e-5, True, True, "cpu", torch.float16), {}), ((8,), {"bias": False}),
         ((8, 1e-5, False, False), {})]  # fmt: skip
RMS = [((8, None), {}), ((8,), {"eps": None}), ((8, 1e-6, True, "cpu", torch.float16), {})]
CONSTRUCTIONS = [(name, *c) for name in STOCK for c in COMMON + (LAYER if "Layer" in name else RMS)]


def assert_same(ours: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    """Equal in value, dtype and every gradient."""
    results = []
    for module in (ours, stock):
        leaf = x.clone().requires_grad_()
        y = y_of(module, leaf)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
    tolerance = {"rtol": 0.02, "atol": 0.02} if x.dtype.itemsize == 2 else {}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("name", fastnorm.__all__)
def test_signatures_hide_nothing(name):
    public = getattr(fastnorm, name)
    for function in vars(public).values() if inspect.ismodule(public) else [public]:
        if callable(function):
            kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
            assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, function


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_signatures_that_add_are_the_norms(name):
    parameters = dict(inspect.signature(getattr(fastnorm, f"Add{name}")).parameters)
    residual_dtype = parameters.pop("residual_dtype")
    assert (residual_dtype.kind, residual_dtype.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(parameters.values()) == list(inspect.signature(getattr(fastnorm, name)).parameters.values())


@pytest.mark.parametrize("name, args, kwargs", CONSTRUCTIONS, ids=str)
def test_construction(name, args, kwargs):
    ours, stock = getattr(fastnorm, name)(*args, **kwargs), STOCK[name](*args, **kwargs)
    assert isinstance(ours, type(stock))
    for attribute in ("normalized_shape", "eps", "elementwise_affine", "training"):
        assert getattr(ours, attribute) == getattr(stock, attribute)
    assert repr(ours) == repr(stock).replace(type(stock).__name__, name)
    state, expected = ours.state_dict(), stock.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].device == value.device and state[key].dtype == value.dtype
        assert value.is_meta or torch.equal(state[key], value)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in stock.named_parameters()]
    assert list(ours._parameters) == list(stock._parameters)
    x = torch.randn(3, *stock.normalized_shape, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
    x = x.to(torch.float16) if torch.float16 in args else x
    y, reference = y_of(ours, x), stock(x)
    assert y.shape == reference.shape and y.dtype == reference.dtype and y.device == reference.device
    if not y.is_meta:
        torch.testing.assert_close(y, reference)


@modules
def test_signatures_are_stocks_extended_by_keywords(name):
    if name.startswith("Add"):
        with pytest.raises(TypeError):
            getattr(fastnorm, name)(8, 1e-5, True, True, "cpu", None, torch.float32)
        return
    function = name.replace("Norm", "_norm").lower()
    pairs = [(getattr(fastnorm, name), STOCK[name]), (getattr(fastnorm.functional, function), getattr(F, function))]
    for ours, stock in pairs:
        ours, stock = (list(inspect.signature(f).parameters.values()) for f in (ours, stock))
        described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (ours, stock)]
        assert described[0][: len(stock)] == described[1]
        assert {p.kind for p in ours[len(stock) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_options_are_shown_where_they_are_set():
    affine = "(8,), eps=None, elementwise_affine=True"
    everything = {"zero_centered": True, "out_dtype": torch.bfloat16, "rounding": "llama"}
    shown = "zero_centered=True, out_dtype=torch.bfloat16, rounding=llama"
    assert repr(fastnorm.RMSNorm(8, **everything)) == f"RMSNorm({affine}, {shown})"
    module = fastnorm.AddRMSNorm(8, **everything, residual_dtype=torch.float32)
    assert repr(module) == f"AddRMSNorm({affine}, {shown}, residual_dtype=torch.float32)"
    stock = nn.LayerNorm(8).extra_repr()
    assert fastnorm.LayerNorm(8, zero_centered=True).extra_repr() == f"{stock}, zero_centered=True"
    assert fastnorm.AddLayerNorm(8, residual_dtype=torch.half).extra_repr() == f"{stock}, residual_dtype=torch.float16"


@modules
def test_state_dicts_go_both_ways(name):
    ours, stock = pair(name, [2, 4])
    x = torch.randn(3, 2, 4)
    assert_same(ours, stock, x)
    nn.init.normal_(ours.weight)
    stock.load_state_dict(ours.state_dict())
    assert_same(ours, stock, x)
    assert list(fastnorm.RMSNorm(8, zero_centered=True, rounding="llama").state_dict()) == ["weight"]
    for wrong in ({}, {"weight": torch.ones(7)}, ours.state_dict() | {"extra": torch.ones(1)}):
        with pytest.raises(RuntimeError):
            stock.load_state_dict(wrong)
        with pytest.raises(RuntimeError):
            ours.load_state_dict(wrong)


@modules
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_apart(name, duplicate):
    options = {"zero_centered": True, "out_dtype": torch.float64}
    options |= {"rounding": "llama"} if "RMS" in name else {}
    options |= {"residual_dtype": torch.float32} if name.startswith("Add") else {}
    module = getattr(fastnorm, name)(8, **options).eval()
    nn.init.normal_(module.weight)
    other = duplicate(module)
    assert type(other) is type(module) and repr(other) == repr(module) and not other.training
    x = torch.randn(3, 8)
    expected = y_of(module, x)
    assert torch.equal(y_of(other, x), expected) and expected.dtype == torch.float64
    with torch.no_grad():
        other.weight.add_(1)
    assert torch.equal(y_of(module, x), expected) and not torch.equal(y_of(other, x), expected)


@modules
def test_dtype_and_device_moves(name):
    ours, stock = pair(name, 8)
    x = torch.randn(3, 8)
    for move in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        ours, stock = move(ours), move(stock)
        assert ours.weight.dtype == stock.weight.dtype
        assert_same(ours, stock, x.to(stock.weight.dtype))
    meta = ours.to("meta")
    assert y_of(meta, x.to("meta")).is_meta
    empty = meta.to_empty(device="cpu")
    empty.reset_parameters()
    assert_same(empty, STOCK[name](8), x)
    with torch.device("meta"):
        module = getattr(fastnorm, name)(8)
    assert module.weight.is_meta


@modules
def test_hooks(name):
    """Every kind of hook is called as often as stock's, in the same order; what a forward hook returns counts."""
    ours, stock = pair(name, 8)
    x = torch.randn(3, 8)
    calls = {}
    for module in (ours, stock):
        seen = calls[module] = []
        module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append("pre") or (a[0] * 2,))
        module.register_forward_hook(lambda m, a, y, seen=seen: seen.append("post") or scaled(y))
        module.register_full_backward_pre_hook(lambda m, g, seen=seen: seen.append("backward pre"))
        module.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(("backward", gi[0].sum().item())))
        module.weight.register_hook(lambda g, seen=seen: seen.append("weight"))
    assert_same(ours, stock, x)
    names = [[call if isinstance(call, str) else call[0] for call in calls[m]] for m in (ours, stock)]
    assert sorted(names[0]) == sorted(names[1]) and names[0][:3] == ["pre", "post", "backward pre"]
    values = [next(call[1] for call in calls[m] if not isinstance(call, str)) for m in (ours, stock)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def scaled(result):
    return (result[0] * 3, *result[1:]) if isinstance(result, tuple) else result * 3


@modules
def test_training_mode_and_frozen_parameters(name):
    module = getattr(fastnorm, name)(8)
    x = torch.randn(3, 8)
    expected = y_of(module.train(), x)
    assert torch.equal(y_of(module.eval(), x), expected) and not module.training
    assert expected.requires_grad
    assert not y_of(module.requires_grad_(False), x).requires_grad
    leaf = x.clone().requires_grad_()
    y_of(module, leaf).square().sum().backward()
    assert leaf.grad is not None and module.weight.grad is None


@modules
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_autograd(name, guard, device):
    ours, stock = (m.to(device) for m in pair(name, 40))
    x = torch.randn(3, 40, device=device, requires_grad=True)
    with guard():
        y, expected = y_of(ours, x), stock(x)
    assert not y.requires_grad and y.is_inference() == expected.is_inference()
    torch.testing.assert_close(y, expected)
    assert_same(ours, stock, x.detach())


@modules
def test_zero_centered_weights_start_as_identity(name, device):
    ours = getattr(fastnorm, name)(40, zero_centered=True).to(device)
    assert not ours.weight.any() and (getattr(ours, "bias", None) is None or not ours.bias.any())
    assert_same_values(ours, STOCK[name](40).to(device), torch.randn(3, 40, device=device))
    nn.init.normal_(ours.weight)
    stock = STOCK[name](40).to(device)
    with torch.no_grad():
        stock.weight.copy_(1 + ours.weight)
    assert_same_values(ours, stock, torch.randn(3, 40, device=device))
    ours.reset_parameters()
    assert not ours.weight.any()
    bare = getattr(fastnorm, name)(40, zero_centered=True, elementwise_affine=False)
    x = torch.randn(3, 40, device=device)
    assert_same_values(bare, STOCK[name](40, elementwise_affine=False), x)


def assert_same_values(ours, stock, x):
    torch.testing.assert_close(y_of(ours, x), stock(x))


AUTOCAST = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, None), (torch.bfloat16, torch.float32)]


@plain_modules
@pytest.mark.parametrize("x_dtype, weight_dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, x_dtype, weight_dtype, autocast_dtype, device):
    ours, stock = autocast_pair(name, weight_dtype, device)
    x = torch.randn(3, 40, device=device).to(x_dtype)
    with torch.autocast(device, autocast_dtype):
        y, expected = ours(x), stock(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    adding, _ = autocast_pair(f"Add{name}", weight_dtype, device)
    with torch.autocast(device, autocast_dtype):
        y, h = adding(x, x)
    assert y.dtype == expected.dtype and h.dtype == x_dtype


def autocast_pair(name, weight_dtype, device):
    options = {"dtype": weight_dtype, "elementwise_affine": weight_dtype is not None, "device": device}
    return getattr(fastnorm, name)(40, **options), STOCK[name](40, **options)


@plain_modules
@pytest.mark.parametrize("x_dtype, weight_dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_on_a_gpu(name, x_dtype, weight_dtype, enabled):
    """Result dtypes alone, which the dispatcher tells without a GPU: stock runs the norms in float32 there."""
    if not enabled and weight_dtype not in (None, x_dtype):
        pytest.skip("stock takes no mixed dtypes there")
    before = torch.is_autocast_enabled("cuda")
    has_graph = TORCH >= (2, 11) or torch.cuda.is_available()  # before, a CUDA leaf's without a driver ends the process
    with FakeTensorMode(), torch.set_grad_enabled(has_graph):
        ours, stock = autocast_pair(name, weight_dtype, "cuda")
        x = torch.randn(3, 40, device="cuda", dtype=torch.float32).to(x_dtype)
        torch.set_autocast_enabled("cuda", enabled)
        try:
            y, expected = ours(x), stock(x)
            stream, h = getattr(fastnorm, f"Add{name}")(40, elementwise_affine=False, device="cuda")(x, x)
            asked = getattr(fastnorm, name)(40, out_dtype=torch.float16, device="cuda")(x)
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert y.device.type == "cuda" and y.dtype == expected.dtype
    if name == "LayerNorm":  # of rms_norm autocast has not always known
        assert expected.dtype == (torch.float32 if enabled and x_dtype != torch.float64 else x_dtype)
    assert stream.dtype == expected.dtype and h.dtype == x_dtype
    assert asked.dtype == torch.float16, "what is asked for goes before autocast"


@dtypes
@pytest.mark.parametrize("name", ["RMSNorm", "AddRMSNorm"])
def test_the_default_eps_is_stocks(name, dtype, device):
    """Rows so small that eps is most of the denominator."""
    scale = 1e-9 if dtype == torch.float64 else 1e-4
    x = (torch.randn(4, 40, dtype=torch.float64) * scale).to(dtype).to(device)
    ours, stock = getattr(fastnorm, name)(40, dtype=dtype, device=device), nn.RMSNorm(40, dtype=dtype, device=device)
    expected = stock(x)
    torch.testing.assert_close(y_of(ours, x), expected)
    assert 0.01 < expected.double().square().mean().sqrt() < 0.9, "eps does not matter here"
    if name == "AddRMSNorm":
        torch.testing.assert_close(ours(x, torch.zeros_like(x))[0], expected)


def coarse_rows(dtype, device) -> torch.Tensor:
    """Powers of two: sums are exact in any order, and a row has few different results to round."""
    return (2.0 ** torch.randint(-2, 3, (16, 64)) * torch.randn(16, 64).sign()).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_llama_rounding_is_hugging_faces(dtype, weight_dtype, device):
    """Bitwise: x̂ is rounded to the input's dtype, and the product has the promoted dtype."""
    x, weight = coarse_rows(dtype, device), torch.randn(64).to(weight_dtype).to(device)
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = weight * x_hat.to(dtype)
    y = fastnorm.functional.rms_norm(x, (64,), weight, 1e-6, rounding="llama")
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    once = fastnorm.functional.rms_norm(x, (64,), weight, 1e-6, out_dtype=expected.dtype)
    assert not torch.equal(once, expected), "the two roundings agree on these inputs: nothing was tested"
    stream, h = fastnorm.functional.add_rms_norm(x, torch.zeros_like(x), (64,), weight, 1e-6, rounding="llama")
    assert torch.equal(h, x) and torch.equal(stream, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_centered_rounding_is_gemmas(dtype, device):
    """Bitwise: 1 + w is added in float32, and the product rounded once."""
    x, weight = coarse_rows(dtype, device), torch.randn(64).to(dtype).to(device)
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    y = fastnorm.functional.rms_norm(x, (64,), weight, 1e-6, zero_centered=True)
    assert torch.equal(y, (x_hat * (1.0 + weight.float())).to(dtype))
    assert not torch.equal(y, (x_hat * (1.0 + weight).float()).to(dtype))


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
@pytest.mark.parametrize("options", [{}, {"residual_dtype": torch.float64}], ids=str)
def test_a_stream_of_blocks(name, options, device):
    """Pre-norm blocks with a final norm, as a transformer has them, against the loop that everybody writes."""
    linears = nn.ModuleList(nn.Linear(40, 40) for _ in range(3)).to(device)
    norms = [pair(name, 40) for _ in range(4)]
    ours = nn.ModuleList(getattr(fastnorm, name)(40, **options) for _ in norms).to(device)
    stock = nn.ModuleList(s for _, s in norms).to(device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 5, 40, device=device)

    def fused(x):
        branch, stream = x, None
        for linear, norm in zip(linears, ours[:-1], strict=True):
            y, stream = norm(branch, stream)
            branch = linear(y.to(x.dtype))
        return ours[-1](branch, stream)

    def plain(x):
        stream = x.to(options.get("residual_dtype"))
        for linear, norm in zip(linears, stock[:-1], strict=True):
            stream = stream + linear(norm(stream.to(x.dtype)))
        return stock[-1](stream.to(x.dtype)), stream

    results = []
    for function, norms in ((fused, ours), (plain, stock)):
        leaf = x.clone().requires_grad_()
        y, stream = function(leaf)
        assert stream.dtype == options.get("residual_dtype", torch.float32) and y.dtype == torch.float32
        loss = y.pow(2).mean() + stream.pow(3).mean()
        results.append([y, stream, *torch.autograd.grad(loss, [leaf, *norms.parameters(), *linears.parameters()])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
