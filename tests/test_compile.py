"""torch.compile, torch.export and other tracers: which operations they see, and that the numbers stay."""

import inspect
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm
from fastnorm import backend, operators
from fastnorm.backend import ROW_NORMS
from helpers import every_norm
from helpers.backends import backend_parameters
from helpers.environment import SIMULATED, TORCH
from helpers.graphs import NAMESPACES, Graphs, called, ours
from helpers.norms import Case, call, inputs, plain_case

MODULES = {"layer_norm": fastnorm.LayerNorm, "rms_norm": fastnorm.RMSNorm,
           "add_layer_norm": fastnorm.AddLayerNorm, "add_rms_norm": fastnorm.AddRMSNorm,
           "gated_layer_norm": fastnorm.GatedLayerNorm, "gated_rms_norm": fastnorm.GatedRMSNorm}  # fmt: skip
ONE_INPUT = ("layer_norm", "rms_norm")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]
operations = pytest.mark.parametrize("op", ROW_NORMS)
f32, bf16 = torch.float32, torch.bfloat16


def expected_operators(op: str, direction: str) -> set[str]:
    """What a graph holds of ours under the backend that is named now."""
    namespace = NAMESPACES[backend._forced or "reference"]
    return {f"{namespace}.row_norm_{direction}"} if namespace else set()


def results(function, case: Case, tensors: dict, used=("y", "h")) -> list[torch.Tensor]:
    """The outputs and the gradients of all inputs, through the outputs that are used."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, h = function(case, leaves)
    outputs = [t for name, t in (("y", y), ("h", h)) if name in used and (case.adds or name == "y")]
    sum((t.float() ** 3).sum() for t in outputs).backward()
    return [y.detach(), h.detach(), *(t.grad for t in leaves.values())]


def assert_equal(actual: list, expected: list, bitwise: bool) -> None:
    for a, e in zip(actual, expected, strict=True):
        if bitwise:
            assert a.dtype == e.dtype and torch.equal(a, e)
        else:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def compile_cases(op: str) -> list[Case]:
    case = plain_case(op, (3, 2, 40), f32)
    cases = [case, case.alike(weight=None, bias=None), case.alike(dtype=bf16, options={"zero_centered": True})]
    if case.adds:
        cases.append(case.alike(residual=bf16, options={"residual_dtype": torch.float64}))
    if not case.centers:
        cases.append(case.alike(dtype=bf16, weight=bf16, eps=None, options={"rounding": "llama"}))
    if case.gated:
        options = {"activation": "sigmoid", "norm_before_gate": False, "group_size": 8}
        cases.append(case.alike(dtype=bf16, gate=f32, options=options))
    return cases[-1:] if SIMULATED else cases  # each is a compilation


CASES = {op: compile_cases(op) for op in ROW_NORMS}


def all_results(function, op: str, tensors: list[dict]) -> list[torch.Tensor]:
    """The results of an operation's cases, whose calls are in one graph, as each graph takes seconds to make."""
    leaves = [{name: t.detach().clone().requires_grad_() for name, t in each.items()} for each in tensors]
    outputs = function(CASES[op], leaves)
    used = [t for pair in outputs for t in (pair if op.startswith("add_") else pair[:1])]
    sum((t.float() ** 3).sum() for t in used).backward()
    return [t.detach() for pair in outputs for t in pair] + [t.grad for each in leaves for t in each.values()]


def call_all(cases: list[Case], tensors: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [call(case, each) for case, each in zip(cases, tensors, strict=True)]


@operations
def test_by_default_the_formula_is_compiled(op):
    """Inductor can fuse it with its neighbours; a kernel of ours would stand in the way."""
    graphs, tensors = Graphs(), [inputs(case) for case in CASES[op]]
    actual = all_results(torch.compile(call_all, fullgraph=True, backend=graphs.compiler), op, tensors)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert not ours(graphs.forward) and not ours(graphs.backward)
    assert any("norm" in name or "rsqrt" in name for name in called(graphs.forward)), "the formula is not in the graph"
    with fastnorm.use("reference"):
        assert_equal(actual, all_results(call_all, op, tensors), bitwise=False)


@operations
def test_named_kernels_stay(op, kernel_device):
    """One graph, with our operators in it both ways; the same kernels give the same bits."""
    graphs, tensors = Graphs(), [inputs(case, kernel_device) for case in CASES[op]]
    actual = all_results(torch.compile(call_all, fullgraph=True, backend=graphs.compiler), op, tensors)
    assert ours(graphs.forward) == expected_operators(op, "forward")
    assert ours(graphs.backward) == expected_operators(op, "backward")
    for (graph,) in (graphs.forward, graphs.backward):
        assert sum("row_norm" in str(node.target) for node in graph.graph.nodes) == len(CASES[op])
    assert not any("native_layer_norm" in name or "rsqrt" in name for name in called(graphs.forward))
    assert_equal(actual, all_results(call_all, op, tensors), bitwise=True)


MOST = [name for name in every_norm.CASES if not name.endswith(("-None", "-evaluation"))]
FEW = ["rms_norm-2x3x24", "batch_norm-2x6x3x3-relu-channels_last"]  # for a compiler that takes long


def assert_compiled_alike(compiler: str, names: list[str], device: str) -> None:
    """In one graph, because each is a compilation. None of the gradients is zero."""
    tensors = every_norm.make_inputs(names, device)
    compiled = torch.compile(every_norm.all_between_neighbours, fullgraph=True, backend=compiler)
    actual, expected = (every_norm.everything(tensors, *block) for block in ([compiled], []))
    every_norm.assert_same(actual, expected, tolerance=1e-5)


def test_outputs_and_gradients_of_every_norm_and_shape(kernel_device):
    assert_compiled_alike("aot_eager", MOST, kernel_device)


def test_outputs_and_gradients_by_inductor(native_named):
    assert_compiled_alike("inductor", FEW, "cpu")


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("used", ["y", "h"])
def test_one_output_of_two(op, used, kernel_device):
    case = plain_case(op, (4, 24), f32)
    tensors = inputs(case, kernel_device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, expected = (results(function, case, tensors, [used]) for function in (compiled, call))
    # a compiled backward writes zeros where eager autograd has no gradient
    expected = [torch.zeros_like(a) if e is None else e for a, e in zip(actual, expected, strict=True)]
    assert_equal(actual, expected, bitwise=True)


@pytest.mark.parametrize("op", ["rms_norm", "add_layer_norm"])  # the backend is chosen in one place
def test_naming_a_backend_compiles_anew(op, kernel_device):
    """What was compiled for one backend is not run under another one."""
    graphs = Graphs()
    case = plain_case(op, (4, 24), f32)
    tensors = inputs(case, kernel_device)
    compiled = torch.compile(call, fullgraph=True, backend=graphs.compiler)
    for name in ("reference", backend._forced, None, backend._forced):
        with fastnorm.use(name):
            compiled(case, tensors)
            assert len(graphs.forward) <= 3
            if name == backend._forced and name not in (None, "reference"):
                assert ours(graphs.forward[1:2]) == expected_operators(op, "forward")
    assert not ours(graphs.forward[:1]) and not ours(graphs.forward[2:])


@pytest.mark.parametrize("op", ["rms_norm", "add_layer_norm", "gated_rms_norm"])
@pytest.mark.parametrize("name", backend_parameters("reference", "native", "triton"))
def test_other_row_counts_do_not_compile_again(op, name):
    status = backend.statuses()[name]
    if not status.available:
        pytest.skip(f"{name} backend: {status.detail}")
    device = backend._triton.device_type() if name == "triton" else "cpu"
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for rows in (5, 2, 31):
        case = plain_case(op, (rows, 24), f32)
        tensors = {key: t.requires_grad_() for key, t in inputs(case, device).items()}
        for key in ("x", "residual", "gate"):
            if key in tensors:
                torch._dynamo.mark_dynamic(tensors[key], 0)
        case = case.alike(shape=(0, 24))  # the number of rows is a guard if the function sees it in Python
        with fastnorm.use(name):
            y, h = compiled(case, tensors)
            expected, _ = call(case, tensors)
            (y.sum() + h.sum()).backward()
        torch.testing.assert_close(y, expected)
    assert counter.frame_count == 1


@operations
def test_inference(op, kernel_device):
    graphs = Graphs()
    case = plain_case(op, (4, 24), bf16)
    tensors = inputs(case, kernel_device)
    with torch.inference_mode():
        actual = torch.compile(call, fullgraph=True, backend=graphs.compiler)(case, tensors)
        assert_equal(list(actual), list(call(case, tensors)), bitwise=True)
    assert ours(graphs.forward) == expected_operators(op, "forward")


@operations
def test_autocast_is_compiled_too(op):
    case = plain_case(op, (4, 24), f32, weight=None, bias=None)
    tensors = inputs(case)

    def step(tensors):
        with torch.autocast("cpu", bf16):
            y, _ = call(case, tensors)
            return y, y @ y.T

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(tensors)
    assert [t.dtype for t in compiled] == [t.dtype for t in step(tensors)] == [f32, bf16]


@operations
def test_modules_compile_between_their_neighbours(op):
    norm = MODULES[op](24)

    def block(x):
        result = norm(torch.relu(x)) if op in ONE_INPUT else norm(torch.relu(x), x)
        return torch.tanh(result[0] if isinstance(result, tuple) else result)

    x = torch.randn(4, 24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("op, strict", [(op, op in ("rms_norm", "add_layer_norm")) for op in ROW_NORMS])
def test_export(op, strict, device):
    """The program holds the operators of the backend that is named, and takes other batch sizes."""
    module = MODULES[op](24).to(device)
    x = torch.randn(4, 3, 24, device=device)
    arguments = (x,) if op in ONE_INPUT else (x, torch.randn_like(x))
    shapes = tuple({0: torch.export.Dim("batch")} for _ in arguments)
    # Before 2.11 no autograd.Function that saves an output can be exported so, unless gradients are off.
    with torch.set_grad_enabled(TORCH >= (2, 11) or strict or not op.startswith("add_")):
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=strict)
    assert ours([program.graph_module]) == expected_operators(op, "forward")
    others = tuple(torch.randn(7, 3, 24, device=device) for _ in arguments)
    torch.testing.assert_close(program.module()(*others), module(*others))


@operations
def test_export_takes_the_formula_by_default(op):
    x = torch.randn(4, 24)
    arguments = (x,) if op in ONE_INPUT else (x, x)
    program = torch.export.export(MODULES[op](24), arguments)
    assert called([program.graph_module]) and not ours([program.graph_module])


@operations
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_operators(op, mode, kernel_device):
    case = plain_case(op, (4, 24), f32)
    tensors = inputs(case, kernel_device)
    graph = make_fx(lambda tensors: call(case, tensors), tracing_mode=mode)(tensors)
    assert ours([graph]) == expected_operators(op, "forward")
    assert_equal(list(graph(tensors)), list(call(case, tensors)), bitwise=True)


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases],
                         ids=[f"{op}-{i}" for op, cases in CASES.items() for i in range(len(cases))])  # fmt: skip
def test_fake_tensors_have_the_form_of_real_results(case, kernel_device):
    """Outputs and gradients, without a launch: shape, dtype, strides."""
    tensors = inputs(case, kernel_device)
    expected = results(call, case, tensors)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t) for name, t in tensors.items()}
    actual = results(call, case, fakes)
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def operator_calls(op: str, shape: tuple, dims: int, device: str):
    """(name, arguments) of both directions: everything given, then every optional argument left out."""
    x, residual, dy, dh = (torch.randn(shape).to(device) for _ in range(4))
    weight, bias = torch.randn(2, *shape[-dims:]).to(device)
    x = torch.stack((x, x), -dims - 1).to(bf16).select(-dims - 1, 0)  # its rows are not adjacent
    rows = math.prod(shape[:-dims])
    adds, gated, centers = op.startswith("add_"), op.startswith("gated_"), op.endswith("layer_norm")
    h, groups = residual if adds else x, 2 if gated else 1
    rstd, mean = torch.rand(rows * groups, device=device) + 0.5, torch.randn(rows * groups, device=device)
    has_bias = centers or gated
    for full in (True, False):
        w, b = (weight, bias if has_bias else None) if full else (None, None)
        cast = bf16 if full and not centers else None
        stream, types = (residual if adds else None), (bf16, f32 if adds else None)
        gate = (residual, None, dims, groups, 1) if gated else (None, None, dims, 1, 1)
        gating = full, full  # silu, norm_before_gate
        yield "row_norm_forward", (x, stream, *gate, w, b, 1e-5, centers, full, *gating, cast, *types)
        moments, dstream = (mean if centers else None, rstd), (dh if full and adds else None)
        types = (bf16, f32 if full else bf16) if adds else (h.dtype, None)
        wanted = (f32, f32 if has_bias else None) if full else (None, None)
        yield "row_norm_backward", (dy, dstream, h, None, *gate, w, b, *moments, full, *gating, cast, *types, *wanted)


@operations
def test_operators_keep_to_their_schemas(op, kernel_device):
    """Nothing is written to, nothing aliases, and the fake implementations tell the truth, at other sizes too."""
    shape, dims = ((3, 20), 1) if op.endswith("rms_norm") else ((2, 3, 4, 5), 2)
    namespace = getattr(torch.ops, NAMESPACES[backend._forced])
    names = set()
    for name, arguments in operator_calls(op, shape, dims, kernel_device):
        torch.library.opcheck(getattr(namespace, name).default, arguments)
        names.add(name)
    assert names == {"row_norm_forward", "row_norm_backward"}


@pytest.mark.parametrize("operator", operators.OPERATORS.values(), ids=lambda operator: operator.name)
@pytest.mark.triton
def test_functions_have_the_arguments_of_their_schemas(operator):
    """The operator is the Python function: the arguments come by position, so that their order must agree."""
    declared = [a.name for a in torch._C.parse_schema(f"fastnorm::{operator.schema}").arguments]
    for function in (operator.fake, getattr(backend._triton, operator.name)):
        assert list(inspect.signature(function).parameters) == declared
