"""Whole calls of batch_norm and group_norm in C++: the same results as the way through Python."""

from itertools import product

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm.ops import arguments as checks
from helpers.channel_calls import (
    as_leaves,
    assert_both_ways_agree,
    call,
    copied,
    direct,
    everything,
    operations,
    trained,
    variants,
)
from helpers.channel_norms import Case, case_of, inputs
from helpers.norms import DTYPES
from helpers.whole_calls import (
    NATIVE_NAMED,
    NATIVE_ON_CPU,
    TRITON_ON_GPU,
    assert_a_launchers_error_arrives,
    assert_a_profiler_sees,
    assert_same,
    assert_stays_native,
    by_triton,
    is_by_cpp,
    through_python,
    without_triton,
)

pytestmark = pytest.mark.usefixtures("native_named")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = ((5, 8), (3, 8, 7), (2, 8, 5, 3), (2, 8, 3, 4, 5))


@operations
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_give_the_same_bits(op, shape, monkeypatch):
    for dtype, channels_last in product(DTYPES, (False, True)):
        if channels_last and len(shape) < 4:
            continue
        for case in variants(op, shape, dtype):
            case.channels_last = channels_last
            assert_both_ways_agree(case, inputs(case), monkeypatch)


@operations
def test_options_give_the_same_bits(op, monkeypatch):
    changes = [
        {"weight": None}, {"bias": None}, {"weight": None, "bias": None}, {"weight": BF16, "bias": F64},
        {"weight": F64}, {"eps": 0.5},
    ]  # fmt: skip
    if op == "batch_norm":
        changes += [{"running": None}, {"running": F64}, {"running": BF16}, {"running": F16, "weight": BF16}]
    for dtype, change, shape in product((F32, BF16), changes, ((2, 8, 5, 3), (5, 8))):
        for case in variants(op, shape, dtype):
            case = case.alike(**change)
            if case.training or case.running is not None:
                assert_both_ways_agree(case, inputs(case), monkeypatch)
                if case.residual is not None:
                    case.residual = BF16 if dtype == F32 else F32
                    assert_both_ways_agree(case, inputs(case), monkeypatch)


@operations
def test_places_in_memory(op, monkeypatch):
    """Strides of all kinds, and the format of y that follows from them."""
    shape = 2, 8, 5, 3
    wide, deep = torch.zeros(2, 16, 5, 6), torch.zeros(4, 5, 3, 16)
    places = [
        wide[:, 4:12, :, :3], wide[:, ::2, :, ::2], deep[::2, :, :, 3:11].permute(0, 3, 1, 2),
        torch.zeros(5, 3, 8, 2).permute(3, 2, 0, 1), torch.zeros(2, 8, 3, 5).transpose(2, 3),
        torch.zeros(2 * 8 * 5 * 3 + 3)[3:].view(shape), torch.zeros(8, 2, 5, 3).transpose(0, 1),
    ]  # fmt: skip
    for case in variants(op, shape):
        tensors = inputs(case)
        for place in places:
            given = tensors | {"x": place.copy_(tensors["x"])}
            assert_both_ways_agree(case, given, monkeypatch)
            assert call(case, copied(given)).stride() == everything(case, given)[0].stride()
        expanded = {"x": torch.randn(8, 1, 1).expand(shape), "weight": torch.ones(1).expand(8)}
        assert_both_ways_agree(case, tensors | expanded, monkeypatch)
        if case.residual is not None:  # in another format than x, and in the same memory
            other = tensors["residual"].contiguous(memory_format=torch.channels_last)
            assert_both_ways_agree(case, tensors | {"residual": other}, monkeypatch)
            assert_both_ways_agree(case, tensors | {"residual": tensors["x"]}, monkeypatch)
    # dimensions of one element, which fit both formats
    for shape in ((2, 8, 1, 1), (2, 1, 5, 3), (1, 8, 5, 1), (2, 8, 1, 1, 3)):
        for channels_last in (False, True):
            for case in variants(op, shape):
                case.channels_last, case.groups = channels_last, 1
                assert_both_ways_agree(case, inputs(case), monkeypatch)


def test_momentum(monkeypatch):
    """A number, or a tensor of no dimension; the statistics move by both alike."""
    case = case_of("batch_norm", (4, 8, 5))
    tensors, moved = inputs(case), []
    for momentum in (0.0, 1.0, 0.25, torch.tensor(0.25), float("nan")):
        assert_both_ways_agree(case, tensors, monkeypatch, momentum)
        leaves = copied(tensors)
        call(case, leaves, momentum)
        moved.append(leaves["running_var"])
    assert torch.equal(moved[0], tensors["running_var"]) and not torch.equal(moved[1], moved[0])
    assert torch.equal(moved[2], moved[3]) and moved[4].isnan().all()
    case.training = False
    for momentum in (0.25, torch.tensor(0.25)):
        assert_both_ways_agree(case, tensors, monkeypatch, momentum)


@operations
@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
def test_autocast(op, autocast_dtype, monkeypatch):
    """PyTorch has no rule for the norms on the CPU. Where there is one, y is float32."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for rule in (False, True):
            if rule:
                library.impl(op, lambda *a: None, "AutocastCPU")
                monkeypatch.setitem(checks._AUTOCAST_FLOAT32, op, ("cpu",))
            for dtype in DTYPES:
                for case in variants(op, (2, 8, 3), dtype):
                    tensors = inputs(case)
                    with torch.autocast("cpu", autocast_dtype):
                        found = everything(case, tensors)
                        expected = through_python(monkeypatch, lambda c=case, t=tensors: everything(c, t))
                    assert_same(found, expected)
                    is_cast = rule and dtype != F64
                    assert found[0].dtype == (F32 if is_cast else dtype)
                    assert is_by_cpp(found[0]) == (op == "group_norm" or not is_cast)  # batch_norm's Python casts x
                    assert call(case, copied(tensors)).dtype == dtype
    finally:
        library._destroy()


@operations
def test_the_backward_stays_native(op):
    for case in variants(op, (3, 8, 5)):
        y = call(case, as_leaves(inputs(case)))
        assert_stays_native(y.sum().backward)


@operations
def test_a_profiler_sees_the_call(op):
    assert_a_profiler_sees(op, direct, [3, 8, 5])


@operations
def test_only_wanted_gradients_are_computed(op, monkeypatch):
    """Those of the leaves that require one, or of those that are asked for; each with the bits that it has in all."""
    for case in variants(op, (3, 8, 5), BF16):
        tensors = inputs(case)
        leaves = as_leaves(tensors)
        names = [name for name, t in leaves.items() if t.requires_grad]
        y = call(case, leaves)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, trained(leaves), dy, retain_graph=True)
        for name, gradient in zip(names, found, strict=True):
            assert_same(torch.autograd.grad(y, leaves[name], dy, retain_graph=True), [gradient])
            alone = copied(tensors)
            alone[name].requires_grad_()
            call(case, alone).backward(dy)
            assert {n for n, t in alone.items() if t.grad is not None} == {name}
            assert_same([alone[name].grad], [gradient])


@operations
def test_gradients_that_are_not_wanted_are_not_there(op):
    """The function returns none for them: nobody computes what nobody takes."""
    for case in variants(op, (3, 8, 5)):
        leaves = copied(inputs(case))
        leaves["x"].requires_grad_()
        leaves["bias"].requires_grad_()
        y = call(case, leaves)
        returned = []
        y.grad_fn.register_hook(lambda found, dy, r=returned: r.extend(g is not None for g in found))
        y.sum().backward()
        names = ("x", "residual", "weight", "bias") if op == "batch_norm" else ("x", "weight", "bias")
        assert returned == [name in ("x", "bias") for name in names]


def test_the_gradient_of_the_residual(monkeypatch):
    """dy where the ReLU let it pass, in the residual's dtype."""
    for training, dtype, activation in product((True, False), (F32, BF16), (None, "relu")):
        case = case_of("batch_norm", (3, 8, 5), training=training, activation=activation, residual=dtype)
        leaves = as_leaves(inputs(case))
        y = call(case, leaves)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected = dy * (y > 0) if activation else dy
        assert torch.equal(leaves["residual"].grad, expected.to(dtype))
        alone = copied(inputs(case))
        alone["residual"].requires_grad_()
        call(case, alone).backward(dy)
        assert alone["residual"].grad.dtype == dtype and alone["x"].grad is None


@operations
def test_double_backward(op):
    for case in variants(op, (3, 2, 3), F64):
        leaves = as_leaves(inputs(case))
        names = [name for name, t in leaves.items() if t.requires_grad]

        def function(*tensors, case=case, names=names, leaves=leaves):
            given = {n: t.clone() for n, t in leaves.items() if n not in names}
            return call(case, given | dict(zip(names, tensors, strict=True)))

        assert is_by_cpp(function(*trained(leaves)))
        assert torch.autograd.gradgradcheck(function, tuple(trained(leaves)))


@operations
def test_a_graph_of_the_gradients(op, monkeypatch):
    """create_graph: gradients with their dtypes, and what the gradients of the gradients are."""

    def second(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        leaves = as_leaves(tensors)
        y = call(case, leaves)
        dy = torch.randn_like(y).requires_grad_()
        grads = torch.autograd.grad(y, trained(leaves), dy, create_graph=True)
        leaves["dy"] = dy
        total = sum(g.float().square().sum() for g in grads)
        return [*grads, *torch.autograd.grad(total, trained(leaves), allow_unused=True), *leaves.values()]

    for dtype, channels_last in product((F32, BF16, F64), (False, True)):
        for case in variants(op, (2, 8, 5, 3), dtype):
            case.channels_last = channels_last
            tensors = inputs(case)
            found = second(case, tensors)
            assert_same(found, through_python(monkeypatch, lambda c=case, t=tensors: second(c, t)))


@operations
def test_what_was_saved_is_watched(op):
    """In-place writes between forward and backward are found, and hooks see what is saved."""
    for case in variants(op, (3, 8, 5)):
        saved = {"x", "weight"} if case.training else {"x", "weight", "running_mean", "running_var"}
        for name in saved:
            leaves = as_leaves(inputs(case))
            y = call(case, leaves)
            with torch.no_grad():
                leaves[name].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        packed, leaves = [], as_leaves(inputs(case))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, p=packed: p.append(t.shape) or t, lambda t: t):
            y = call(case, leaves)
        assert {leaves["x"].shape, leaves["weight"].shape} <= set(packed)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()


@operations
def test_results_can_be_written_to(op):
    for case in variants(op, (2, 8, 5, 3)):
        leaves = [as_leaves(inputs(case))] * 2
        ys = [call(case, as_leaves(each)) for each in leaves]
        ys[0].mul_(2).relu_()
        assert torch.equal(ys[0], ys[1].mul(2).relu()) and not ys[0]._is_view()
        ys[0].sum().backward()


@operations
def test_an_eps_at_the_edge(op, monkeypatch):
    """0 and NaN where they are no mistake, and a negative one for group_norm."""
    for case in variants(op, (4, 8, 5)):
        tensors = inputs(case)
        for eps in (0.0, float("nan"), -0.2) if op == "group_norm" else (float("nan"),) if case.training else (0.0,):
            assert_both_ways_agree(case.alike(eps=eps), tensors, monkeypatch)


def test_plain_evaluation_is_pytorchs_own_kernel_unless_native_is_named(monkeypatch):
    without_triton(monkeypatch)
    x, mean, var, weight, bias = (torch.randn(s) for s in ((3, 8, 5), 8, 8, 8, 8))
    given = x.requires_grad_(), mean, var.abs(), weight, bias
    batch_norm = fastnorm.functional.batch_norm
    stock = torch.nn.functional.batch_norm(*given)
    with fastnorm.use(None):
        y = batch_norm(*given)
        assert torch.equal(y, stock) and y.grad_fn.name() == stock.grad_fn.name() == "NativeBatchNormBackward0"
        assert_same(*(torch.autograd.grad(each.square().sum(), x) for each in (y, stock)))
        with torch.no_grad():
            assert torch.equal(batch_norm(*given), stock)
        assert batch_norm(x, mean.double(), *given[2:]).dtype == F32  # which stock refuses
        for fused_in in ({"activation": "relu"}, {"residual": x.detach()}):
            assert is_by_cpp(batch_norm(*given, **fused_in))
        assert is_by_cpp(batch_norm(x, None, None, weight, bias, training=True))
    with fastnorm.use("native"):
        y = batch_norm(*given)
        assert y.grad_fn.name() == "BatchNormBackward"
        torch.testing.assert_close(y, stock)


def test_who_computes_a_plain_evaluation():
    """As above, told by the call in C++ itself: NATIVE_NAMED decides, and the dtypes are those that PyTorch's takes."""
    x = torch.randn(3, 8, 5, requires_grad=True)
    narrow, wide = x.detach().bfloat16().requires_grad_(), dict.fromkeys(("weight", "bias"), torch.ones(8))
    wide |= dict.fromkeys(("running_mean", "running_var"), torch.ones(8))
    for served, changes, name in (
        (NATIVE_ON_CPU, {}, "NativeBatchNormBackward0"),
        (NATIVE_ON_CPU | TRITON_ON_GPU, {}, "NativeBatchNormBackward0"),
        (NATIVE_ON_CPU, {"x": narrow} | wide, "NativeBatchNormBackward0"),
        (NATIVE_ON_CPU | NATIVE_NAMED, {}, "BatchNormBackward"),
        (NATIVE_ON_CPU, {"relu": True}, "BatchNormBackward"),
        (NATIVE_ON_CPU, {"residual": torch.randn(3, 8, 5)}, "BatchNormBackward"),
        (NATIVE_ON_CPU, {"training": True}, "BatchNormBackward"),
        (NATIVE_ON_CPU | NATIVE_NAMED, {"weight": torch.ones(8, dtype=F64)}, "BatchNormBackward"),
    ):
        y = direct("batch_norm", served, **{"x": x, "training": False} | changes)
        assert y.grad_fn.name() == name
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        changes = {"training": False, tensor: torch.ones(8, dtype=F64)}
        assert direct("batch_norm", NATIVE_ON_CPU, **changes) is NotImplemented
    for refused in ({"weight": None}, {"bias": torch.ones(8, dtype=BF16)}):
        mixed = {"x": narrow, "training": False} | wide | refused
        assert direct("batch_norm", NATIVE_ON_CPU, **mixed) is NotImplemented


def test_plain_evaluation_is_the_same_both_ways(monkeypatch):
    """Automatic: values, gradients and formats."""
    without_triton(monkeypatch)
    for dtype, shape, channels_last in product(DTYPES, SHAPES, (False, True)):
        same = {"weight": dtype, "bias": dtype, "running": dtype}
        case = case_of("batch_norm", shape, dtype, training=False, channels_last=channels_last, **same)
        mixed = case.alike(weight=F32, bias=F32, running=F32)
        for case in (case, case.alike(weight=None, bias=None), case.alike(bias=None), mixed):  # noqa: B020
            tensors = inputs(case)
            with fastnorm.use(None):
                found = everything(case, tensors)
                assert_same(found, through_python(monkeypatch, lambda c=case, t=tensors: everything(c, t)))


@pytest.mark.slow
@pytest.mark.triton
@operations
def test_both_ways_launch_the_same_kernels(op, monkeypatch):
    """Triton's."""
    device = by_triton(monkeypatch)
    for channels_last in (False, True):
        for case in variants(op, (2, 8, 5, 3), BF16):
            case.channels_last = channels_last
            assert_both_ways_agree(case, inputs(case, device), monkeypatch)
        case = case_of(op, (2, 8, 5, 3), F32, channels_last=channels_last, weight=None, bias=BF16, running=None)
        assert_both_ways_agree(case, inputs(case, device), monkeypatch)
    if op == "batch_norm":
        case = case_of(op, (2, 8, 5), F32)
        assert_both_ways_agree(case, inputs(case, device), monkeypatch, torch.tensor(0.25, device=device))


@pytest.mark.triton
@operations
def test_what_a_launcher_raises(op, monkeypatch):
    """Arrives, from a forward and from a backward, and does no harm to the next call."""
    device = by_triton(monkeypatch)
    case = case_of(op, (2, 8, 5))
    tensors = inputs(case, device)
    leaves = as_leaves(tensors)
    y = call(case, leaves)
    assert_a_launchers_error_arrives(op, lambda: call(case, leaves), y, monkeypatch)
    assert all(t.grad is None for t in trained(leaves))
    assert_both_ways_agree(case, tensors, monkeypatch)
