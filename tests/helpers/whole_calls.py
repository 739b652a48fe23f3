"""What the tests of whole calls in C++ share: the two ways of a call, and who may look on."""

import operator
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import backend

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
NATIVE_ON_CPU, TRITON_ON_CPU, TRITON_ON_GPU, NATIVE_NAMED = 1, 2, 4, 8  # as csrc/arguments.h has them
PYTHONS_ONLY = lambda *arguments: NotImplemented  # noqa: E731


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class NothingAtAll(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def through_python(monkeypatch, function: Callable):
    """What the function returns where no call is made in C++."""
    with monkeypatch.context() as patched:
        patched.setattr(backend, "call_directly", PYTHONS_ONLY)
        return function()


def by_triton(monkeypatch) -> str:
    """Names Triton, and gives the device of its kernels. Calls in C++ reach them in the interpreter, too."""
    if backend._triton is None:
        pytest.skip(backend._absent["triton"])
    monkeypatch.setattr(backend, "_forced", "triton")
    monkeypatch.setattr(backend, "_served", None)
    if backend._triton.INTERPRETED:
        monkeypatch.setattr(backend, "_who_serves", lambda driver: TRITON_ON_CPU)
    native._C.clear_plans()
    return backend._triton.device_type() or "cpu"


BY_CPP = ("RowNormBackward", "RMSNormManyBackward", "GroupNormBackward", "BatchNormBackward")  # nodes of autograd


def without_triton(monkeypatch) -> None:
    """As where it isn't installed: automatic is then native, on the CPU."""
    for name in ("_triton", "_driver", "_served"):
        monkeypatch.setattr(backend, name, None)
    monkeypatch.setitem(backend._absent, "triton", "left out")


def is_by_cpp(output: Tensor) -> bool:
    return output.grad_fn.name() in BY_CPP


def assert_same(found: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    """The same bits, NaN included, in the same places."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()) and torch.equal(ours.isnan(), theirs.isnan())


def assert_declined_where_somebody_looks_on(direct: Callable, x: Tensor) -> None:
    """direct(x) must decline under modes, transforms and traces, and only there."""
    assert direct(x) is not NotImplemented
    for look in (Nothing, NothingAtAll, torch.autograd.forward_ad.dual_level):
        with look():
            assert direct(x) is NotImplemented
    assert direct(x) is not NotImplemented
    seen = []

    def inside(x):
        seen.append(direct(x) is NotImplemented)
        return x.sum()

    torch.func.grad(inside)(x)
    torch.func.vmap(inside)(x.expand(2, *x.shape))
    torch.func.functionalize(inside)(x)
    torch.jit.trace(inside, x, check_trace=False)
    assert all(seen) and len(seen) >= 4
    dual = torch.autograd.forward_ad.dual_level
    with dual():
        assert direct(torch.autograd.forward_ad.make_dual(x, x)) is NotImplemented


def assert_keeps_no_references(direct: Callable, arguments: list, mistakes: Iterable[list]) -> None:
    """To arguments of calls that are served, of their backwards, and of those that are declined."""
    objects = [*arguments, *(a for mistaken in mistakes for a in mistaken), None, True, False, NotImplemented]
    before = list(map(sys.getrefcount, objects))
    for _ in range(100):
        outputs = direct(*arguments)
        (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
        for mistaken in mistakes:
            assert direct(*mistaken) is NotImplemented
    del outputs
    after = map(sys.getrefcount, objects)
    assert all(now - then < 50 for now, then in zip(after, before, strict=True))


class Subclass(Tensor):
    pass


def assert_stays_native(backward: Callable[[], object]) -> None:
    """A backward in C++, whatever is named meanwhile."""
    with fastnorm.use("reference"), torch.profiler.profile() as profile:
        backward()
    names = {event.key for event in profile.key_averages()}
    assert any(by_cpp in name for name in names for by_cpp in BY_CPP)
    assert not any("norm_backward" in name for name in names)


def assert_a_profiler_sees(op: str, direct: Callable, shape: list[int]) -> None:
    """The call by its own name, with the shape."""
    with torch.profiler.profile(record_shapes=True) as profile:
        direct(op)
    shapes = {event.key: event.input_shapes for event in profile.key_averages(group_by_input_shape=True)}
    assert shapes[f"fastnorm::{op}"] == [shape]


def assert_a_launchers_error_arrives(operators: str, forward: Callable, y: Tensor, monkeypatch) -> None:
    """From a forward, with and without a graph, and from the backward of y."""

    def refuse(*arguments):
        raise ArithmeticError("no launch")

    with monkeypatch.context() as patched:
        for direction in ("forward", "backward"):
            patched.setattr(backend._triton, f"{operators}_{direction}", refuse)
        native._C.clear_plans()
        with pytest.raises(ArithmeticError, match="no launch"):
            forward()
        with pytest.raises(ArithmeticError, match="no launch"), torch.no_grad():
            forward()
        with pytest.raises(ArithmeticError, match="no launch"):
            y.sum().backward()
    native._C.clear_plans()


def tensors_that_are_not_plain(x: Tensor) -> list:
    """No tensor at all, or one like x that no kernel can read."""
    return [
        None, 1.0, [1.0], x.numpy(), x.to("meta"), x.to(torch.complex64), x.long(), x.bool(), x.to_sparse(),
        x.to(torch.float8_e5m2), x.as_subclass(Subclass), x.to_mkldnn(),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch._neg_view(x), torch._efficientzerotensor(x.shape),
        torch.nested.nested_tensor([x, x]),
    ]  # fmt: skip


class FakeTriton:
    """Serves these devices; has a driver once it was used."""

    def __init__(self, *devices: str, interpreted: bool = False, used: bool = True):
        self.serves, self.INTERPRETED = lambda device: device in devices, interpreted
        self.driver = SimpleNamespace(_active=object() if used else None)


def assert_asks_the_right_one(op: str, arguments: list, monkeypatch) -> None:
    """C++ is asked with the bits of those that serve; not at all where nobody does, or Python must look."""
    asked = []
    monkeypatch.setattr(backend._native, "calls", {op: lambda *given: asked.append(given) or "y"})
    monkeypatch.setattr(backend, "_served", None)

    def told(triton: FakeTriton | None, name: str | None) -> int:
        for attribute, value in (("_triton", triton), ("_driver", triton and triton.driver), ("_forced", name)):
            monkeypatch.setattr(backend, attribute, value)
        asked.clear()
        if backend.call_directly(op, *arguments) is NotImplemented:
            assert not asked
            return 0
        [(served, *given)] = asked
        assert all(map(operator.is_, given, arguments)) and len(given) == len(arguments)
        return served

    named, cpu, gpu = NATIVE_ON_CPU | NATIVE_NAMED, FakeTriton("cpu"), FakeTriton("cuda")
    interpreted = FakeTriton("cpu", interpreted=True)
    for triton in (None, FakeTriton(), cpu, gpu, FakeTriton("cuda", used=False), interpreted):
        assert told(triton, "native") == named
        assert told(triton, "reference") == 0
    for triton in (None, FakeTriton(), FakeTriton("cuda", used=False)):
        assert told(triton, None) == NATIVE_ON_CPU
    assert told(cpu, None) == NATIVE_ON_CPU | TRITON_ON_CPU and told(cpu, "triton") == TRITON_ON_CPU
    assert told(gpu, None) == NATIVE_ON_CPU | TRITON_ON_GPU and told(gpu, "triton") == TRITON_ON_GPU
    assert told(interpreted, None) == told(interpreted, "triton") == 0
    gpu.driver._active = None
    assert told(gpu, None) == NATIVE_ON_CPU and told(gpu, "triton") == 0
    gpu.driver._active = object()
    assert told(gpu, "triton") == TRITON_ON_GPU
    monkeypatch.setattr(backend, "_native_devices", ())
    monkeypatch.setattr(backend, "_served", None)  # nobody builds kernels between two calls
    assert told(None, None) == 0 and told(gpu, None) == TRITON_ON_GPU
    monkeypatch.setattr(backend, "_native", None)
    assert told(gpu, None) == 0
