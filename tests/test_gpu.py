"""What only a CUDA device can show: graph capture, streams, threads, several devices, autocast, Inductor."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.backend import ROW_NORMS
from helpers import channel_norms
from helpers import norms as row_norms
from helpers.channel_norms import case_of, fused
from helpers.layouts import relaid
from helpers.norms import plain_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NORMS = (*ROW_NORMS, "batch_norm", "group_norm")
norms = pytest.mark.parametrize("op", NORMS)


def problem(op: str, device: str = "cuda") -> tuple[Callable[[dict], Tensor], dict[str, Tensor]]:
    """A call that returns y, and its tensors in bfloat16."""
    if op in ROW_NORMS:
        case = plain_case(op, (64, 1000), torch.bfloat16)
        return lambda tensors: row_norms.call(case, tensors)[0], row_norms.inputs(case, device)
    case = fused(case_of(op, (8, 24, 14, 14), torch.bfloat16, groups=4, channels_last=True))
    return lambda tensors: channel_norms.call(case, tensors), channel_norms.inputs(case, device)


def step(function, tensors: dict) -> list[Tensor]:
    """The output and every gradient."""
    trained = [t.requires_grad_() for n, t in tensors.items() if not n.startswith("running")]
    y = function(tensors)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]


def fresh(tensors: dict, device: str | torch.device = "cuda") -> dict[str, Tensor]:
    return {n: t.detach().to(device, copy=True) for n, t in tensors.items()}


def equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Gradients:
    """Parameters whose gradients can be made what they were, and clipped."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.parameters = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
        self.values = [torch.randn_like(p) for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def restore(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.grad.copy_(value)

    def clip(self, name: str) -> None:
        getattr(fastnorm, name)(self.parameters, 0.5)

    def found(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters]

    def clipped(self, name: str) -> list[Tensor]:
        """What a clip makes of them, without waiting for it."""
        self.restore()
        self.clip(name)
        return self.found()


CLIPS = ("clip_grad_norm_", "adaptive_clip_grad_", "clip_grad_value_")


@norms
def test_graph_capture(op):
    """A forward and a backward, captured once and replayed on other values."""
    function, tensors = problem(op)
    static = fresh(tensors)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(function, static)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(function, static)
    for scale in (1.0, 0.5):
        values = {n: t.detach() * (scale if n == "x" else 1.0) for n, t in tensors.items()}
        with torch.no_grad():
            for name, value in values.items():
                static[name].copy_(value)
        graph.replay()
        expected = step(function, fresh(values))
        assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


def capture(gradients: Gradients, clip: str, warm_up: str = "current") -> torch.cuda.CUDAGraph:
    """A graph of one clip, which is called once before, on a stream of its own, the current or the captured one."""
    captured = torch.cuda.Stream()
    stream = {"own": torch.cuda.Stream(), "current": torch.cuda.current_stream(), "captured": captured}[warm_up]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients.clip(clip)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=captured):
        gradients.clip(clip)
    return graph


POLICIES = {
    "ZClip": lambda: fastnorm.ZClip(warmup=2),
    "AutoClip": lambda: fastnorm.AutoClip(50.0, 5),
    "AdaGC": lambda: fastnorm.AdaGC(warmup=2),
}


@pytest.mark.parametrize("name", POLICIES)
def test_graph_capture_of_a_policy(name, clip_backend):
    """Every replay learns from its norms, as every call does."""
    gradients, captured, eager = Gradients((1000,), (7, 33)), POLICIES[name](), POLICIES[name]()
    for policy in (captured, eager):
        gradients.restore()
        fastnorm.clip_grad_norm_(gradients.parameters, policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastnorm.clip_grad_norm_(gradients.parameters, captured)
    for scale in (1.1, 1.0, 1.2, 20.0, 0.9):
        found = []
        for clip in (graph.replay, lambda: fastnorm.clip_grad_norm_(gradients.parameters, eager)):
            for parameter, value in zip(gradients.parameters, gradients.values, strict=True):
                parameter.grad.copy_(value * scale)
            clip()
            found.append([p.grad.clone() for p in gradients.parameters])
        assert equal(*found) and captured.threshold == eager.threshold
    assert captured.steps == eager.steps == 6


def test_too_many_spikes_raise_when_their_count_has_arrived():
    policy = fastnorm.SpikeSkip(2.0, warmup=2, max_consecutive=2, on_limit="raise")
    parameter = nn.Parameter(torch.zeros(1, device="cuda"))
    optimizer = torch.optim.SGD([parameter], fused=True)

    def step_with(norm: float) -> None:
        parameter.grad = torch.full_like(parameter, norm)
        fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
        optimizer.step()
        torch.cuda.synchronize()

    for norm in (1.0, 1.0, 9.0, 9.0):
        step_with(norm)
    with pytest.raises(RuntimeError, match=r"SpikeSkip has skipped [34] steps in a row"):
        for _ in range(3):
            step_with(9.0)


@pytest.mark.parametrize("warm_up", ["own", "current", "captured"])
@pytest.mark.parametrize("clip", CLIPS)
def test_graph_capture_of_a_clip(clip, warm_up, clip_backend):
    gradients = Gradients((1, 33), (7, 33), (300, 33))
    graph = capture(gradients, clip, warm_up)
    expected = gradients.clipped(clip)
    assert not equal(expected, gradients.values), "nothing is clipped"
    gradients.restore()
    graph.replay()
    assert equal(gradients.found(), expected)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_graph_outlives_what_later_clips_keep(clip, clip_backend):
    """What it reads beside the gradients, such as a table of their addresses, is not given to the next lists."""
    gradients = Gradients((9, 33), (300, 33))
    graph = capture(gradients, clip)
    others = [Gradients(*[(i + 5, 35)] * (1 + i % 7)) for i in range(40)]
    theirs = [other.clipped(clip) for other in others]
    expected = gradients.clipped(clip)
    gradients.restore()
    graph.replay()
    assert equal(gradients.found(), expected)
    assert all(equal(other.found(), before) for other, before in zip(others, theirs, strict=True))


def on_two_streams(work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """What work(0) and work(1) give on streams of their own, both of which begin late and run at the same time.

    The default stream is idle: what is launched there by mistake, or on the other stream, reads before its inputs are
    written.
    """
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for i, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep((1 + i) * 10_000_000)  # 5 and 10 ms
    for _ in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] += work(i)
    torch.cuda.synchronize()
    return results


@norms
def test_two_streams(op):
    function, tensors = problem(op)
    expected = step(function, fresh(tensors))
    for found in on_two_streams(lambda i: step(function, fresh(tensors))):
        assert equal(found, 3 * expected)


@pytest.mark.parametrize("clip", CLIPS)
def test_clips_on_two_streams(clip, clip_backend):
    both = [Gradients((1000, 1000), (7, 33), (300, 33)), Gradients((900, 1100), (70, 33))]
    expected = [gradients.clipped(clip) for gradients in both]
    for found, wanted in zip(on_two_streams(lambda i: both[i].clipped(clip)), expected, strict=True):
        assert equal(found, 3 * wanted)


@pytest.mark.parametrize("name", [None, "triton"])
def test_two_threads(name):
    """Forwards, backwards and clips of two threads, each on a stream of its own, are what they are alone."""
    problems = [problem(op) for op in NORMS]
    torch.cuda.synchronize()
    together = threading.Barrier(2, timeout=60)

    def once(gradients: Gradients) -> list[Tensor]:
        found = [t for function, tensors in problems for t in step(function, fresh(tensors))]
        return found + [t for clip in CLIPS for t in gradients.clipped(clip)]

    def run(gradients: Gradients) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            found = [t for _ in range(4) for t in once(gradients)]
            torch.cuda.current_stream().synchronize()
        return found

    with fastnorm.use(name), ThreadPoolExecutor(2) as pool:
        both = [Gradients((100, 1000), (7, 33)), Gradients((3, 5), (90, 1100), (70, 33))]
        expected = [once(gradients) for gradients in both]
        torch.cuda.synchronize()
        for found, wanted in zip(pool.map(run, both), expected, strict=True):
            assert equal(found, 4 * wanted)


@norms
def test_unaligned_inputs(op):
    """Everything that a norm reads begins one element behind a boundary of 16 bytes."""
    module = row_norms if op in ROW_NORMS else channel_norms
    if op in ROW_NORMS:
        case = plain_case(op, (7, 1000), torch.bfloat16)
    else:
        case = fused(case_of(op, (4, 24, 14, 14), torch.bfloat16, groups=4, weight=torch.bfloat16, bias=torch.bfloat16))
    tensors = {name: relaid(t, "offset") for name, t in module.inputs(case, "cuda").items()}
    assert all(t.data_ptr() % 16 for t in tensors.values())
    dy = relaid(torch.randn(case.shape, device="cuda").bfloat16(), "offset")
    module.check(case, tensors, dy)


def test_gradients_on_the_host_and_on_the_card():
    """One norm of both, on the first one's device."""
    grads = [torch.randn(300), torch.randn(77, 5).cuda(), torch.randn(5), torch.randn(1000).cuda().half()]
    exact = torch.cat([g.double().cpu().flatten() for g in grads]).norm()
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    total = fastnorm.clip_grad_norm_(parameters, 0.5)
    assert total.device.type == "cpu"
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    for parameter, grad in zip(parameters, grads, strict=True):
        expected = (grad.double() * (0.5 / (exact.item() + 1e-6))).to(grad.dtype)
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@norms
def test_a_device_that_is_not_current(op):
    function, tensors = problem(op)
    expected = step(function, fresh(tensors))
    with torch.cuda.device(0):
        results = step(function, fresh(tensors, "cuda:1"))
    assert all(t.device == torch.device("cuda:1") for t in results)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.to(wanted.device), wanted)


MODULES = {"LayerNorm": (32,), "RMSNorm": (32,), "BatchNorm1d": (32,), "GroupNorm": (4, 32)}


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name):
    """The result's dtype is stock's."""
    ours, stock = (getattr(kind, name)(*MODULES[name]).cuda() for kind in (fastnorm, nn))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 32, device="cuda", dtype=dtype)
        with torch.autocast("cuda", torch.bfloat16):
            y, expected = ours(x), stock(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", [None, "triton"])
@norms
def test_inductor(op, backend):
    """Compiled for real, by the formula and with the kernels kept."""
    function, tensors = problem(op)
    with fastnorm.use(backend):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        actual, expected = step(compiled, fresh(tensors)), step(function, fresh(tensors))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * max(1.0, e.abs().max().item()))


@norms
def test_automatic_choice_is_a_kernel(op):
    with fastnorm.use(None):
        assert fastnorm.explain(torch.empty(4, 32, device="cuda"), op=op).backend == "triton"
