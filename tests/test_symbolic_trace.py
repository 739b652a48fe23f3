"""torch.fx.symbolic_trace through fastnorm's functionals and modules, and other arguments with a __torch_function__."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import functional
from fastnorm.convert import adapted
from helpers import foreign_norms as foreign

pytestmark = pytest.mark.usefixtures("compiled_kernels")
MODULES = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(8, zero_centered=True), (2, 8), "call_function"),
    "LayerNorm, bare": (lambda: fastnorm.LayerNorm(8, elementwise_affine=False), (2, 8), "call_function"),
    "RMSNorm": (lambda: fastnorm.RMSNorm(8, rounding="llama", out_dtype=torch.float64), (2, 8), "call_function"),
    "AddLayerNorm": (lambda: fastnorm.AddLayerNorm(8), (2, 8), "call_function"),
    "AddRMSNorm": (lambda: fastnorm.AddRMSNorm(8, 1e-3, residual_dtype=torch.float64), (2, 8), "call_function"),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(8, momentum=None), (4, 8), "call_module"),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8, activation="relu"), (2, 8, 3, 3), "call_module"),
    "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(8, affine=False), (2, 8, 2, 3, 3), "call_module"),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(8), (2, 8, 3), "call_module"),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 8, activation="silu"), (2, 8, 3, 3), "call_function"),
    "converted Llama": (lambda: converted(foreign.LlamaLike(8)), (2, 8), "call_function"),
    "converted T5": (lambda: converted(foreign.T5Like(8)), (2, 8), "call_module"),
    "converted, other names": (lambda: converted(foreign.OtherNames(8)), (2, 8), "call_function"),
    "converted LayerNorm2d": (lambda: converted(foreign.LayerNorm2d(8)), (2, 8, 3, 3), "call_module"),
    "converted BatchNormAct2d": (lambda: converted(foreign.BatchNormAct2d(8)), (2, 8, 3, 3), "call_module"),
    "converted GroupNormAct": (lambda: converted(foreign.GroupNormAct(8, 2, nn.SiLU())), (2, 8, 3), "call_module"),
}
ADDING = (fastnorm.AddLayerNorm, fastnorm.AddRMSNorm)
WITH_RESIDUAL = ("AddLayerNorm", "AddRMSNorm", "BatchNorm2d", "SyncBatchNorm")


def converted(norm: nn.Module) -> nn.Module:
    assert fastnorm.convert(norm).swapped
    return norm


class Block(nn.Module):
    """A norm between two multiplications; `residual` says whether it gets one."""

    def __init__(self, norm: nn.Module, residual: bool) -> None:
        super().__init__()
        self.inner, self.residual = nn.ModuleDict({"norm": norm}), residual
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        norm = self.inner["norm"]
        y = norm(2 * x, x) if self.residual else norm(2 * x)
        if isinstance(norm, ADDING):
            y, h = y
            return y * h
        return y * 3


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a copy, and its buffers afterwards."""
    module = copy.deepcopy(module)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    named = module.named_parameters(), module.named_buffers()
    parameters, buffers = ([t for _, t in sorted(tensors)] for tensors in named)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], dy), *buffers]


def operations(graph: torch.fx.GraphModule) -> set[str]:
    """Of the nodes that are norms."""
    return {
        node.op for node in graph.graph.nodes
        if (node.op == "call_module" and node.target == "inner.norm")
        or (node.op == "call_function" and node.target in map(functional.__dict__.get, functional.__all__))
    }  # fmt: skip


CASES = [(name, residual) for name in MODULES for residual in (False, True) if not residual or name in WITH_RESIDUAL]


@pytest.mark.parametrize("name, residual", CASES)
def test_traced_modules(name, residual):
    """Equal bit by bit, since the same functions run; before and after all that is done with a GraphModule."""
    make, shape, operation = MODULES[name]
    model, x = Block(make(), residual), torch.randn(shape)
    expected, buffers = results(model, x), copy.deepcopy(list(model.buffers()))
    traced = torch.fx.symbolic_trace(model)
    assert operations(traced) == {operation}
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True)), "tracing runs nothing"
    assert set(traced.state_dict()) == set(model.state_dict())
    copies = [copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    again = [torch.fx.symbolic_trace(traced), torch.fx.Transformer(traced).transform()]
    for variant in (traced, *copies, *again):
        for actual, right in zip(results(variant, x), expected, strict=True):
            assert torch.equal(actual, right)
    assert torch.equal(torch.fx.Interpreter(copy.deepcopy(traced)).run(x), expected[0])


@pytest.mark.parametrize("name", ["BatchNorm1d", "SyncBatchNorm", "converted BatchNormAct2d"])
def test_a_trace_follows_the_training_mode(name):
    make, shape, _ = MODULES[name]
    model = Block(make(), residual=False)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for training in (True, False, True):
        x = torch.randn(shape)
        assert torch.equal(traced.train(training)(x), model.train(training)(x))
    assert [int(b) for name, b in traced.named_buffers() if "num_batches" in name] == [2]


def add_before(module, args):
    return (args[0] + 1,)


def add_behind(module, args, y):
    return y + 1


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "converted T5"])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_hooks_act_once(name, where):
    make, shape, _ = MODULES[name]
    model, x = Block(make(), residual=False), torch.randn(shape)
    if where == "before":
        model.inner["norm"].register_forward_pre_hook(add_before)
    else:
        model.inner["norm"].register_forward_hook(add_behind)
    expected = results(model, x)
    traced = torch.fx.symbolic_trace(model)
    for variant in (traced, pickle.loads(pickle.dumps(traced))):
        for actual, right in zip(results(variant, x), expected, strict=True):
            assert torch.equal(actual, right)


def test_subclasses_are_traced_through():
    class Doubled(fastnorm.LayerNorm):
        def forward(self, x):
            return super().forward(x + 1) * 2

    class Twice(fastnorm.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    x = torch.randn(2, 8)
    model = Block(Doubled(8), residual=False)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    # as one of torch.nn.BatchNorm2d does; a silent trace would hold one training mode, and apply the norm twice
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(Block(Twice(8), residual=False))


def test_a_residual_alone_is_traced():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.constant = fastnorm.BatchNorm1d(8), nn.Buffer(torch.randn(4, 8))

        def forward(self, residual):
            return self.norm(self.constant, residual=residual)

    model, x = Constant(), torch.randn(4, 8)
    traced = torch.fx.symbolic_trace(model)
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(traced.eval()(x), model.eval()(x))


def test_the_root_of_a_trace():
    """It has no name to be called by: a functional's node stands for it, where its type needs no more."""
    x = torch.randn(2, 8)
    for norm in (fastnorm.LayerNorm(8), fastnorm.RMSNorm(8), fastnorm.GroupNorm(2, 8)):
        assert torch.equal(torch.fx.symbolic_trace(norm)(x), norm(x))
    for norm in (fastnorm.BatchNorm2d(8), nn.BatchNorm2d(8)):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(norm)


W, B = torch.randn(8), torch.randn(8)
CALLS = {
    "layer_norm": lambda f, x, r, w, b: f(x, (8,), w, b, 1e-3, zero_centered=True, out_dtype=torch.float64),
    "rms_norm": lambda f, x, r, w, b: f(x, (8,), w, 1e-3, rounding="llama", out_dtype=torch.float64),
    "add_layer_norm": lambda f, x, r, w, b: f(x, r, (8,), w, b, 1e-3, residual_dtype=torch.float64)[0],
    "add_rms_norm": lambda f, x, r, w, b: f(x, r, (8,), w, 1e-3, zero_centered=True, residual_dtype=torch.float64)[0],
    "gated_layer_norm": lambda f, x, r, w, b: f(x, r, (8,), w, b, 1e-3, activation="sigmoid", out_dtype=torch.float64),
    "gated_rms_norm": lambda f, x, r, w, b: f(
        x, r, (8,), w, b, 1e-3, norm_before_gate=False, group_size=4, zero_centered=True, rounding="llama"
    ),
    "batch_norm": lambda f, x, r, w, b: f(
        x, W.abs(), W.square(), w, b, eps=1e-3, residual=r, activation="relu", training=False
    ),
    "group_norm": lambda f, x, r, w, b: f(x, 2, w, b, 1e-3, activation="silu"),
}


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """Those that the call uses, out of four; r is the residual, or the gate."""
    tensors = {"x": torch.randn(2, 8), "w": W}
    if "rms" not in name or "gated" in name:
        tensors["b"] = B
    if "add" in name or "gated" in name or name == "batch_norm":
        tensors["r"] = torch.randn(2, 8)
    return tensors


class Call(nn.Module):
    """A call with inputs in the place of these tensors."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.tensors, self.inputs = name, tensors, inputs

    def forward(self, x=None, r=None, w=None, b=None):
        given = {"x": x, "r": r, "w": w, "b": b}
        return call(self.name, self.tensors | {key: given[key] for key in self.inputs})


def call(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return CALLS[name](getattr(functional, name), *map(tensors.get, "xrwb"))


@pytest.mark.parametrize("name", CALLS)
def test_functionals_become_one_node_with_all_their_arguments(name):
    """Whichever of the tensors is traced; the others may be constants."""
    tensors = tensors_of(name)
    for inputs in (*((key,) for key in tensors), tuple(tensors)):
        traced = torch.fx.symbolic_trace(Call(name, tensors, inputs))
        targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert targets[0] is getattr(functional, name) and len(targets) == 1 + ("add" in name)
        leaves = {key: torch.randn(tensors[key].shape).requires_grad_() for key in inputs}
        y, expected = traced(**leaves), call(name, tensors | leaves)
        assert torch.equal(y, expected)
        for pair in zip(*(torch.autograd.grad(t.sum(), list(leaves.values())) for t in (y, expected)), strict=True):
            assert torch.equal(*pair)


class Quantity:
    """Numbers with a unit: no tensor, but something that knows what to do with calls on it."""

    def __init__(self, value: torch.Tensor, unit: str) -> None:
        self.value, self.unit = value, unit

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert cls in types
        units = [a.unit for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls)]
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda q: q.value, (args, kwargs or {}))
        y = function(*args, **kwargs)
        y = [cls(value, "".join(units)) for value in (y if isinstance(y, tuple) else (y,))]
        y[0].function = function
        return y if len(y) > 1 else y[0]


@pytest.mark.parametrize("name", CALLS)
def test_other_overrides(name):
    """They decide, with the function itself and all its arguments."""
    tensors = tensors_of(name)
    expected = call(name, tensors)
    for key in tensors:
        quantity = call(name, tensors | {key: Quantity(tensors[key], "m")})
        assert quantity.function is getattr(functional, name) and quantity.unit == "m"
        assert torch.equal(quantity.value, expected)


def test_what_overrides_nothing_is_still_refused():
    for name in CALLS:
        tensors = tensors_of(name)
        for key in tensors:
            with pytest.raises(TypeError, match=f"^{name}.*must be Tensor, not list"):
                call(name, tensors | {key: [1.0] * 8})


class Labelled(torch.Tensor):
    """A subclass, which sees the operations that the call is made of, as it would without fastnorm."""

    called: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", CALLS)
def test_tensor_subclasses_see_torchs_operations(name):
    tensors = tensors_of(name)
    with fastnorm.use("reference"):
        expected = call(name, tensors)
    for key in ("x", "w"):
        Labelled.called.clear()
        with fastnorm.use(None):
            y = call(name, tensors | {key: tensors[key].as_subclass(Labelled)})
        assert type(y) is Labelled
        stock = getattr(nn.functional, name.removeprefix("add_").removeprefix("gated_"))
        # a weight that is multiplied by afterwards
        assert stock in Labelled.called or (key == "w" and ("rms" in name or "gated" in name))
        torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


def test_adapted_classes_have_the_forward_of_their_trace():
    """A class that is derived from these without its own forward is still one node."""
    derived = type("Derived", (adapted.WeightTypedRMSNorm,), {})
    model, x = Block(derived(8), residual=False), torch.randn(2, 8)
    traced = torch.fx.symbolic_trace(model)
    assert operations(traced) == {"call_module"} and torch.equal(traced(x), model(x))
