"""Whole calls in C++: the same results as the way through Python, and a plain no to whatever is not plain."""

import pytest
import torch
from norms import DTYPES, Case, call, inputs, plain_case
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import backend
from fastnorm.backend import ROW_NORMS

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
operations = pytest.mark.parametrize("op", ROW_NORMS)
DECLINED = dict.fromkeys(ROW_NORMS, lambda *arguments: NotImplemented)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def named():
    with fastnorm.use("native"):
        yield


def positional(op: str, shape=(3, 8), dtype=F32, eps=1e-5, **changes):
    """The arguments of a direct call: all plain but for `changes`."""
    case = plain_case(op, shape, dtype)
    arguments = inputs(case) | {"normalized_shape": case.normalized_shape, "eps": eps} | changes
    names = ["x", "residual"] if case.adds else ["x"]
    names += ["normalized_shape", "weight", "bias", "eps"] if case.centers else ["normalized_shape", "weight", "eps"]
    return [arguments[name] for name in names]


def everything(case: Case, tensors):
    """Outputs and gradients of one call."""
    torch.manual_seed(2)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = call(case, leaves)
    outputs = (y, h) if case.adds else (y,)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.randn_like(output) for output in outputs])
    with torch.no_grad():
        unrecorded, _ = call(case, tensors)
    return [y, h, unrecorded, *grads]


def cases(op: str):
    yield from (plain_case(op, (5, 33), dtype) for dtype in DTYPES)
    yield plain_case(op, (2, 3, 4, 8), BF16, normalized=2)
    yield plain_case(op, (16,), F32)
    yield plain_case(op, (5, 33), F32, weight=None, bias=None)
    mixed = plain_case(op, (2, 5, 32), BF16, weight=F32)
    yield mixed.alike(residual=F32) if mixed.adds else mixed
    if mixed.adds:
        yield plain_case(op, (5, 33), F32, residual=F64)
    if not mixed.centers:
        yield plain_case(op, (5, 33), BF16, eps=None)


@operations
def test_both_ways_give_the_same_bits(op, monkeypatch):
    for case in cases(op):
        tensors = inputs(case)
        direct = everything(case, tensors)
        assert "CppNode" in direct[0].grad_fn.name()
        with monkeypatch.context() as patched:
            patched.setattr(native, "direct", DECLINED)
            by_python = everything(case, tensors)
        assert "CppNode" not in by_python[0].grad_fn.name()
        for ours, expected in zip(direct, by_python, strict=True):
            assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@operations
def test_rows_that_are_not_adjacent(op, monkeypatch):
    case = plain_case(op, (4, 6, 8), F32)
    tensors = inputs(case)
    tensors["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    if case.adds:
        tensors["residual"] = torch.randn(4, 6, 16)[..., ::2]
    direct = everything(case, tensors)
    monkeypatch.setattr(native, "direct", DECLINED)
    assert all(map(torch.equal, direct, everything(case, tensors)))


@operations
def test_the_backward_stays_native(op):
    case = plain_case(op, (3, 8), F32)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    y, _ = call(case, leaves)
    with fastnorm.use("reference"), torch.profiler.profile() as profile:
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("NormFunction" in name for name in names) and not any("norm_backward" in name for name in names)


@operations
def test_only_wanted_gradients_are_computed(op):
    case = plain_case(op, (3, 8), F32)
    for wanted in inputs(case):
        leaves = {name: t.requires_grad_(name == wanted) for name, t in inputs(case).items()}
        y, h = call(case, leaves)
        assert y.requires_grad and h.requires_grad == (wanted in ("x", "residual") or case.adds)
        (y.square().sum() + (h.sum() if h.requires_grad else 0)).backward()
        assert {name for name, t in leaves.items() if t.grad is not None} == {wanted}


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_of_two_outputs_used(op, used, create_graph):
    case = plain_case(op, (3, 8), F64)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    stream = [leaves["x"], leaves["residual"]]
    found = torch.autograd.grad(call(case, leaves)[used == "h"].square().sum(), stream, create_graph=create_graph)
    with fastnorm.use("reference"):
        expected = torch.autograd.grad(call(case, leaves)[used == "h"].square().sum(), stream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@operations
def test_double_backward(op):
    case = plain_case(op, (3, 5), F64)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}

    def function(*tensors):
        y, h = call(case, dict(zip(leaves, tensors, strict=True)))
        return (y, h) if case.adds else y

    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@operations
def test_what_was_saved_is_watched(op):
    """In-place writes between forward and backward are found, and hooks see what is saved."""
    case = plain_case(op, (3, 8), F32)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    y, _ = call(case, leaves)
    with torch.no_grad():
        leaves["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y, _ = call(case, leaves)
    assert case.shape in packed
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@operations
def test_results_can_be_written_to(op):
    case = plain_case(op, (2, 3, 8), F32)
    y, _ = call(case, {name: t.requires_grad_() for name, t in inputs(case).items()})
    y.relu_().sum().backward()


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class NothingAtAll(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@operations
def test_modes_and_transforms_are_declined(op):
    direct, arguments = native.direct[op], positional(op)
    assert direct(*arguments) is not NotImplemented
    for look in (Nothing, NothingAtAll, torch.autograd.forward_ad.dual_level):
        with look():
            assert direct(*arguments) is NotImplemented
    assert direct(*arguments) is not NotImplemented
    seen = []

    def inside(x):
        seen.append(direct(x, *arguments[1:]) is NotImplemented)
        return x.sum()

    torch.func.grad(inside)(arguments[0])
    torch.func.vmap(inside)(arguments[0].expand(2, 3, 8))
    torch.jit.trace(inside, arguments[0], check_trace=False)
    assert all(seen) and len(seen) >= 3


@operations
def test_what_is_not_plain_is_declined(op):
    direct, x = native.direct[op], torch.randn(3, 8)
    wrong = [
        {"x": None}, {"x": [1.0]}, {"x": x.to("meta")}, {"x": x.to(torch.complex64)}, {"x": x.long()},
        {"x": x.to_sparse()}, {"x": x.to(torch.float8_e5m2)}, {"x": x.as_subclass(type("T", (torch.Tensor,), {}))},
        {"x": torch.empty(0, 8), "residual": torch.empty(0, 8)}, {"x": torch.tensor(1.0)}, {"x": x[:2], "residual": x},
        {"normalized_shape": 8}, {"normalized_shape": ()}, {"normalized_shape": (3,)}, {"normalized_shape": (8.0,)},
        {"normalized_shape": (2, 3, 8)}, {"normalized_shape": (2**70,)}, {"normalized_shape": (True,)},
        {"weight": torch.ones(7)}, {"weight": torch.ones(1, 8)}, {"weight": torch.ones(8).long()}, {"weight": 1.0},
        {"eps": "1"}, {"eps": x},
    ]  # fmt: skip
    wrong += [{"bias": torch.ones(7)}, {"eps": None}] if op.endswith("layer_norm") else []
    wrong += [{"residual": None}, {"residual": x[0]}] if op.startswith("add_") else []
    for changes in wrong:
        if "x" in changes and "residual" not in changes and op.startswith("add_"):
            changes = changes | {"residual": x}
        if "residual" in changes and not op.startswith("add_"):
            changes = {name: value for name, value in changes.items() if name != "residual" and len(changes) > 1}
            if changes.get("x") is not None and changes["x"].shape == (2, 8):
                continue
        assert direct(*positional(op, **changes)) is NotImplemented, changes
    assert direct() is NotImplemented and direct(*positional(op), 1) is NotImplemented


@operations
@pytest.mark.parametrize("eps", [-0.5, -1e4, float("nan")])
def test_an_eps_that_is_not_positive(op, eps, monkeypatch):
    """NaN where stock has it, forwards and backwards, by both ways."""
    case = plain_case(op, (6, 8), F64, eps=eps)
    tensors = inputs(case)
    for name in {"x", "residual"} & set(tensors):
        tensors[name] *= torch.tensor([0.1, 0.1, 9, 9, 9, 9], dtype=F64).view(-1, 1)  # var + eps is negative, or large
    direct = everything(case, tensors)
    assert direct[0][:2].isnan().all() and direct[0][2:].isfinite().all() == (eps == -0.5)
    monkeypatch.setattr(native, "direct", DECLINED)
    for ways in (everything(case, tensors), by_reference(case, tensors)):
        torch.testing.assert_close(direct, ways, equal_nan=True)


def by_reference(case: Case, tensors):
    with fastnorm.use("reference"):
        return everything(case, tensors)


@operations
def test_who_is_asked_for_a_whole_call(op, monkeypatch):
    """Native where it is named, or where it is what automatic takes for the CPU; nobody in any other case."""

    class Triton:
        serves = staticmethod(lambda device: True)

    arguments, asked = positional(op), []
    monkeypatch.setattr(native, "direct", {op: lambda *given: asked.append(given) or "y"})
    for triton, name, expected in (
        (None, None, True),
        (None, "native", True),
        (None, "reference", False),
        (Triton, None, False),
        (Triton, "native", True),
        (Triton, "reference", False),
    ):
        monkeypatch.setattr(backend, "_triton", triton)
        asked.clear()
        with fastnorm.use(name):
            assert (backend.call_directly(op, *arguments) == "y") == expected == bool(asked)
    monkeypatch.setattr(backend, "_native_devices", ())
    assert backend.call_directly(op, *arguments) is NotImplemented


@operations
def test_options_go_the_other_way(op, monkeypatch):
    """Those that a whole call in C++ does not know are never lost on it."""

    def refuse(*arguments):
        raise AssertionError("an option was dropped")

    monkeypatch.setattr(native, "direct", {op: refuse})
    case = plain_case(op, (3, 8), F32)
    options = [{"zero_centered": True}, {"out_dtype": F64}]
    options += [] if case.centers else [{"rounding": "llama"}]
    options += [{"residual_dtype": F64}] if case.adds else []
    for option in options:
        call(case.alike(options=option), inputs(case))
    with pytest.raises(AssertionError, match="dropped"):
        call(case, inputs(case))
