"""Whole calls of batch_norm and group_norm in C++: the same results as the way through Python, and a plain no to what
is not plain."""

from itertools import product

import pytest
import torch
from channel_norms import MOMENTUM, Case, case_of, fused, inputs
from norms import DTYPES
from torch import Tensor
from whole_calls import (
    NATIVE_NAMED,
    NATIVE_ON_CPU,
    TRITON_ON_GPU,
    assert_a_launchers_error_arrives,
    assert_a_profiler_sees,
    assert_asks_the_right_one,
    assert_declined_where_somebody_looks_on,
    assert_keeps_no_references,
    assert_same,
    assert_stays_native,
    by_triton,
    is_by_cpp,
    native,
    tensors_that_are_not_plain,
    through_python,
    without_triton,
)

import fastnorm
from fastnorm.ops import arguments as checks

OPS = ("batch_norm", "group_norm")
operations = pytest.mark.parametrize("op", OPS)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = ((5, 8), (3, 8, 7), (2, 8, 5, 3), (2, 8, 3, 4, 5))


@pytest.fixture(autouse=True)
def named():
    with fastnorm.use("native"):
        yield


def direct(op: str, served=NATIVE_ON_CPU | NATIVE_NAMED, **changes):
    """A call in C++, all plain but for `changes`."""
    return native.calls[op](served, *positional(op, **changes))


def positional(op: str, **changes) -> list:
    given = inputs(case_of(op, (3, 8, 5)))
    if op == "batch_norm":
        names = "x", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "residual", "relu"
        given |= {"training": True, "momentum": MOMENTUM, "eps": 1e-5, "residual": None, "relu": False}
    else:
        names = "x", "num_groups", "weight", "bias", "eps", "silu"
        given |= {"num_groups": 2, "eps": 1e-5, "silu": False}
    assert given.keys() >= changes.keys()
    return [(given | changes)[name] for name in names]


def call(case: Case, tensors: dict[str, Tensor], momentum=MOMENTUM) -> Tensor:
    affine = tensors.get("weight"), tensors.get("bias")
    if not case.is_batch_norm:
        return fastnorm.functional.group_norm(tensors["x"], case.groups, *affine, case.eps, activation=case.activation)
    running = tensors.get("running_mean"), tensors.get("running_var")
    return fastnorm.functional.batch_norm(
        tensors["x"], *running, *affine, case.training, momentum, case.eps,
        residual=tensors.get("residual"), activation=case.activation,
    )  # fmt: skip


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With running statistics of its own, which a call changes."""
    return {n: t.clone() if n.startswith("running") else t.detach() for n, t in tensors.items()}


def as_leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t if n.startswith("running") else t.requires_grad_() for n, t in copied(tensors).items()}


def trained(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in leaves.values() if t.requires_grad]


def everything(case: Case, tensors: dict[str, Tensor], momentum=MOMENTUM) -> list[Tensor]:
    """The output, gradients for three dy, running statistics; and the output without autograd, with its own."""
    torch.manual_seed(2)
    leaves, unrecorded = as_leaves(tensors), copied(tensors)
    y = call(case, leaves, momentum)
    with torch.no_grad():
        found = [y, call(case, unrecorded, momentum)]
    for dy in (torch.randn_like(y), torch.randn(y.shape[::-1]).to(y).permute(*range(y.dim())[::-1]), y.new_ones(1)):
        found += torch.autograd.grad(y, trained(leaves), dy.expand(y.shape), retain_graph=True)
    return [*found, *(t for each in (leaves, unrecorded) for n, t in each.items() if n.startswith("running"))]


def assert_both_ways_agree(case: Case, tensors: dict[str, Tensor], monkeypatch, momentum=MOMENTUM) -> None:
    found = everything(case, tensors, momentum)
    assert is_by_cpp(found[0])
    expected = through_python(monkeypatch, lambda: everything(case, tensors, momentum))
    assert not is_by_cpp(expected[0])
    assert_same(found, expected)


def variants(op: str, shape: tuple[int, ...], dtype: torch.dtype = F32):
    """Plain and with all that is fused, in training and in evaluation."""
    plain = case_of(op, shape, dtype, groups=2 if op == "group_norm" and shape[2:] else 1)
    yield from (plain, fused(plain))
    if plain.is_batch_norm:
        yield from (plain.alike(training=False), fused(plain).alike(training=False))
        yield from (plain.alike(activation="relu"), plain.alike(residual=dtype))
        yield plain.alike(activation="relu", training=False)


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
def test_modes_and_transforms_are_declined(op):
    x, *others = positional(op)
    assert_declined_where_somebody_looks_on(lambda x: native.calls[op](NATIVE_ON_CPU, x, *others), x)


def what_is_not_plain(op: str):
    x, c = torch.randn(3, 8, 5), torch.ones(8)
    yield from ({"x": t} for t in tensors_that_are_not_plain(x))
    yield from ({"x": t} for t in (torch.tensor(1.0), x[0, :, 0], x[:0], x[..., :0], x[:, :0], x[:, :7]))
    vectors = [torch.ones(n) for n in (7, 9, 1, 0)] + [torch.tensor(1.0), torch.ones(1, 8), torch.ones(8, 1), x]
    vectors += [t for t in tensors_that_are_not_plain(c) if t is not None]
    names = ("weight", "bias", *("running_mean", "running_var") * (op == "batch_norm"))
    yield from ({name: v} for v in vectors for name in names)
    yield from ({"eps": eps} for eps in ("1", None, 1, True, torch.tensor(1e-5), torch.ones(1)))
    activation = "relu" if op == "batch_norm" else "silu"
    yield from ({activation: value} for value in (None, 0, 1, activation, torch.tensor(True)))
    if op == "group_norm":
        yield from ({"num_groups": n} for n in (
            0, -1, -2, 3, 16, 2**31, 2**63, 2**70, -(2**70), True, 2.0, "2", None, torch.tensor(2)
        ))  # fmt: skip
        yield {"x": torch.randn(1, 8), "num_groups": 8}  # one value a group
        yield {"x": torch.randn(3, 8, 1), "num_groups": 8}
        return
    yield from ({"residual": t} for t in tensors_that_are_not_plain(x)[1:])
    yield from ({"residual": t} for t in (x[0], x[:2], x.transpose(1, 2), x[..., None], x.double()))
    yield from ({"training": value} for value in (None, 0, 1, "True", torch.tensor(True)))
    yield from ({"momentum": value} for value in (
        None, "0.1", 1, True, torch.tensor(1), torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=BF16),
        torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), torch.tensor(0.1, device="meta"),
    ))  # fmt: skip
    yield from ({"eps": eps} for eps in (0.0, -0.0, -1e-5))
    yield from ({"eps": eps, "training": False} for eps in (-1e-5, float("nan")))
    yield from ({"x": t} for t in (torch.randn(1, 8), torch.randn(1, 8, 1, 1)))  # one value a channel
    for training in (False, True):
        yield from ({name: None, "training": training} for name in ("running_mean", "running_var"))
        for name in ("running_mean", "running_var"):
            yield {name: torch.ones(8, requires_grad=True), "training": training}
            yield {name: torch.ones(16)[::2], "training": training}
            yield {name: torch.ones(1).expand(8), "training": training}
    yield {"running_mean": None, "running_var": None, "training": False}


@operations
def test_what_is_not_plain_is_declined(op):
    """Without a trace: running statistics stay as they are."""
    x, *others = positional(op)
    before = [t.clone() if isinstance(t, Tensor) else t for t in others]
    names = ["num_groups", "weight", "bias", "eps", "silu"]
    if op == "batch_norm":
        names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "residual", "relu"]
    for changes in what_is_not_plain(op):
        given = dict(zip(("x", *names), (x, *others), strict=True)) | changes
        assert native.calls[op](NATIVE_ON_CPU, *given.values()) is NotImplemented, changes
    for served in (0, TRITON_ON_GPU, NATIVE_NAMED):
        assert direct(op, served) is NotImplemented
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True) if isinstance(a, Tensor))
    assert direct(op) is not NotImplemented
    for count in (0, 1, 6, 12):
        with pytest.raises(TypeError, match="arguments, but got"):
            native.calls[op](*range(count))


@operations
def test_what_is_plain_is_not_declined(op):
    """But for these, the list above proves little."""
    x = torch.randn(3, 8, 5)
    plain = [{"weight": None}, {"bias": None}, {"weight": torch.nn.Parameter(torch.ones(8))}, {"x": x[:1]}]
    plain += [{"weight": torch.ones(16, dtype=F64)[::2]}, {"x": x.transpose(0, 2)[:, :, :3]}, {"x": x[..., 0]}]
    plain += [{"eps": eps} for eps in (1e-12, 1.0, float("inf"))]
    if op == "group_norm":
        plain += [{"silu": True}, {"eps": -1.0}, {"eps": float("nan")}, *({"num_groups": n} for n in (1, 2, 4, 8))]
    else:
        plain += [{"relu": True}, {"training": False}, {"training": False, "eps": 0.0}, {"eps": float("nan")}]
        plain += [{"running_mean": None, "running_var": None}, {"running_mean": torch.ones(9, dtype=BF16)[1:]}]
        plain += [{"residual": x}, {"residual": x.bfloat16()}, {"x": x.double(), "residual": x}]
        plain += [{"x": x[:1, ..., 0], "training": False}, {"momentum": torch.tensor(0.5)}, {"momentum": -3.0}]
    for changes in plain:
        for served in (NATIVE_ON_CPU | NATIVE_NAMED, NATIVE_ON_CPU | NATIVE_NAMED | TRITON_ON_GPU):
            assert direct(op, served, **changes) is not NotImplemented, changes


@operations
def test_no_references_are_kept(op):
    mistakes = [{"eps": "1"}, {"weight": torch.ones(7)}]
    mistakes += [{"momentum": "1"}] if op == "batch_norm" else [{"num_groups": 2**70}]
    mistakes = [[NATIVE_ON_CPU, *positional(op, **changes)] for changes in mistakes]
    for changes in ({}, {"relu" if op == "batch_norm" else "silu": True}):
        arguments = positional(op, x=torch.randn(3, 8, 5, requires_grad=True), **changes)
        assert_keeps_no_references(native.calls[op], [NATIVE_ON_CPU, *arguments], mistakes)


@operations
def test_an_eps_at_the_edge(op, monkeypatch):
    """0 and NaN where they are no mistake, and a negative one for group_norm."""
    for case in variants(op, (4, 8, 5)):
        tensors = inputs(case)
        for eps in (0.0, float("nan"), -0.2) if op == "group_norm" else (float("nan"),) if case.training else (0.0,):
            assert_both_ways_agree(case.alike(eps=eps), tensors, monkeypatch)


@operations
def test_who_is_asked_for_a_whole_call(op, monkeypatch):
    assert_asks_the_right_one(op, positional(op), monkeypatch)


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
    """As above, told by the call in C++ itself: NATIVE_NAMED decides, and one dtype is a condition of PyTorch's."""
    x = torch.randn(3, 8, 5, requires_grad=True)
    for served, changes, name in (
        (NATIVE_ON_CPU, {}, "NativeBatchNormBackward0"),
        (NATIVE_ON_CPU | TRITON_ON_GPU, {}, "NativeBatchNormBackward0"),
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


def test_plain_evaluation_is_the_same_both_ways(monkeypatch):
    """Automatic: values, gradients and formats."""
    without_triton(monkeypatch)
    for dtype, shape, channels_last in product(DTYPES, SHAPES, (False, True)):
        same = {"weight": dtype, "bias": dtype, "running": dtype}
        case = case_of("batch_norm", shape, dtype, training=False, channels_last=channels_last, **same)
        for case in (case, case.alike(weight=None, bias=None), case.alike(bias=None)):  # noqa: B020
            tensors = inputs(case)
            with fastnorm.use(None):
                found = everything(case, tensors)
                assert_same(found, through_python(monkeypatch, lambda c=case, t=tensors: everything(c, t)))


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
