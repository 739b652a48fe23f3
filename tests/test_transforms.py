"""What PyTorch does with a call rather than in it: torch.func, forward mode, traces, tensor subclasses, modes."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import fastnorm
from helpers.norms import call, formula, inputs, plain_case
from helpers.stock import modules, pair, y_of


@modules
def test_functional_call_takes_other_parameters(name):
    ours, stock = pair(name, 8)
    x = torch.randn(3, 8)
    before = y_of(ours, x)
    others = {key: torch.randn(8, requires_grad=True) for key, _ in stock.named_parameters()}
    y = functional_call(ours, others, (x,))
    y, expected = (y[0] if isinstance(y, tuple) else y), functional_call(stock, others, (x,))
    torch.testing.assert_close(y, expected)
    found = [torch.autograd.grad(r.square().sum(), list(others.values())) for r in (y, expected)]
    torch.testing.assert_close(*found)
    assert torch.equal(y_of(ours, x), before)


TRANSFORMS = {
    "grad": lambda f, x, w: torch.func.grad(lambda *a: f(*a).square().sum(), (0, 1))(x, w),
    "grad of grad": lambda f, x, w: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: f(x, w).pow(3).sum())(x) * w).sum()
    )(x),
    "vmap over x": lambda f, x, w: torch.func.vmap(f, (0, None))(x, w),
    "vmap over weights": lambda f, x, w: torch.func.vmap(f, (None, 0))(x, torch.stack([w, 2 * w])),
    "gradient of each sample": lambda f, x, w: torch.func.vmap(
        torch.func.grad(lambda w, x: f(x, w).square().sum()), (None, 0)
    )(w, x),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (x.cos(), w.sin())),
    "vjp": lambda f, x, w: torch.func.vjp(f, x, w)[1](x.cos()),
    "jacrev": lambda f, x, w: torch.func.jacrev(f)(x, w),
    "hessian": lambda f, x, w: torch.func.hessian(lambda w: f(x, w).square().sum())(w),
    "forward mode": lambda f, x, w: forward_mode(f, x, w),
}


def forward_mode(f, x, w):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        return torch.autograd.forward_ad.unpack_dual(f(dual(x, x.cos()), dual(w, w.sin())))


@modules
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(name, transform):
    ours, stock = pair(name, 6, dtype=torch.float64)
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def with_weight(module):
        def run(x, w):
            result = functional_call(module, {"weight": w}, (x,))
            return result[0] if isinstance(result, tuple) else result

        return run

    actual, expected = (TRANSFORMS[transform](with_weight(m), x, w) for m in (ours, stock))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op, norm_before_gate", [("gated_layer_norm", False), ("gated_rms_norm", True)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_gate(op, norm_before_gate, transform):
    """In the weight's place above, with groups."""
    case = plain_case(op, (6,), torch.float64, options={"norm_before_gate": norm_before_gate, "group_size": 3})
    tensors = inputs(case)
    x, gate = torch.randn(4, 6, dtype=torch.float64), tensors.pop("gate")

    def ours(x, gate):
        return call(case, tensors | {"x": x, "gate": gate.expand(x.shape)})[0]

    def stocks(x, gate):
        return formula(case, x, tensors["weight"], tensors["bias"], gate.expand(x.shape))

    torch.testing.assert_close(*(TRANSFORMS[transform](f, x, gate) for f in (ours, stocks)))


@modules
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_trace_takes_other_batch_sizes(name):
    ours, stock = pair(name, 8)
    traced = torch.jit.trace(ours, torch.randn(3, 8))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(y_of(traced, x), stock(x))


PER_SAMPLE = {
    "LayerNorm": (lambda m: m.LayerNorm(6), (4, 3, 6)),
    "GroupNorm": (lambda m: m.GroupNorm(2, 6), (4, 6, 3)),
    "frozen": (lambda m: m.GroupNorm(2, 6).requires_grad_(False), (4, 6, 3)),
    "between others": (lambda m: nn.Sequential(nn.Linear(5, 6), m.LayerNorm(6), nn.Linear(6, 2)), (4, 3, 5)),
    "RMSNorm": (lambda m: m.RMSNorm(6), (4, 3, 6)),
    "BatchNorm1d": (lambda m: m.BatchNorm1d(6), (4, 6, 3)),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_of_samples_by_expanded_weights(name, reduction):
    """call_for_per_sample_grads: what stock's modules have, and its refusal of the others."""
    make, shape = PER_SAMPLE[name]
    x, outcomes, stock = torch.randn(shape), [], None
    for package in (nn, fastnorm):
        module = make(package)
        if stock is not None:
            module.load_state_dict(stock.state_dict())
        stock, leaf = module, x.clone().requires_grad_()
        try:
            y = call_for_per_sample_grads(module, loss_reduction=reduction)(leaf)
            (y.square().sum() if reduction == "sum" else y.square().mean()).backward()
            outcomes.append([y, leaf.grad, *(p.grad_sample for p in module.parameters() if p.requires_grad)])
        except RuntimeError as error:
            outcomes.append(str(error).splitlines()[0])
    if name in ("RMSNorm", "BatchNorm1d"):
        assert outcomes[0] == outcomes[1] and "cannot handle function" in outcomes[0]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0])


def test_gradients_of_samples_of_a_converted_model():
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Linear(5, 6), nn.LayerNorm(6))
    x = torch.randn(4, 3, 5)
    expected = [torch.autograd.grad(model(sample[None]).square().sum(), list(model.parameters())) for sample in x]
    assert len(fastnorm.convert(model).swapped) == 2
    call_for_per_sample_grads(model, loss_reduction="sum")(x).square().sum().backward()
    for parameter, gradients in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(gradients))


class Logged(torch.Tensor):
    """A subclass of the kind that units and quantities are: it has a name for what was called on it."""

    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@modules
@pytest.mark.parametrize("which", ["input", "weight"])
def test_subclasses_with_torch_function(name, which):
    """Calls on them are seen, results keep the type, and gradients arrive."""
    ours, stock = pair(name, 8)
    x = torch.randn(3, 8)
    for module in (ours, stock):
        x_or_logged = x.as_subclass(Logged) if which == "input" else x
        if which == "weight":
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Logged))
        Logged.called.clear()
        y = y_of(module, x_or_logged.requires_grad_())
        assert type(y) is Logged and set(Logged.called) & {"layer_norm", "rms_norm"}
        y.square().sum().backward()
        assert x_or_logged.grad is not None and module.weight.grad is not None
    torch.testing.assert_close(y_of(ours, x).as_subclass(torch.Tensor), stock(x).as_subclass(torch.Tensor))


@modules
def test_modes_see_the_call(name):
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    ours, stock = pair(name, 8)
    x = torch.randn(3, 8)
    with Watch():
        y = y_of(ours, x)
    torch.testing.assert_close(y, stock(x))
    assert seen
