"""rms_norm_many and RMSNormMany for their callers: autograd, transforms, compilers and tracers, wrong arguments."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastnorm
from fastnorm import backend
from fastnorm.functional import rms_norm, rms_norm_many
from helpers.environment import SIMULATED
from helpers.graphs import NAMESPACES, Graphs, ours
from helpers.many_norms import (
    BF16,
    EPS,
    F32,
    F64,
    HEADS,
    PLACES,
    ROTATIONS,
    Case,
    call,
    formula,
    gradients_of,
    inputs,
    laid_out,
    packed,
    results,
)
from helpers.stock import error_of


@pytest.mark.parametrize("wanted", ["x0", "weight0", "x1", "weight1"])
def test_only_wanted_gradients(wanted, device):
    case = Case()
    tensors, dys = inputs(case, device), gradients_of(case, device)
    everything = results(case, tensors, dys)
    leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
    torch.autograd.backward(*zip(*[(y, dy) for y, dy in zip(call(case, leaves), dys, strict=True) if y.requires_grad],
                                 strict=True))  # fmt: skip
    assert [name for name, t in leaves.items() if t.grad is not None] == [wanted]
    torch.testing.assert_close(leaves[wanted].grad, everything[f"d{wanted}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
def test_an_unused_output(used, table, device):
    """Its input and its weight have no gradient, and those of the other are what they are alone."""
    case = Case(table=table)
    tensors, dys = inputs(case, device), gradients_of(case, device)
    everything = results(case, tensors, dys)
    leaves = {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    names = [f"{kind}{i}" for i in (used, 1 - used) for kind in ("x", "weight")]
    y = call(case, leaves)[used]
    found = torch.autograd.grad(y, [leaves[name] for name in names], dys[used], allow_unused=True)
    for name, gradient in zip(names[:2], found, strict=False):
        torch.testing.assert_close(gradient, everything[f"d{name}"], rtol=1e-5, atol=1e-5)
    assert found[2] is None and found[3] is None


def test_the_same_tensor_twice(device):
    """An x and a weight that two pairs share get the sum."""
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    a, b = rms_norm_many([tuple(leaves)] * 2, EPS)
    assert torch.equal(a, b)
    both, once = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in ((a + b).sum(), a.sum()))
    for twice, single in zip(both, once, strict=True):
        torch.testing.assert_close(twice, 2 * single)


@pytest.mark.parametrize("name", ["all columns", "interleaved, some columns", "heads first, by samples", "no weights"])
def test_gradcheck_and_gradgradcheck(name, device):
    case = Case(**(ROTATIONS | PLACES)[name]).alike(dtype=F64, cos=F64, sin=F64)
    case = case.alike(weight=case.weight and F64, rotary_dim=case.rotary_dim and 4)
    case = case.alike(shapes=tuple((*shape[:-1], 6) for shape in case.shapes))
    tensors = inputs(case, device)
    names = [name for name in tensors if name not in ("cos", "sin")]

    def outputs(*given):
        return call(case, tensors | dict(zip(names, given, strict=True)))

    leaves = tuple(tensors[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    assert SIMULATED or torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)
    ys = outputs(*leaves)
    dys = [y.detach() for y in ys]
    once, twice = (torch.autograd.grad(ys, leaves, dys, retain_graph=True, create_graph=c) for c in (False, True))
    for gradient, differentiable in zip(once, twice, strict=True):
        assert not gradient.requires_grad and differentiable.requires_grad
        torch.testing.assert_close(gradient, differentiable)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_double_backward(used, device):
    """Of all outputs or of some, as by the formula."""
    case = Case(dtype=F64, weight=F64, cos=F64, sin=F64, rotary_dim=8)
    tensors = inputs(case, device)
    found = []
    for function in (call, formula):
        leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
        trained = [leaves[f"{kind}{i}"] for i in used for kind in ("x", "weight")]
        loss = sum((function(case, leaves)[i] ** 3).sum() for i in used)
        first = torch.autograd.grad(loss, trained, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    for actual, right in zip(*found, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table", ["S", "BS"])
def test_tables_that_are_trained(interleaved, table):
    """PyTorch's operations compute everything then: a backend that is named can't serve."""
    case = Case(dtype=F64, weight=F64, cos=F64, sin=F64, table=table, options={"interleaved": interleaved})
    tensors = inputs(case)
    found = []
    for function in (call, formula):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = sum((y**3).sum() for y in function(case, leaves))
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for actual, right in zip(*found, strict=True):
        torch.testing.assert_close(actual, right)


def test_tables_that_are_trained_with_a_named_backend(kernel_device):
    case = Case()
    tensors = inputs(case, kernel_device)
    expected = call(case, tensors)
    tensors["sin"].requires_grad_()
    with pytest.raises(RuntimeError, match="cos or sin requires a gradient"):
        call(case, tensors)
    with torch.no_grad():  # nothing is recorded: the kernels can
        assert all(map(torch.equal, call(case, tensors), expected))


@pytest.mark.parametrize("table", [None, "S", "BS", "1S"])
@pytest.mark.parametrize("name", ["dense", "packed"])
def test_what_is_saved(table, name, kernel_device):
    """xs, weights, cos, sin, in the memory that they have, and each input's rstd; nothing else."""
    case = HEADS.alike(table=table)
    tensors = (inputs if name == "dense" else packed)(case, kernel_device)
    leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = call(case, leaves)
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves.values()}
    own = [t for t in saved if t.untyped_storage().data_ptr() not in places]
    assert [(t.shape, t.dtype) for t in own] == [((math.prod(shape[:-1]),), F32) for shape in case.shapes]
    assert {t.untyped_storage().data_ptr() for t in saved} - {t.untyped_storage().data_ptr() for t in own} == {*places}
    assert all(y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in saved} for y in ys)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(memory.values()) == sum(places.values()) + sum(4 * math.prod(shape[:-1]) for shape in case.shapes)


@pytest.mark.parametrize("changed", ["x0", "weight1", "cos"])
def test_a_saved_tensor_that_was_changed(changed, device):
    case = Case()
    tensors = {n: t.requires_grad_(n not in ("cos", "sin")) for n, t in inputs(case, device).items()}
    ys = call(case, tensors)
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])


def test_nothing_is_recorded_without_gradients(device):
    case = Case()
    tensors = inputs(case, device)
    expected = call(case, tensors)
    with torch.no_grad():
        ys = call(case, {n: t.clone().requires_grad_() for n, t in tensors.items()})
    with torch.inference_mode():
        zs = call(case, tensors)
    for y, z, right in zip(ys, zs, expected, strict=True):
        assert torch.equal(y, right) and torch.equal(z, right) and not y.requires_grad and z.is_inference()


@pytest.mark.parametrize("weight, expected", [(F32, F32), (BF16, BF16)], ids=str)
def test_autocast(weight, expected, device):
    """As rms_norm under autocast."""
    kind = torch.device(device).type
    x, w = torch.randn(3, 16, device=device).to(weight), torch.randn(16, device=device).to(weight)
    with torch.autocast(kind, BF16):
        assert rms_norm_many([(x, w)])[0].dtype == rms_norm(x, (16,), w).dtype == F.rms_norm(x, (16,), w).dtype
    assert rms_norm_many([(x, w)])[0].dtype == expected


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_eps_of_none_is_that_of_the_statistics(dtype, device):
    x = (1e-4 * torch.randn(3, 8, device=device)).to(dtype)  # mean square and eps are of one order
    x = x * 1e-4 if dtype == F64 else x
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    assert torch.equal(*(rms_norm_many([(x, None)], e)[0] for e in (None, eps)))
    assert not torch.equal(*(rms_norm_many([(x, None)], e)[0] for e in (1e-30, eps)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all columns", "interleaved, some columns", "heads first, by samples", "no weights"])
def test_torch_compile(name, device, fresh_dynamo):
    """fullgraph, with the operators of the backend that is named, or with the formula."""
    case = Case(**(ROTATIONS | PLACES)[name])
    tensors, dys = inputs(case, device), gradients_of(case, device)
    graphs = Graphs()
    expected = results(case, tensors, dys)
    leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
    ys = torch.compile(lambda: call(case, leaves), fullgraph=True, backend=graphs.compiler)()
    trained = [t for t in leaves.values() if t.requires_grad]
    found = [*ys, *torch.autograd.grad(ys, trained, dys)]
    for actual, right in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    namespace = NAMESPACES[backend._forced]
    names = {f"{namespace}.rms_norm_many_{d}" for d in ("forward", "backward")} if namespace else set()
    assert {*ours(graphs.forward), *ours(graphs.backward)} == names


@pytest.mark.slow
def test_torch_compile_of_other_lengths(device, fresh_dynamo):
    """One graph serves sequences of any length."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = fastnorm.RMSNormMany((16, 16)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for positions in (5, 6, 9):
        case = Case(shapes=((2, positions, 4, 16), (2, positions, 3, 16)), weight=None)
        tensors = inputs(case, device)
        given = [tensors["x0"], tensors["x1"]]
        rotary = tensors["cos"], tensors["sin"]
        for y, right in zip(compiled(*given, rotary=rotary), module(*given, rotary=rotary), strict=True):
            torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def vmapped(f, x, w):
    return torch.vmap(f, in_dims=(0, None))(x, w)


def forward_mode(f, x, w):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        return [
            part for y in f(dual(x, x.cos()), dual(w, w.sin())) for part in torch.autograd.forward_ad.unpack_dual(y)
        ]


TRANSFORMS = {
    "vmap": vmapped,
    "vmap of a gradient": lambda f, x, w: torch.vmap(
        torch.func.grad(lambda x, w: sum(y.pow(3).sum() for y in f(x, w)), (0, 1)), in_dims=(0, None)
    )(x, w),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (x.cos(), w.sin())),
    "vjp": lambda f, x, w: torch.func.vjp(f, x, w)[1](tuple(y.cos() for y in f(x, w))),
    "jacrev": lambda f, x, w: torch.func.jacrev(lambda w: f(x, w)[0].sum(0))(w),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("table", [None, "S", "1S"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, table):
    case = Case(shapes=((3, 2, 6), (3, 1, 6)), dtype=F64, weight=F64, cos=F64, sin=F64, table=table)
    tensors = inputs(case.alike(shapes=((4, 3, 2, 6), (4, 3, 1, 6))))
    cases = case.alike(shapes=case.shapes if "vmap" in transform else ((4, 3, 2, 6), (4, 3, 1, 6)))

    def of(function):
        def run(x, w):
            return function(cases, tensors | {"x0": x, "x1": x[..., :1, :].cos(), "weight0": w})

        return run

    if table == "1S" and "vmap" in transform:  # each sample's own has no dimension of samples
        tensors |= {name: tensors[name][0] for name in ("cos", "sin")}
    actual, expected = (TRANSFORMS[transform](of(f), tensors["x0"], tensors["weight0"]) for f in (call, formula))
    torch.testing.assert_close(actual, expected)


def test_tables_under_vmap():
    """Each sample's own positions."""
    case = Case(shapes=((5, 4, 16), (5, 1, 16)))
    tensors = inputs(Case(table="BS"))

    def run(x0, x1, cos, sin):
        return call(case, tensors | {"x0": x0, "x1": x1, "cos": cos, "sin": sin})

    given = [tensors[name] for name in ("x0", "x1", "cos", "sin")]
    torch.testing.assert_close(torch.vmap(run)(*given), formula(Case(table="BS"), tensors))
    x0, x1, cos, sin = (t[0] for t in given)
    for alone in (lambda cos: run(x0, x1, cos, sin), lambda sin: run(x0, x1, cos, sin)):
        found = torch.vmap(alone)(tensors["cos"])
        for i in range(2):
            torch.testing.assert_close(found[0][i], alone(tensors["cos"][i])[0])


def test_derivatives_along_tables():
    """Forward mode, of a table alone."""
    tensors = inputs(Case(dtype=F64, weight=F64, cos=F64, sin=F64))
    case, direction = Case(dtype=F64), torch.randn(5, 16, dtype=F64)
    for name in ("cos", "sin"):
        found, expected = (
            torch.func.jvp(lambda t, f=f, name=name: f(case, tensors | {name: t}), (tensors[name],), (direction,))
            for f in (call, formula)
        )
        torch.testing.assert_close(found, expected)


def test_operators_keep_to_their_schemas(kernel_device):
    namespace = getattr(torch.ops, NAMESPACES[backend._forced])
    case = HEADS
    tensors = packed(case, kernel_device)
    xs, weights = ([tensors[f"{kind}{i}"] for i in range(2)] for kind in ("x", "weight"))
    dys = [torch.randn(shape, device=kernel_device).to(BF16) for shape in case.shapes]
    for is_rotated in (True, False):
        tables = [
            [laid_out(tensors[name], x, -3).expand(*x.shape[:-1], 32) for x in xs] if is_rotated else []
            for name in ("cos", "sin")
        ]
        given = xs, [weights[0], None], *tables, False, EPS, True, None, F32
        torch.library.opcheck(namespace.rms_norm_many_forward.default, given)
        *ys, first, second = namespace.rms_norm_many_forward(*given)
        assert [y.dtype for y in ys] == [F32, F32] and first.shape == (40,) and second.shape == (20,)
        given = dys, xs, [weights[0], None], [first, second], *tables, False, True, None, [True, False]
        torch.library.opcheck(namespace.rms_norm_many_backward.default, given)
        dxs = namespace.rms_norm_many_backward(*given)
        assert [t.shape for t in dxs] == [*case.shapes, (32,)]


@pytest.mark.parametrize("table", [None, "BS"])
def test_fake_tensors_have_the_form_of_real_results(table, kernel_device):
    case = HEADS.alike(table=table)
    tensors, dys = packed(case, kernel_device), gradients_of(case, kernel_device)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t) for name, t in tensors.items()}
    expected, actual = results(case, tensors, dys), results(case, fakes, [mode.from_tensor(dy) for dy in dys])
    for name, e in expected.items():
        a = actual[name]
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def test_tensors_without_data():
    """On the meta device, and with an input for which no kernel is."""
    case = Case()
    ys = call(case, {name: t.to("meta") for name, t in inputs(case).items()})
    assert [y.shape for y in ys] == [*case.shapes] and all(y.is_meta for y in ys)


X, W, TABLE = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(5, 8)
MISTAKES = {
    "no pairs": ({"inputs": []}, ValueError, ("inputs",)),
    "a tensor": ({"inputs": X}, TypeError, ("'inputs'",)),
    "a tensor in place of a pair": ({"inputs": [X]}, TypeError, ("inputs[0]",)),
    "three in a pair": ({"inputs": [(X, W), (X, W, W)]}, TypeError, ("inputs[1]",)),
    "one in a pair": ({"inputs": [(X,)]}, TypeError, ("inputs[0]",)),
    "a number": ({"inputs": 3}, TypeError, ("'inputs'",)),
    "x of a list": ({"inputs": [(X, W), ([1.0], W)]}, TypeError, ("inputs[1]",)),
    "x of integers": ({"inputs": [(X, W), (X.long(), W)]}, NotImplementedError, ("inputs[1]",)),
    "x of truths": ({"inputs": [(X > 0, None)]}, NotImplementedError, ("inputs[0]",)),
    "x without dimensions": ({"inputs": [(torch.tensor(1.0), None)]}, RuntimeError, ("inputs[0]",)),
    "weight of another length": ({"inputs": [(X, W), (X, W[:7])]}, RuntimeError, ("weight", "inputs[1]")),
    "weight of two dimensions": ({"inputs": [(X, W[None])]}, RuntimeError, ("weight", "inputs[0]")),
    "weight of integers": ({"inputs": [(X, W.long())]}, RuntimeError, ("weight", "inputs[0]")),
    "weight of a number": ({"inputs": [(X, 1.0)]}, TypeError, ("weight", "inputs[0]")),
    "weight on another device": ({"inputs": [(X, W), (X, W.to("meta"))]}, RuntimeError, ("weight", "inputs[1]")),
    "eps of a word": ({"eps": "1e-5"}, TypeError, ("eps",)),
    "eps of a tensor with a gradient": ({"eps": [1e-5]}, TypeError, ("eps",)),
    "rotary of one": ({"rotary": (TABLE,)}, TypeError, ("'rotary'",)),
    "rotary of three": ({"rotary": (TABLE,) * 3}, TypeError, ("'rotary'",)),
    "rotary of a tensor": ({"rotary": TABLE}, TypeError, ("'rotary'",)),
    "cos of a list": ({"rotary": ([1.0], TABLE)}, TypeError, ("cos",)),
    "cos of None": ({"rotary": (None, TABLE)}, TypeError, ("cos",)),
    "sin of None": ({"rotary": (TABLE, None)}, TypeError, ("sin",)),
    "cos and sin of None": ({"rotary": (None, None)}, TypeError, ("cos",)),
    "sin of integers": ({"rotary": (TABLE, TABLE.long())}, RuntimeError, ("sin",)),
    "cos of complex numbers": ({"rotary": (TABLE.cfloat(), TABLE)}, RuntimeError, ("cos",)),
    "cos on another device": ({"rotary": (TABLE.to("meta"), TABLE)}, RuntimeError, ("cos",)),
    "sparse cos": ({"rotary": (TABLE.to_sparse(), TABLE)}, RuntimeError, ("cos", "to_dense")),
    "mkldnn sin": ({"rotary": (TABLE, TABLE.to_mkldnn())}, RuntimeError, ("sin", "to_dense")),
    "cos of other positions": ({"rotary": (TABLE[:4], TABLE)}, RuntimeError, ("cos", "inputs[0]", "[5,")),
    "sin of other positions": ({"rotary": (TABLE, TABLE[:1])}, RuntimeError, ("sin", "inputs[0]", "[5,")),
    "cos of an odd width": ({"rotary": (TABLE[:, :7], TABLE[:, :7])}, RuntimeError, ("cos", "even")),
    "cos of no width": ({"rotary": (TABLE[:, :0], TABLE[:, :0])}, RuntimeError, ("cos", "even")),
    "cos wider than x": ({"rotary": (torch.ones(5, 10),) * 2}, RuntimeError, ("cos", "inputs[0]", "8")),
    "cos wider than another x": (
        {"inputs": [(X, W), (X[..., :4], None)], "rotary": (TABLE, TABLE)}, RuntimeError, ("cos", "inputs[1]", "4")
    ),
    "cos and sin of two widths": ({"rotary": (TABLE, TABLE[:, :4])}, RuntimeError, ("cos", "sin", "[5, 8]", "[5, 4]")),
    "cos of other samples": ({"rotary": (torch.ones(3, 5, 8),) * 2}, RuntimeError, ("cos", "inputs[0]", "[2, 5, R]")),
    "cos of four dimensions": ({"rotary": (torch.ones(2, 5, 1, 8),) * 2}, RuntimeError, ("cos", "[2, 5, 1, 8]")),
    "cos of one dimension": ({"rotary": (torch.ones(8),) * 2}, RuntimeError, ("cos", "[8]")),
    "cos of no dimension": ({"rotary": (torch.tensor(1.0),) * 2}, RuntimeError, ("cos", "[]")),
    "samples that are positions": (
        {"rotary": (torch.ones(2, 2, 8),) * 2, "sequence_dim": 0}, RuntimeError, ("cos", "inputs[0]", "[2, R], with")
    ),
    "positions in the columns": (
        {"rotary": (TABLE, TABLE), "sequence_dim": -1}, ValueError, ("sequence_dim", "inputs[0]")
    ),
    "positions beyond": ({"rotary": (TABLE, TABLE), "sequence_dim": 4}, ValueError, ("sequence_dim", "inputs[0]")),
    "positions before": ({"rotary": (TABLE, TABLE), "sequence_dim": -5}, ValueError, ("sequence_dim", "inputs[0]")),
    "too few dimensions": (
        {"inputs": [(X, W), (X[0, :, 0], W)], "rotary": (TABLE, TABLE)}, ValueError, ("sequence_dim", "inputs[1]")
    ),
    "sequence_dim of a word": ({"rotary": (TABLE, TABLE), "sequence_dim": "1"}, TypeError, ("sequence_dim",)),
    "sequence_dim of a float": ({"rotary": (TABLE, TABLE), "sequence_dim": -3.0}, TypeError, ("sequence_dim",)),
    "sequence_dim of a truth": ({"rotary": (TABLE, TABLE), "sequence_dim": True}, TypeError, ("sequence_dim",)),
    "sequence_dim of None": ({"rotary": (TABLE, TABLE), "sequence_dim": None}, TypeError, ("sequence_dim",)),
    "interleaved of a number": ({"interleaved": 1}, TypeError, ("interleaved",)),
    "interleaved of None": ({"interleaved": None}, TypeError, ("interleaved",)),
    "zero_centered of a word": ({"zero_centered": "no"}, TypeError, ("zero_centered",)),
    "zero_centered of None": ({"zero_centered": None}, TypeError, ("zero_centered",)),
    "unknown rounding": ({"rounding": "lama"}, ValueError, ("rounding",)),
    "rounding of None": ({"rounding": None}, ValueError, ("rounding",)),
    "result of integers": ({"out_dtype": torch.int32}, NotImplementedError, ("out_dtype",)),
    "result of a word": ({"out_dtype": "float32"}, TypeError, ("out_dtype",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, device):
    """The message names the operation, the argument and the input, on every backend alike."""
    changes, expected, words = MISTAKES[mistake]

    def there(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(there, value))
        return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value

    given = {name: there(value) for name, value in ({"inputs": [(X, W), (X, None)]} | changes).items()}
    error = error_of(rms_norm_many, given)
    assert type(error) is expected and str(error).startswith("rms_norm_many(): "), repr(error)
    for word in words:
        assert word in str(error), error


@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
def test_a_y_requires_a_gradient_only_where_it_has_one(table, device):
    """As where each norm is a call of its own."""
    case = Case(table=table)
    tensors = inputs(case, device)
    for wanted in ("x0", "weight0", "x1", "weight1"):
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in tensors.items()}
        ys = call(case, leaves)
        assert [y.requires_grad for y in ys] == [str(i) in wanted for i in range(len(ys))]
        ys[int(wanted[-1])].square().sum().backward()
        assert leaves[wanted].grad.any()


def test_arguments_of_a_mistake_are_not_written_to(device):
    """Nothing runs before all arguments are checked."""
    x = torch.randn(2, 5, 3, 8, device=device, requires_grad=True)
    error = error_of(rms_norm_many, {"inputs": [(x, None), (x[..., :3], None), (x, W.to(device)[:3])]})
    assert type(error) is RuntimeError and "inputs[2]" in str(error) and x.grad is None


@pytest.mark.parametrize("traced", [("q",), ("w",), ("cos",), ("q", "k", "cos", "sin")], ids=str)
def test_a_symbolic_trace_has_one_node(traced):
    """Whichever of the tensors is traced; the others may be constants."""
    tensors = {"q": torch.randn(2, 5, 3, 8), "k": torch.randn(2, 5, 1, 8), "w": W, "cos": TABLE, "sin": TABLE.cos()}

    class Call(torch.nn.Module):
        def forward(self, q=None, k=None, w=None, cos=None, sin=None):
            given = {"q": q, "k": k, "w": w, "cos": cos, "sin": sin}
            q, k, w, cos, sin = (given[n] if n in traced else t for n, t in tensors.items())
            ys = rms_norm_many([(q, w), (k, None)], 1e-3, rotary=(cos, sin), interleaved=True)
            return ys[0], ys[1]

    graph = torch.fx.symbolic_trace(Call())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[0] is rms_norm_many and len(targets) == 3
    given = {name: tensors[name] for name in traced}
    assert all(map(torch.equal, graph(**given), Call()(**tensors)))


def test_a_symbolic_trace_of_the_pair_of_tables():
    """Attentions are handed cos and sin as one argument."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = random_module((8, 8))

        def forward(self, q, k, position_embeddings):
            ys = self.norm(q, k, rotary=position_embeddings)
            return ys[0] @ ys[1].mT

    attention, (q, k) = Attention(), torch.randn(2, 2, 5, 3, 8).unbind()
    graph = torch.fx.symbolic_trace(attention)
    assert torch.equal(graph(q, k, (TABLE, TABLE.cos())), attention(q, k, (TABLE, TABLE.cos())))


def test_a_symbolic_trace_of_pairs():
    """A whole pair, and all of them, may be what is traced."""

    def of_a_pair(pair):
        return rms_norm_many([pair, (X, None)])[0]

    def of_all(pairs):
        return rms_norm_many(pairs)[0]

    assert torch.equal(torch.fx.symbolic_trace(of_a_pair)((X, W)), of_a_pair((X, W)))
    assert torch.equal(torch.fx.symbolic_trace(of_all)([(X, W)]), of_all([(X, W)]))


@pytest.mark.slow
@pytest.mark.parametrize("has_rotary", [False, True])
def test_one_pair_is_compiled_in_one_graph(has_rotary, kernel_device, fresh_dynamo):
    """Without a gradient, too, as in evaluation."""
    x, cos, sin = (torch.randn(shape, device=kernel_device) for shape in ((2, 5, 3, 8), (5, 8), (5, 8)))
    rotary = (cos, sin) if has_rotary else None
    module = fastnorm.RMSNormMany((8,), device=kernel_device).requires_grad_(False)
    compiled = torch.compile(lambda x: module(x, rotary=rotary), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x, rotary=rotary))


def test_complex_numbers_go_to_the_formula():
    x = torch.randn(2, 3, 8, dtype=torch.complex64)
    assert torch.equal(rms_norm_many([(x, None)], EPS)[0], rms_norm(x, (8,), eps=EPS))


# modules

EVERYTHING = {"interleaved": True, "sequence_dim": -2, "zero_centered": True, "out_dtype": F64, "rounding": "llama"}


def random_module(*args, **kwargs) -> fastnorm.RMSNormMany:
    module = fastnorm.RMSNormMany(*args, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["defaults", "options"])
def test_the_module_is_the_functional(options, device):
    module = random_module((8, 16), 0.1, **options).to(device)
    q, k = torch.randn(2, 5, 5, 8, device=device), torch.randn(2, 5, 5, 16, device=device)
    rotary = tuple(torch.randn(2, 5, 4, device=device).unbind())
    for given in (None, rotary):
        expected = rms_norm_many(list(zip((q, k), module.weights, strict=True)), 0.1, rotary=given, **options)
        found = module(q, k, rotary=given)
        assert isinstance(found, tuple) and all(map(torch.equal, found, expected))
        assert found[0].dtype == options.get("out_dtype", F32)
    sum(y.sum() for y in module(q, k, rotary=rotary)).backward()
    assert all(weight.grad.any() for weight in module.weights)


def test_modules_are_copied_and_kept():
    module, other = random_module((8, 16), **EVERYTHING), fastnorm.RMSNormMany((8, 16), **EVERYTHING)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 16)
    assert {n: t.shape for n, t in module.state_dict().items()} == {"weights.0": (8,), "weights.1": (16,)}
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, twin(q, k), module(q, k))) and repr(twin) == repr(module)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))


def test_parameters_of_modules():
    module = fastnorm.RMSNormMany((8, 16), device="meta", dtype=BF16)
    assert [(p.shape, p.dtype, p.is_meta) for p in module.parameters()] == [((8,), BF16, True), ((16,), BF16, True)]
    module = module.to_empty(device="cpu").to(F64)
    assert {p.dtype for p in module.parameters()} == {F64}
    for centered, one in ((False, 1.0), (True, 0.0)):
        module = random_module((8, 3), zero_centered=centered)
        module.reset_parameters()
        fresh = fastnorm.RMSNormMany([8, 3], zero_centered=centered)
        for a, b in zip(module.weights, fresh.weights, strict=True):
            assert torch.equal(a, torch.full_like(a, one)) and torch.equal(a, b)
    bare = fastnorm.RMSNormMany((8, 8), elementwise_affine=False)
    bare.reset_parameters()
    assert bare.weights is None and not bare.state_dict() and not list(bare.parameters())
    x = torch.randn(3, 8)
    assert torch.equal(bare(x, x)[1], rms_norm(x, (8,)))


def test_options_are_shown_where_they_are_set():
    assert fastnorm.RMSNormMany((8, 16), 1e-6).extra_repr() == "(8, 16), eps=1e-06"
    shown = fastnorm.RMSNormMany((8,), elementwise_affine=False, **EVERYTHING).extra_repr()
    assert shown == (
        "(8,), eps=None, elementwise_affine=False, interleaved=True, sequence_dim=-2, zero_centered=True, "
        "out_dtype=torch.float64, rounding=llama"
    )


def test_mistakes_of_modules():
    import numpy as np

    assert fastnorm.RMSNormMany(np.array([8, 16]).tolist()).widths == (8, 16)
    for wrong, error in ((8, TypeError), ((), ValueError), ((8, 0), ValueError), ((8, -1), ValueError),
                         ((8.0,), TypeError), ((True,), TypeError), ("88", TypeError), (None, TypeError)):  # fmt: skip
        with pytest.raises(error, match=r"RMSNormMany\(\): .*widths"):
            fastnorm.RMSNormMany(wrong)
    for options, error in (({"rounding": "lama"}, ValueError), ({"out_dtype": torch.int8}, NotImplementedError),
                           ({"interleaved": 1}, TypeError), ({"zero_centered": 0}, TypeError),
                           ({"sequence_dim": 1.0}, TypeError)):  # fmt: skip
        with pytest.raises(error, match=rf"RMSNormMany\(\): .*{next(iter(options))}"):
            fastnorm.RMSNormMany((8,), **options)
    module, x = fastnorm.RMSNormMany((8, 16)), torch.randn(3, 8)
    for given in ((x,), (x, x), (x, x, x), (), (torch.randn(3, 16), x), (torch.tensor(1.0), x)):
        with pytest.raises(RuntimeError, match=r"RMSNormMany\(\): inputs must have the last sizes \[8, 16\], but got"):
            module(*given)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        module(x, [1.0])
    with pytest.raises(TypeError, match="'rotary'"):
        module(x, torch.randn(3, 16), rotary=x)


@pytest.mark.parametrize("name", ["rms_norm_many", "RMSNormMany"])
def test_explain(name):
    assert fastnorm.explain(op=name).backend in backend.BACKENDS
