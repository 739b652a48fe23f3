"""Modulated row norms: scale, shift and gate of each sample or row, after a gated residual addition; AdaLayerNorm."""

import copy
import itertools
import pickle
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastnorm
from fastnorm import backend
from fastnorm.functional import modulated_layer_norm, modulated_rms_norm
from helpers.environment import SIMULATED
from helpers.graphs import NAMESPACES, Graphs, ours
from helpers.stock import error_of

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = ("modulated_layer_norm", "modulated_rms_norm")
operations = pytest.mark.parametrize("op", OPS)
EPS = 1e-5
NAMES = ("x", "scale", "shift", "residual", "gate")
Tensors = dict[str, Tensor]


def by_turns(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises over the names, each with one operation: the other one shares all but the mean."""
    return pytest.mark.parametrize("op, name", list(zip(itertools.cycle(OPS), names)))


def shape_of(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """h: (H,), b: (B, H), b1: (B, 1, H), 11: (1, 1, H), bs: x's."""
    ones = (1,) * (len(shape) - 2)
    return {"h": shape[-1:], "b": (shape[0], shape[-1]), "b1": (*shape[:1], *ones, shape[-1]),
            "11": (1, *ones, shape[-1]), "bs": shape}[kind]  # fmt: skip


def inputs(shape, device="cpu", dtype=F32, mean=0.0, std=1.0, **kinds) -> Tensors:
    """Random tensors; kinds: of scale, shift, gate and residual, the name of a shape, or a pair of it and a dtype."""
    tensors = {"x": (torch.randn(shape, dtype=F64) * std + mean).to(dtype)}
    for name, kind in kinds.items():
        kind, own = kind if isinstance(kind, tuple) else (kind, dtype)
        tensors[name] = torch.randn(shape_of(kind, shape), dtype=F64).to(own)
    return {name: t.to(device) for name, t in tensors.items()}


def call(op: str, tensors: Tensors, **options) -> tuple[Tensor, Tensor]:
    return getattr(fastnorm.functional, op)(**tensors, eps=EPS, **options)


def formula(op: str, h: Tensor, tensors: Tensors) -> Tensor:
    """y from h in stock PyTorch."""
    scale, shift = (aligned(tensors.get(name), h) for name in ("scale", "shift"))
    y = F.layer_norm(h, h.shape[-1:], eps=EPS) if op == OPS[0] else F.rms_norm(h, h.shape[-1:], eps=EPS)
    y = y if scale is None else y * (1 + scale)
    return y if shift is None else y + shift


def aligned(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    if parameter is not None and parameter.dim() == 2 < x.dim():
        return parameter.view(len(parameter), *[1] * (x.dim() - 2), -1)
    return parameter


def stream(tensors: Tensors) -> Tensor:
    """h in stock PyTorch."""
    x, gate = tensors["x"], aligned(tensors.get("gate"), tensors["x"])
    h = x if gate is None else gate * x
    return h + tensors["residual"] if "residual" in tensors else h


def results(op: str, tensors: Tensors, dy: Tensor, dh: Tensor | None, **options) -> Tensors:
    """y, h and the gradients, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = call(op, leaves, **options)
    outputs, upstream = ((y,), (dy,)) if dh is None else ((y, h), (dy, dh))
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {"y": y.detach(), "h": h.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def by_formula(op: str, tensors: Tensors, h: Tensor, dy: Tensor, dh: Tensor | None, dtype=F64) -> Tensors:
    """The same by stock PyTorch in a dtype, where the norm's input is the h that was returned."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    total = stream(leaves)
    total = total + (h.to(dtype) - total).detach()
    y = formula(op, total, leaves)
    outputs, upstream = ((y,), (dy,)) if dh is None else ((y, total), (dy, dh))
    found = torch.autograd.grad(outputs, list(leaves.values()), [t.to(dtype) for t in upstream])
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def check(op: str, tensors: Tensors, **options) -> None:
    """h exactly; y and the gradients as near to float64's as stock's in float32, rounded once, and a unit more."""
    x = tensors["x"]
    y, h = call(op, tensors, **options)
    has_h = {"residual", "gate"} & tensors.keys()
    dy, dh = torch.randn(y.shape).to(y), torch.randn(h.shape).to(h) if has_h else None
    found = results(op, tensors, dy, dh, **options)
    promoted = torch.promote_types(x.dtype, tensors["residual"].dtype) if "residual" in tensors else x.dtype
    assert y.dtype == options.get("out_dtype", x.dtype) and h.dtype == options.get("residual_dtype", promoted)
    assert y.is_contiguous() and (h.is_contiguous() or not has_h)
    computed = F64 if F64 in (x.dtype, h.dtype, promoted) else F32
    exact = stream({name: t.double() for name, t in tensors.items()})
    terms = (exact - tensors["residual"].double()).abs() if "residual" in tensors else exact.abs()
    unit = torch.finfo(h.dtype).eps / 2 * exact.abs() * (1 + 1e-7) + torch.finfo(computed).eps * terms
    unit *= 2 if computed == F64 else 1  # what it is compared with is rounded, too
    assert ((h.double() - exact).abs() <= unit).all(), "h is rounded once"
    stock, oracle = (by_formula(op, tensors, h, dy, dh, dtype) for dtype in (computed, F64))
    rstd = 1 / (h.double().var(-1, correction=0) if op == OPS[0] else h.double().square().mean(-1)).add(EPS).sqrt()
    for name, right in oracle.items():
        actual = found[name]
        if name != "y":
            assert (actual.dtype, actual.shape) == (tensors[name[1:]].dtype, tensors[name[1:]].shape)
        allowed = 1.25 * (stock[name].to(actual.dtype).double() - right).abs().max()
        n_terms = max(1, x.numel() // right.numel()) ** 0.5
        unit = max(torch.finfo(actual.dtype).eps, n_terms * torch.finfo(computed).eps * (8 if computed == F64 else 1))
        scale = right.abs().max() + (rstd.max() * dy.double().abs().max() if x.shape[-1] < 3 else 1)
        if op == OPS[0] and x.numel() and computed == F64:
            scale = scale * (1 + h.double().mean(-1).abs().max() * rstd.max())
        if name in ("dx", "dresidual", "dgate") and backend._forced == "reference":
            unit = max(unit, 2 * torch.finfo(h.dtype).eps)  # autograd carries the gradient of h in its dtype
        error = (actual.double() - right).abs().max()
        assert error <= allowed + unit * scale, f"{name}: {error:.3g} of {allowed:.3g} and {unit * scale:.3g}"


KINDS = {
    "of a sample": dict(scale="b1", shift="b1", residual="bs", gate="b1"),
    "two dimensions": dict(scale="b", shift="b", residual="bs", gate="b"),
    "of each row": dict(scale="bs", shift="bs", residual="bs", gate="bs"),
    "of all rows": dict(scale="h", shift="h", residual="bs", gate="h"),
    "mixed": dict(scale="h", shift="b", residual="bs", gate="bs"),
    "mixed, coarse": dict(scale="11", shift="b1", residual="bs", gate="h"),
    "no gate": dict(scale="b1", shift="b1", residual="bs"),
    "no residual": dict(scale="b", shift="b1", gate="b1"),
    "the norm alone": dict(scale="b1", shift="b1"),
    "scale": dict(scale="b1"),
    "shift": dict(shift="bs"),
    "gate": dict(gate="b1"),
    "nothing": {},
    "gate of rows": dict(residual="bs", gate="bs"),
}


@by_turns(KINDS)
def test_shapes(op, name, device):
    check(op, inputs((3, 5, 72), device, **KINDS[name]))


ALL = KINDS["of a sample"]
FORMS = {
    "one row": dict(shape=(1, 1, 257)),
    "one row a sample": dict(shape=(4, 1, 40)),
    "one column": dict(shape=(2, 3, 1)),
    "odd columns": dict(shape=(2, 3, 33)),
    "several tiles": dict(shape=(2, 3, 1160)),
    "many rows": dict(shape=(2, 70, 24)),
    "many blocks of rows": dict(shape=(2, 60, 1160)),
    "two dimensions": dict(shape=(5, 40), scale="b", shift="b", gate="h", residual="bs"),
    "one positive size": dict(shape=(40,), scale="h", shift="h", gate="h", residual="h"),
    "four dimensions": dict(shape=(2, 3, 2, 24)),
    "bfloat16": dict(dtype=BF16),
    "float16": dict(dtype=F16),
    "float64": dict(dtype=F64),
    "float32 parameters": dict(dtype=BF16, scale=("b1", F32), shift=("b1", F32), gate=("b1", F32)),
    "float32 stream": dict(dtype=BF16, residual=("bs", F32), scale=("b1", F16)),
    "float64 stream": dict(dtype=F16, residual=("bs", F64), gate=("bs", F32)),
    "results": dict(dtype=BF16, out_dtype=F32, residual_dtype=F32),
    "narrow results": dict(out_dtype=BF16, residual_dtype=BF16),
    "h of another dtype": dict(dtype=BF16, residual_dtype=F32, residual=None),
}  # fmt: skip


@by_turns(FORMS)
def test_forms(op, name, device):
    form = ALL | FORMS[name]
    options = {key: form.pop(key) for key in ("out_dtype", "residual_dtype") if key in form}
    shape = form.pop("shape", (2, 3, 72))
    check(op, inputs(shape, device, **{key: kind for key, kind in form.items() if kind is not None}), **options)


def test_h_is_x_without_a_residual_and_a_gate(device):
    x = torch.randn(2, 3, 8, device=device)
    assert modulated_layer_norm(x, torch.ones(8, device=device))[1] is x
    assert modulated_layer_norm(x.to(BF16), residual_dtype=F32)[1].dtype == F32


@pytest.mark.parametrize("kind", ["b1", "bs"])
def test_chunks_are_read_in_place(kind, kernel_device, monkeypatch):
    """(B, 6H) of one projection: the operator gets its addresses and its rows' distance; and x may be a slice, too."""
    shape = (3, 4, 48)
    lead = shape[:1] if kind == "b1" else shape[:2]
    wide = torch.randn(*lead, 6 * 48, device=kernel_device)
    chunks = wide.unflatten(-1, (6, 48)).unbind(-2)
    wider = torch.randn(3, 4, 96, device=kernel_device)
    x, scale, shift, gate = wider[..., 48:], chunks[1], chunks[0], chunks[2]
    residual = torch.randn(3, 4, 2, 48, device=kernel_device).select(2, 0)
    check("modulated_layer_norm", dict(x=x, scale=scale, shift=shift, residual=residual, gate=gate))
    seen = []

    class Recorder:
        def row_norm_forward(self, *arguments):
            seen.extend(a for a in arguments if isinstance(a, Tensor))
            raise StopIteration

    monkeypatch.setattr(backend, "pick", lambda op, x: Recorder())
    monkeypatch.setattr(backend, "call_directly", lambda *arguments: NotImplemented)
    with pytest.raises(StopIteration):
        modulated_layer_norm(x, scale, shift, residual, gate)
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in (x, residual, gate, scale, shift)]
    assert all(t.stride() == (6 * 48, 1) for t in seen[2:])


@operations
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_a_mean_far_from_zero(op, dtype, device):
    check(op, inputs((2, 3, 300), device, dtype, mean=1e3 if dtype != BF16 else 30.0, scale="b", shift="b"))


@pytest.mark.parametrize("op, dtype, shape, kind", [
    (OPS[0], BF16, (2, 2, 16400), "b1"), (OPS[1], F32, (2, 1, 33000), "b1"), (OPS[0], F32, (1, 2, 11001), "bs"),
], ids=str)  # fmt: skip
def test_long_rows(op, dtype, shape, kind, kernel_device):
    check(op, inputs(shape, kernel_device, dtype, scale=kind, shift=kind, gate=kind, residual="bs"))


@operations
@pytest.mark.parametrize("dtype, name", [(BF16, "of a sample"), (F16, "of each row"), (F32, "of a sample"),
                                         (F32, "mixed"), (BF16, "no residual")], ids=str)  # fmt: skip
def test_rows_that_fill_the_registers(op, dtype, name, kernel_device):
    check(op, inputs((2, 3, 8184), kernel_device, dtype, **KINDS[name]))


def random_gradients(shape, dtype, device) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).to(device) for _ in range(2)]


@operations
@pytest.mark.parametrize("shape, kind", [((3, 19, 96), "b1"), ((3, 5, 1028), "b1"), ((4, 6, 40), "bs"),
                                         ((3, 300, 8), "b"), ((3, 7, 8184), "b1"), ((3, 2, 16400), "b1")],
                         ids=str)  # fmt: skip
def test_a_sample_does_not_depend_on_the_batch(op, shape, kind, kernel_device):
    """All of its results are bitwise the same alone and in any batch, its parameters' gradients too; and so are all
    results from run to run."""
    tensors = inputs(shape, kernel_device, BF16, scale=kind, shift=kind, gate=kind, residual="bs")
    dy, dh = random_gradients(shape, BF16, kernel_device)
    whole, again = (results(op, tensors, dy, dh) for _ in range(2))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for part in (slice(0, 1), slice(1, shape[0])):
        found = results(op, {name: t[part] for name, t in tensors.items()}, dy[part], dh[part])
        for name, value in found.items():
            assert torch.equal(value, whole[name][part]), name


@operations
@pytest.mark.parametrize("cols", [40, 1032, 8184])
def test_rows_do_not_depend_on_the_kind_of_parameter(op, cols, kernel_device):
    """y, h, dx and dresidual are bitwise those of parameters of each row, which other code computes."""
    shape = (2, 3, cols)
    tensors = inputs(shape, kernel_device, scale="b1", shift="b1", gate="b1", residual="bs")
    repeated = {name: t.expand(shape).contiguous() for name, t in tensors.items()}
    gradients = random_gradients(shape, F32, kernel_device)
    found, expected = (results(op, given, *gradients) for given in (tensors, repeated))
    for name in ("y", "h", "dx", "dresidual"):
        assert torch.equal(found[name], expected[name]), name
    for name in ("dscale", "dshift", "dgate"):
        torch.testing.assert_close(found[name], expected[name].sum(1, keepdim=True))


@operations
@pytest.mark.parametrize("kinds", [ALL, dict(scale="h", shift="b", gate="bs")], ids=str)
def test_gradcheck_and_gradgradcheck(op, kinds, device):
    leaves = {name: t.requires_grad_() for name, t in inputs((2, 2, 5), device, F64, **kinds).items()}

    def outputs(*tensors):
        return call(op, dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)
    assert SIMULATED or torch.autograd.gradgradcheck(outputs, tuple(leaves.values()), fast_mode=True)
    y, h = outputs(*leaves.values())
    once, twice = (
        torch.autograd.grad((y, h), list(leaves.values()), (y.detach(), h.detach()), retain_graph=True, create_graph=c)
        for c in (False, True)
    )
    for gradient, differentiable in zip(once, twice, strict=True):
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, differentiable)


@operations
def test_only_wanted_gradients(op, device):
    """Each alone, and through h alone; what is found is what is found beside all others."""
    shape = (2, 3, 24)
    tensors = inputs(shape, device, **ALL)
    dy, dh = random_gradients(shape, F32, device)
    everything = results(op, tensors, dy, dh)
    for wanted in tensors:
        leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        wanting = [(t, g) for t, g in zip(call(op, leaves), (dy, dh), strict=True) if t.requires_grad]
        torch.autograd.backward(*zip(*wanting, strict=True))
        assert [name for name, t in leaves.items() if t.grad is not None] == [wanted]
        torch.testing.assert_close(leaves[wanted].grad, everything[f"d{wanted}"], rtol=1e-5, atol=1e-6)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    found = torch.autograd.grad(call(op, leaves)[1], list(leaves.values()), dh, allow_unused=True)
    by_name = dict(zip(leaves, found, strict=True))
    torch.testing.assert_close(by_name["x"], tensors["gate"] * dh)
    torch.testing.assert_close(by_name["gate"], (tensors["x"] * dh).sum(1, keepdim=True))
    assert torch.equal(by_name["residual"], dh) and by_name["scale"] is None and by_name["shift"] is None


@operations
@pytest.mark.parametrize("kinds", [ALL, KINDS["no gate"]], ids=["gate", "no gate"])
def test_what_is_saved(op, kinds, kernel_device):
    """x, h, the parameters and the statistics; without a gate, x is not."""
    tensors = {name: t.requires_grad_() for name, t in inputs((2, 3, 24), kernel_device, BF16, **kinds).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, h = call(op, tensors)
    places = {name: t.data_ptr() for name, t in (tensors | {"h": h}).items()}
    names = {name for name, place in places.items() if place in {t.data_ptr() for t in saved}}
    assert names == {"h", "scale", "shift", *({"x", "gate"} if "gate" in kinds else ())}
    own = [t for t in saved if t.data_ptr() not in places.values()]
    assert [(t.shape, t.dtype) for t in own] == [((6,), F32)] * (1 + (op == OPS[0]))


@operations
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_no_rows(op, shape, device):
    tensors = inputs(shape, device, **ALL)
    found = results(op, tensors, torch.randn(shape, device=device), torch.randn(shape, device=device))
    assert found["y"].shape == found["h"].shape == shape
    assert all(found[f"d{name}"].shape == t.shape and not found[f"d{name}"].any() for name, t in tensors.items())


@pytest.mark.slow
@operations
@pytest.mark.parametrize("kind", ["b1", "bs"])
def test_torch_compile(op, kind, device, fresh_dynamo):
    """fullgraph, with the operators of the backend that is named, or with the formula."""
    tensors = inputs((2, 3, 24), device, scale=kind, shift=kind, gate=kind, residual="bs")
    dy, dh = random_gradients((2, 3, 24), F32, device)
    graphs = Graphs()

    def compiled(**leaves):
        return torch.compile(lambda: call(op, leaves), fullgraph=True, backend=graphs.compiler)()

    expected = results(op, tensors, dy, dh)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = compiled(**leaves)
    found = [y, h, *torch.autograd.grad((y, h), list(leaves.values()), (dy, dh))]
    for actual, right in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    namespace = NAMESPACES[backend._forced]
    names = {f"{namespace}.row_norm_{direction}" for direction in ("forward", "backward")} if namespace else set()
    assert {*ours(graphs.forward), *ours(graphs.backward)} == names


@operations
@pytest.mark.parametrize("kind", ["b1", "bs", "h"])
def test_operators_keep_to_their_schemas(op, kind, kernel_device):
    namespace = getattr(torch.ops, NAMESPACES[backend._forced])
    shape = (2, 3, 24)
    tensors = inputs(shape, kernel_device, BF16, scale=("b", F32), shift=("b", F32), residual="bs", gate="b")
    samples = {"b1": 2, "bs": 6, "h": 1}[kind]
    weight, bias, x_gate = (tensors[n][:1].expand(samples, 24).contiguous() for n in ("scale", "shift", "gate"))
    x, residual, dy, dh = tensors["x"], tensors["residual"], *random_gradients(shape, BF16, kernel_device)
    for stream_of in (residual, None):
        given = x, stream_of, None, x_gate, 1, 1, samples, weight, bias, EPS, op == OPS[0], True, True, True, None
        torch.library.opcheck(namespace.row_norm_forward.default, (*given, F32, BF16))
        _, h, mean, rstd = namespace.row_norm_forward(*given, F32, BF16)
        types = None, BF16, None if stream_of is None else BF16, F32, F32
        given = dy, dh, h, x, None, x_gate, 1, 1, samples, weight, bias, mean, rstd, True, True, True, *types
        torch.library.opcheck(namespace.row_norm_backward.default, given)
        _, dresidual, dgate, dx_gate, dweight, dbias = namespace.row_norm_backward(*given)
        assert dgate is None and (dresidual is None) == (stream_of is None)
        assert dx_gate.shape == dweight.shape == dbias.shape == (samples, 24)
        assert (dx_gate.dtype, dweight.dtype) == (BF16, F32)


@operations
def test_fake_tensors_have_the_form_of_real_results(op, kernel_device):
    tensors = inputs((2, 3, 24), kernel_device, BF16, **ALL | {"scale": ("h", F32)})
    gradients = random_gradients((2, 3, 24), BF16, kernel_device)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t) for name, t in tensors.items()}
    expected, actual = results(op, tensors, *gradients), results(op, fakes, *map(mode.from_tensor, gradients))
    for name, e in expected.items():
        a = actual[name]
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


MISTAKES = {
    "scale of another length": ({"scale": torch.ones(7)}, RuntimeError, "scale"),
    "scale of other samples": ({"scale": torch.ones(3, 8)}, RuntimeError, "scale"),
    "scale of other rows": ({"scale": torch.ones(2, 4, 8)}, RuntimeError, "scale"),
    "scale that skips a dimension": ({"scale": torch.ones(1, 3, 8)}, RuntimeError, "scale"),
    "scale of a number": ({"scale": 1.0}, TypeError, "scale"),
    "scale of no dimension": ({"scale": torch.tensor(1.0)}, RuntimeError, "scale"),
    "scale on another device": ({"scale": torch.ones(8, device="meta")}, RuntimeError, "scale"),
    "shift of integers": ({"shift": torch.ones(8, dtype=torch.int64)}, RuntimeError, "shift"),
    "gate of one column": ({"gate": torch.ones(2, 1, 1)}, RuntimeError, "gate"),
    "gate of four dimensions": ({"gate": torch.ones(1, 2, 3, 8)}, RuntimeError, "gate"),
    "sparse scale": ({"scale": torch.ones(2, 8).to_sparse()}, RuntimeError, "scale"),
    "nested scale": ({"scale": torch.nested.nested_tensor([torch.ones(3, 8)])}, RuntimeError, "scale"),
    "nested x": ({"x": torch.nested.nested_tensor([torch.ones(3, 8)])}, RuntimeError, "x"),
    "sparse shift": ({"shift": torch.ones(8).to_sparse()}, RuntimeError, "shift"),
    "mkldnn gate": ({"gate": torch.ones(2, 3, 8).to_mkldnn()}, RuntimeError, "gate"),
    "residual that broadcasts": ({"residual": torch.ones(2, 1, 8)}, RuntimeError, "residual"),
    "residual of a list": ({"residual": [1.0]}, TypeError, "residual"),
    "eps of a word": ({"eps": "1e-5"}, TypeError, "eps"),
    "x of integers": ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, NotImplementedError, "x must be"),
    "x of a list": ({"x": [1.0]}, TypeError, "'x'"),
    "x without dimensions": ({"x": torch.tensor(1.0)}, RuntimeError, "normalized_shape"),
    "result of integers": ({"out_dtype": torch.int32}, NotImplementedError, "out_dtype"),
    "h of a word": ({"residual_dtype": "float32"}, TypeError, "residual_dtype"),
}


@by_turns(MISTAKES)
def test_mistakes(op, name):
    """The message names the operation and the argument, and of a shape what it may be."""
    changes, expected, name = MISTAKES[name]
    error = error_of(getattr(fastnorm.functional, op), {"x": torch.randn(2, 3, 8), "residual": None} | changes)
    assert type(error) is expected and str(error).startswith(f"{op}(): ") and name in str(error)
    given = changes.get(name)
    is_plain = isinstance(given, Tensor) and given.device.type == "cpu" and given.layout is torch.strided
    is_plain = is_plain and not given.is_nested
    if expected is RuntimeError and is_plain and name != "residual" and given.is_floating_point():
        assert "[8], [2, 8], [2, 1, 8], [2, 3, 8]" in str(error) and str(list(changes[name].shape)) in str(error)


def test_the_module_is_the_functional(device):
    module = fastnorm.AdaLayerNorm(8, 0.1, out_dtype=F64, residual_dtype=F32)
    tensors = inputs((2, 3, 8), device, BF16, **ALL)
    x, scale, shift, residual, gate = (tensors[name] for name in NAMES)
    expected = modulated_layer_norm(x, scale, shift, residual, gate, 0.1, out_dtype=F64, residual_dtype=F32)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, twin(x, scale, shift, residual, gate), expected))
    assert all(map(torch.equal, fastnorm.AdaLayerNorm(8)(x, scale, shift), modulated_layer_norm(x, scale, shift)))
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == "AdaLayerNorm((8,), eps=0.1, out_dtype=torch.float64, residual_dtype=torch.float32)"
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[9\], x must have the shape \[\*, 9\], but got"):
        fastnorm.AdaLayerNorm(9)(x, None, None)
    with pytest.raises(ValueError, match="one positive size"):
        fastnorm.AdaLayerNorm((2, 8))


def test_eps_of_none_is_that_of_the_statistics(device):
    x = 1e-4 * torch.randn(3, 8, device=device)  # mean square and eps are of one order
    expected = modulated_rms_norm(x, eps=torch.finfo(F32).eps)[0]
    assert torch.equal(modulated_rms_norm(x)[0], expected)


@pytest.mark.parametrize("residual_dtype", [F32, None], ids=str)
def test_eps_of_none_is_that_of_float64_statistics(residual_dtype, device):
    """Those are float64 if x or the residual is, whatever h's dtype."""
    x, residual = 1e-5 * torch.randn(2, 3, 8, dtype=F64, device=device), 1e-5 * torch.randn(2, 3, 8, device=device)
    for a, b in ((x, residual), (residual, x)):
        y, h = modulated_rms_norm(a, None, None, b, residual_dtype=residual_dtype)
        torch.testing.assert_close(y.double(), F.rms_norm(h.double(), (8,)), rtol=1e-5, atol=1e-5)


@operations
@pytest.mark.parametrize("kinds", [{}, dict(scale="b1"), ALL], ids=["nothing", "scale", "all"])
def test_a_rounded_h_of_float64_is_normalised_in_float64(op, kinds, device):
    tensors = inputs((2, 3, 24), device, F64, **kinds)
    y, h = call(op, tensors, residual_dtype=F32)
    assert y.dtype == F64 and torch.equal(h, stream(tensors).float())
    torch.testing.assert_close(y, formula(op, h.double(), tensors), rtol=1e-12, atol=1e-12)


@operations
def test_gradients_that_can_be_differentiated_are_not_rounded_to_the_dtype_of_h(op, kernel_device):
    leaves = {name: t.requires_grad_() for name, t in inputs((2, 3, 24), kernel_device, F32, **ALL).items()}
    y, h = call(op, leaves, residual_dtype=BF16)
    upstream = random_gradients(y.shape, F32, kernel_device)
    upstream = upstream[0], upstream[1].to(BF16)
    plain, differentiable = (
        torch.autograd.grad((y, h), list(leaves.values()), upstream, retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    for once, again in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-5)


@operations
def test_a_float64_residual_makes_the_gradient_through_h_alone_exact(op, kernel_device):
    """The kernels', and the formula's that can be differentiated."""
    tensors = inputs((2, 300, 8), kernel_device, F32, **ALL)
    tensors["residual"], tensors["gate"] = tensors["residual"].double(), tensors["gate"].double()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    dh = torch.randn(2, 300, 8, device=kernel_device)
    right = (dh.double() * tensors["x"].double()).sum(1, keepdim=True)
    for create_graph in (False, True):
        _, h = call(op, leaves, residual_dtype=F32)
        (found,) = torch.autograd.grad(h, leaves["gate"], dh, create_graph=create_graph)
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["scale", "shift", "gate"])
def test_gradients_of_expanded_parameters_are_rounded_once(name, device):
    """One row of a float16 parameter for all rows, beside another with a row for each: the terms of its gradient are
    below float16's range, the sum is not."""
    shape, dtype = (2, 512, 16), torch.float16
    given = {n: torch.zeros(16, dtype=dtype, device=device) for n in ("scale", "shift", "gate")}
    finer = "gate" if name == "shift" else "shift"
    given[finer] = torch.ones(shape, dtype=dtype, device=device)
    given[name] = (given[name] + 1).requires_grad_()
    x, residual = (torch.ones(shape, dtype=dtype, device=device) * torch.arange(1, 17, device=device) for _ in range(2))
    given |= {"x": x.to(dtype), "residual": residual.to(dtype)}
    dy = (torch.rand(shape, device=device) + 0.5) * 2e-8
    y, h = modulated_layer_norm(**given, out_dtype=F32, residual_dtype=F32)
    outputs = 2 if name == "gate" else 1  # h has no part in the others
    (found,) = torch.autograd.grad((y, h)[:outputs], given[name], (dy, dy)[:outputs])
    wide = {n: t.detach().double().requires_grad_(n == name) for n, t in given.items()}
    h = wide["residual"] + wide["gate"] * wide["x"]
    y = F.layer_norm(h, (16,)) * (1 + wide["scale"]) + wide["shift"]
    (right,) = torch.autograd.grad((y, h)[:outputs], wide[name], [dy.double()] * outputs)
    torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=6e-8)  # half a unit of float16's subnormals


def test_a_sparse_residual_is_added():
    """As add_rms_norm's is, by PyTorch's operations."""
    tensors = inputs((2, 3, 8), **ALL)
    expected = call("modulated_rms_norm", tensors)
    found = call("modulated_rms_norm", tensors | {"residual": tensors["residual"].to_sparse()})
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_gradients_of_expanded_parameters_are_summed_in_float64(dtype, device):
    """If x is float64: the terms of so many rows, in float32, would be off by tens of units."""
    x, fine, dy = (torch.randn(1, 20000, 8, dtype=F64, device=device) for _ in range(3))
    shift = torch.zeros(8, dtype=dtype, device=device, requires_grad=True)
    y, _ = modulated_rms_norm(x, fine.float(), shift)
    (found,) = torch.autograd.grad(y, shift, dy)
    assert torch.equal(found, dy.sum((0, 1)).to(dtype))


def test_the_number_of_samples_is_no_constant_of_a_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x, scale):
        return modulated_layer_norm(x, scale, scale)[0]

    graph = make_fx(function, tracing_mode="symbolic")(torch.randn(2, 3, 8), torch.randn(2, 1, 8))
    x, scale = torch.randn(4, 3, 8), torch.randn(4, 1, 8)
    torch.testing.assert_close(graph(x, scale), function(x, scale))


def test_sizes_of_the_module():
    import numpy as np

    assert fastnorm.AdaLayerNorm(np.int64(8)).normalized_shape == fastnorm.AdaLayerNorm([8]).normalized_shape == (8,)
    for wrong, error in ((8.0, TypeError), (True, TypeError), (-1, ValueError), ((), ValueError), ((2, 3), ValueError)):
        with pytest.raises(error, match="normalized_shape"):
            fastnorm.AdaLayerNorm(wrong)
    with pytest.raises(RuntimeError, match=r"use torch\.jit\.trace"):
        torch.jit.script(fastnorm.AdaLayerNorm(8))
