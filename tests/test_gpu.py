"""What only a CUDA device can show: graph capture, streams, several devices, autocast, Inductor; for `make gpu`."""

from collections.abc import Callable

import pytest
import torch
from channel_norms import call as call_channel_norm
from channel_norms import case_of, fused
from channel_norms import inputs as channel_inputs
from norms import call as call_row_norm
from norms import inputs as row_inputs
from norms import plain_case
from torch import nn

import fastnorm
from fastnorm.backend import ROW_NORMS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NORMS = (*ROW_NORMS, "batch_norm", "group_norm")
norms = pytest.mark.parametrize("op", NORMS)


def problem(op: str, device: str = "cuda") -> tuple[Callable[[dict], torch.Tensor], dict[str, torch.Tensor]]:
    """A call that returns y, and its tensors in bfloat16."""
    if op in ROW_NORMS:
        case = plain_case(op, (64, 1000), torch.bfloat16)
        return lambda tensors: call_row_norm(case, tensors)[0], row_inputs(case, device)
    case = fused(case_of(op, (8, 24, 14, 14), torch.bfloat16, groups=4, channels_last=True))
    return lambda tensors: call_channel_norm(case, tensors), channel_inputs(case, device)


def step(function, tensors: dict) -> list[torch.Tensor]:
    """The output and every gradient."""
    trained = [t.requires_grad_() for n, t in tensors.items() if not n.startswith("running")]
    y = function(tensors)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]


def fresh(tensors: dict, device: str | torch.device = "cuda") -> dict[str, torch.Tensor]:
    return {n: t.detach().to(device, copy=True) for n, t in tensors.items()}


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


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "adaptive_clip_grad_", "clip_grad_value_"])
def test_graph_capture_of_a_clip(clip):
    parameters = [nn.Parameter(torch.randn(n, 33, device="cuda")) for n in (1, 7, 300)]
    gradients = [torch.randn_like(p) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    function = getattr(fastnorm, clip)
    function(parameters, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(parameters, 0.5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient)
    graph.replay()
    captured = [p.grad.clone() for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad.copy_(gradient)
    function(parameters, 0.5)
    assert all(torch.equal(p.grad, c) for p, c in zip(parameters, captured, strict=True))
    assert any(not torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True)), "nothing was clipped"


@norms
def test_another_stream(op):
    function, tensors = problem(op)
    expected = step(function, fresh(tensors))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows has to wait for what is before it in this stream alone
        mine = fresh(tensors)
        results = step(function, mine)
    stream.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))


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
