"""torch's own samples and mistakes, of its OpInfo and ModuleInfo: stock's values, gradients and exceptions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from helpers.norms import DTYPES

pytest.importorskip("expecttest", reason="torch.testing._internal.common_utils imports expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

OPERATIONS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
SAMPLES = {"add_layer_norm": "layer_norm", "add_rms_norm": "rms_norm"} | dict(zip(OPERATIONS, OPERATIONS, strict=True))
ERRORS = {"layer_norm": "native_layer_norm"}  # which has the same arguments
INFOS = {info.name: info for info in op_db if not info.variant_test_name}
MODULES = {name: info for info in module_db if hasattr(fastnorm, name := info.name.removeprefix("nn."))}
COMPLEX = (torch.complex64, torch.complex128)
every_operation = pytest.mark.parametrize("op", SAMPLES)


def run(function, sample, residual: Tensor | None, dy: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Results (y, or y and h), gradients under `dy`, and buffers as they were left, all computed in a dtype, or, with
    None, each tensor in its own."""

    def own(value):
        return value.detach().to(dtype or value.dtype, copy=True) if isinstance(value, Tensor) else value

    leaves = {"x": own(sample.input)} | ({} if residual is None else {"residual": own(residual)})
    arguments, keywords = list(map(own, sample.args)), {name: own(value) for name, value in sample.kwargs.items()}
    buffers = {"mean": arguments[0], "variance": arguments[1]} if function.__name__ == "batch_norm" else {}
    for name, value in [*enumerate(arguments), *keywords.items()]:
        if isinstance(value, Tensor) and not any(value is buffer for buffer in buffers.values()):
            leaves[str(name)] = value
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = function(*list(leaves.values())[: 1 if residual is None else 2], *arguments, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, list(leaves.values()), [dy.to(t.dtype) for t in outputs])
    results = dict(zip("yh", outputs, strict=False)) | {name: b for name, b in buffers.items() if b is not None}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def stock_of(op: str):
    """Stock's function, with the addition in front of it where the operation adds."""
    function = getattr(F, SAMPLES[op])
    if not op.startswith("add_"):
        return function

    def added(x, residual, *arguments, **keywords):
        h = x + residual
        return function(h, *arguments, **keywords), h

    return added


def variance_of(op: str, h: Tensor, sample) -> Tensor:
    """What eps is added to."""
    if op == "batch_norm" and not sample.kwargs.get("training", False):
        return sample.args[1].double()
    if op == "batch_norm":
        rows = h.transpose(0, 1).flatten(1)
    elif op == "group_norm":
        rows = h.reshape(h.shape[0], sample.args[0], -1)
    else:
        rows = h.flatten(-len(sample.args[0]))
    return rows.square().mean(-1) if op.endswith("rms_norm") else rows.var(-1, correction=0)


def scale_of(name: str, op: str, h: Tensor, sample, dy: Tensor) -> float:
    """The largest term that a result is summed up from, times their number where it is a sum."""
    rstd = (variance_of(op, h, sample) + sample.kwargs.get("eps", 1e-5)).rsqrt().nan_to_num(0.0, 0.0).max()
    given = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    weight = max([1.0, *(t.abs().max() for t in given)])
    x, dy = h.abs().max(), dy.abs().max()
    if name in ("y", "h", "mean", "variance"):
        return weight * (1 + x * rstd) + x + x * x
    return dy * (1 + weight * rstd) * (1 + x * rstd) if name in ("dx", "dresidual") else dy * (1 + x * rstd) * h.numel()


@every_operation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(op, dtype, device):
    if fastnorm.explain().backend == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("other tests have the dtypes; Triton's interpreter takes seconds for each")
    samples = list(INFOS[f"nn.functional.{SAMPLES[op]}"].sample_inputs(device, dtype))
    assert len(samples) > 4
    for sample in samples:
        residual = torch.randn_like(sample.input) if op.startswith("add_") else None
        dy = torch.randn_like(sample.input)
        ours, stock = (run(f, sample, residual, dy) for f in (getattr(fastnorm.functional, op), stock_of(op)))
        oracle = run(stock_of(op), sample, residual, dy, torch.float64)
        h = oracle.get("h", sample.input.double()).detach()
        for name, value in ours.items():
            assert value.dtype == stock[name].dtype and value.shape == stock[name].shape
            assert torch.equal(value.isnan(), stock[name].isnan()), f"{name}: NaN where stock has none"
            if value.numel() and h.numel():
                unit = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 4)
                unit *= scale_of(name, op, h, sample, dy.double())
                error, stocks = ((t - oracle[name]).abs().nan_to_num(0.0, 0.0).max() for t in (value, stock[name]))
                assert error <= 1.25 * stocks + unit, f"{name}: off by {error:.3g}, stock by {stocks:.3g}"


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_samples(op, dtype):
    """Only by the formula, which is stock's own operation: bit by bit."""
    with fastnorm.use(None):
        for sample in INFOS["nn.functional.rms_norm"].sample_inputs("cpu", dtype):
            residual = torch.randn_like(sample.input) if op.startswith("add_") else None
            dy = torch.randn_like(sample.input)
            ours, stock = (run(f, sample, residual, dy) for f in (getattr(fastnorm.functional, op), stock_of(op)))
            for name, value in ours.items():
                torch.testing.assert_close(value, stock[name], rtol=0, atol=0, equal_nan=True)


@every_operation
def test_mistakes(op, device):
    """Of the type that stock has. The words are our own but where stock's are the clearer ones."""
    info = INFOS.get(ERRORS.get(SAMPLES[op], f"nn.functional.{SAMPLES[op]}"))
    for mistake in info.error_inputs(device) if info.error_inputs_func else ():
        sample = mistake.sample_input
        inputs = (sample.input, torch.ones_like(sample.input)) if op.startswith("add_") else (sample.input,)
        with pytest.raises(mistake.error_type, match=mistake.error_regex) as stock:
            stock_of(op)(*inputs, *sample.args, **sample.kwargs)
        with pytest.raises(mistake.error_type) as ours:
            getattr(fastnorm.functional, op)(*inputs, *sample.args, **sample.kwargs)
        assert ours.type is stock.type and str(ours.value)


MODES = [(name, training) for name in MODULES for training in (True, False) if training or "Batch" in name]


@pytest.mark.parametrize("name, training", MODES)
def test_modules(name, training, device):
    info = MODULES[name]
    for given in info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=training
    ):
        if given.forward_input.args[0].numel() > 500 and fastnorm.explain().backend == "triton" and device == "cpu":
            continue  # Triton's interpreter takes ten seconds for it
        constructor, forward = given.constructor_input, given.forward_input
        options = constructor.kwargs | {"device": device, "dtype": torch.float64}
        stock, ours = (getattr(m, name)(*constructor.args, **options).train(training) for m in (torch.nn, fastnorm))
        ours.load_state_dict(stock.state_dict())
        outcomes = []
        for module in (ours, stock):
            inputs = copy.deepcopy(forward.args)
            y = module(*inputs, **forward.kwargs)
            torch.manual_seed(1)
            grads = torch.autograd.grad(y, [*inputs, *module.parameters()], torch.randn_like(y))
            outcomes.append([y, *grads, *module.buffers()])
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, info in MODULES.items() if info.module_error_inputs_func])
def test_mistakes_with_modules(name, device):
    info = MODULES[name]
    for mistake in info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    ):
        given = mistake.module_error_input
        constructor, forward = given.constructor_input, given.forward_input
        for modules in (torch.nn, fastnorm):
            with pytest.raises(mistake.error_type, match=mistake.error_regex):
                module = getattr(modules, name)(*constructor.args, **constructor.kwargs)
                if mistake.error_on is ModuleErrorEnum.FORWARD_ERROR:
                    module.to(device)(*forward.args, **forward.kwargs)


def test_there_is_something_to_run():
    assert {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "LayerNorm", "RMSNorm"} <= set(MODULES)
    assert {f"nn.functional.{op}" for op in OPERATIONS} <= set(INFOS)
