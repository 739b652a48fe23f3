"""batch_norm and group_norm under torch.compile, torch.export and other tracers, and as operators of the dispatcher."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastnorm
from fastnorm import backend
from fastnorm.views import ChannelView
from helpers.channel_norms import Case, call, case_of, fused, inputs
from helpers.environment import SIMULATED
from helpers.graphs import NAMESPACES, Graphs, called, ours

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]
f32, bf16 = torch.float32, torch.bfloat16
SHAPE = (4, 6, 5, 3)
CASES = [
    fused(case_of("batch_norm", SHAPE, channels_last=True)),
    case_of("batch_norm", SHAPE, bf16),
    fused(case_of("batch_norm", SHAPE, training=False)),
    fused(case_of("group_norm", SHAPE, groups=3)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.training}-{c.activation}")


def results(function, case: Case, tensors: dict) -> list[torch.Tensor]:
    """The output, the gradients and the running statistics."""
    leaves = {n: t.detach().clone(memory_format=torch.preserve_format) for n, t in tensors.items()}
    trained = [t.requires_grad_() for n, t in leaves.items() if not n.startswith("running")]
    y = function(case, leaves)
    found = torch.autograd.grad((y.float() ** 3).sum(), trained)
    return [y.detach(), *found, *(t for n, t in leaves.items() if n.startswith("running"))]


def assert_close(actual: list, expected: list) -> None:
    for a, e in zip(actual, expected, strict=True):
        tolerance = 2e-2 if a.dtype == bf16 else 1e-4
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@cases
def test_by_default_the_formula_is_compiled(case):
    """Fullgraph, so that Inductor can fuse it with its neighbours; running statistics move as in eager mode."""
    graphs = Graphs()
    with fastnorm.use(None):
        compiled = torch.compile(call, fullgraph=True, backend=graphs.compiler)
        tensors = inputs(case)
        actual = results(compiled, case, tensors)
    assert graphs.forward and not ours(graphs.forward + graphs.backward)
    with fastnorm.use("reference"):
        assert_close(actual, results(call, case, tensors))


@cases
def test_named_kernels_stay(case, kernel_device):
    graphs = Graphs()
    compiled = torch.compile(call, fullgraph=True, backend=graphs.compiler)
    tensors = inputs(case, kernel_device)
    assert_close(results(compiled, case, tensors), results(call, case, tensors))
    namespace = NAMESPACES[backend._forced]
    step = "forward" if case.training else "evaluation"
    found = ours(graphs.forward) | {n for n in called(graphs.forward) if "auto_functionalized" in n}
    assert f"{namespace}.{case.op}_{step}" in found or any("auto_functionalized" in n for n in found)
    assert f"{namespace}.{case.op}_backward" in ours(graphs.backward)


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm"])
def test_modules_compile_once_and_train(name):
    """Between their neighbours, in training with every form of momentum, and not again for each step."""
    for options in ({}, {"momentum": None}, {"activation": "relu"}) if name == "BatchNorm2d" else ({},):
        make = fastnorm.BatchNorm2d if name == "BatchNorm2d" else fastnorm.GroupNorm
        arguments = (6,) if name == "BatchNorm2d" else (3, 6)
        eager, traced = make(*arguments, **options), make(*arguments, **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda x, m=traced: torch.tanh(m(torch.sin(x))), fullgraph=True, backend=counter)
        with fastnorm.use(None):
            for step in range(3):
                x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
                torch.testing.assert_close(compiled(x), torch.tanh(eager(torch.sin(x))), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
        for a, e in zip(traced.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm"])
def test_export(name):
    module = (fastnorm.BatchNorm2d(6, activation="relu") if name == "BatchNorm2d" else fastnorm.GroupNorm(3, 6)).eval()
    x = torch.randn(SHAPE)
    with fastnorm.use(None):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert called([program.graph_module]) and not ours([program.graph_module])
    other = torch.randn(7, *SHAPE[1:])
    torch.testing.assert_close(program.module()(other), module(other))


@cases
def test_fake_tensors_have_the_form_of_real_results(case, kernel_device):
    tensors = inputs(case, kernel_device)
    expected = results(call, case, tensors)
    mode = FakeTensorMode()
    actual = results(call, case, {name: mode.from_tensor(t) for name, t in tensors.items()})
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def operator_calls(shape: tuple, memory_format: torch.memory_format, full: bool, device: str):
    """(name, arguments) of every operator: everything given, or every optional argument left out."""
    x, residual, dy = torch.randn(3, *shape).to(device)
    x, channels = x.to(bf16).contiguous(memory_format=memory_format), shape[1]
    weight, bias, mean, running_mean = torch.randn(4, channels).to(device)
    rstd, running_var = torch.rand(2, channels).add(0.5).to(device)
    mask = ChannelView(x, memory_format, across_samples=True).make_mask(True).random_(256)
    sums = torch.randn(2, channels, device=device)
    factor = torch.tensor(0.25, device=device)
    given = (residual, weight, bias) if full else (None, None, None)
    tracked = (running_mean, running_var, factor) if full else (None, None, None)
    out, m, wanted = (f32, mask, f32) if full else (bf16, None, None)
    yield "batch_norm_forward", (x, *given, *tracked, 0.1, 1e-5, memory_format, full, out)
    yield "batch_norm_backward", (dy, m, x, given[1], mean, rstd, full, memory_format, wanted, wanted, wanted)
    yield "batch_norm_evaluation", (x, *given, running_mean, running_var, 1e-5, memory_format, full, full, out)
    yield "batch_norm_statistics", (x, memory_format)
    yield "batch_norm_normalize", (x, *given, mean, rstd, memory_format, full, out)
    yield "batch_norm_backward_sums", (dy, m, x, mean, rstd, memory_format)
    yield "batch_norm_backward_apply", (dy, m, x, given[1], mean, rstd, sums, memory_format, wanted)
    moments = (torch.randn(shape[0], 3, device=device), torch.rand(shape[0], 3, device=device) + 0.5)
    yield "group_norm_forward", (x, 3, *given[1:], 1e-5, memory_format, full, out)
    yield "group_norm_backward", (dy, x, 3, *given[1:], *moments, memory_format, full, wanted, wanted)


LAYOUTS = [
    ((4, 6), torch.contiguous_format),
    ((4, 6, 5), torch.contiguous_format),
    ((2, 6, 5, 3), torch.channels_last),
    ((2, 6, 2, 2, 2), torch.channels_last_3d),
]


@pytest.mark.skipif(SIMULATED, reason="what Python hands to the kernels is seen in the interpreter, in less time")
@pytest.mark.parametrize("shape, memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["least", "everything"])
def test_operators_keep_to_their_schemas(shape, memory_format, full, kernel_device):
    """Nothing is written to but the running statistics, nothing aliases, and the fake implementations are right."""
    namespace = getattr(torch.ops, NAMESPACES[backend._forced])
    for name, arguments in operator_calls(shape, memory_format, full, kernel_device):
        torch.library.opcheck(getattr(namespace, name).default, arguments)


@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
def test_transforms_take_the_formula(op):
    """torch.func and forward mode, which no kernel has, under the automatic choice."""
    case = fused(case_of(op, SHAPE, groups=3, running=None))
    tensors = inputs(case)
    x, tangent = tensors.pop("x"), torch.randn(SHAPE)
    with fastnorm.use(None):
        function = lambda x: call(case, tensors | {"x": x})  # noqa: E731
        _, forward = torch.func.jvp(function, (x,), (tangent,))
        gradient = torch.func.grad(lambda x: (function(x) * tangent).sum())(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf, tangent)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        step = 1e-3
        numeric = (function(x.double() + step * tangent) - function(x.double() - step * tangent)) / (2 * step)
    torch.testing.assert_close(forward.double(), numeric.double(), rtol=2e-2, atol=2e-2)


def test_explain_tells_of_evaluation():
    with fastnorm.use(None):
        if "cpu" in backend._native_devices:
            reason = backend._refusal("batch_norm_evaluation", "native", torch.empty(0))
            assert "PyTorch's own CPU kernel" in reason
    for op in backend.CHANNEL_NORMS:
        assert fastnorm.explain(torch.empty(2, 3), op=op).backend in (*backend.BACKENDS, "none")
