"""Whole calls of the row norms in C++: the same results as the way through Python, and a plain no to what is not
plain."""

import pytest
import torch

import fastnorm
from fastnorm.backend import ROW_NORMS
from fastnorm.ops import arguments as checks
from helpers.norms import DTYPES, Case, call, inputs, plain_case
from helpers.whole_calls import (
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
)

pytestmark = pytest.mark.usefixtures("native_named")
operations = pytest.mark.parametrize("op", ROW_NORMS)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def direct(op: str, served=NATIVE_ON_CPU, shape=(3, 8), dtype=F32, **changes):
    """A call in C++, all plain but for `changes`."""
    return native.calls[op](served, *positional(op, shape, dtype, **changes))


def positional(op: str, shape=(3, 8), dtype=F32, **changes) -> list:
    case = plain_case(op, shape, dtype)
    given = dict.fromkeys(("x", "residual", "normalized_shape", "weight", "bias")) | inputs(case)
    given |= {"normalized_shape": case.normalized_shape, "eps": 1e-5}
    given |= {"zero_centered": False, "out_dtype": None, "residual_dtype": None, "rounding": "torch"}
    if case.gated:  # last of all
        given |= {"gate": given.pop("gate"), "activation": "silu", "norm_before_gate": True, "group_size": None}
    assert given.keys() >= changes.keys()
    return list((given | changes).values())


def everything(case: Case, tensors) -> list:
    """Outputs and gradients of one call, and its outputs without autograd."""
    torch.manual_seed(2)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = call(case, leaves)
    assert (outputs[1] is leaves["x"]) == ("residual" not in leaves)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.randn_like(output) for output in outputs])
    with torch.no_grad():
        unrecorded = call(case, tensors)
    return [*outputs, *unrecorded, *grads]


def assert_both_ways_agree(case: Case, tensors, monkeypatch) -> None:
    found = everything(case, tensors)
    assert is_by_cpp(found[0])
    expected = through_python(monkeypatch, lambda: everything(case, tensors))
    assert not is_by_cpp(expected[0])
    assert_same(found, expected)


def cases(op: str):
    yield from (plain_case(op, (5, 33), dtype) for dtype in DTYPES)
    yield plain_case(op, (2, 3, 4, 8), BF16, normalized=2)
    yield plain_case(op, (16,), F32)
    yield plain_case(op, (5, 33), F32, weight=None, bias=None)
    mixed = plain_case(op, (2, 5, 32), BF16, weight=F32)
    yield mixed.alike(residual=F32) if mixed.adds else mixed
    if mixed.adds:
        yield plain_case(op, (5, 33), F32, residual=F64)
    if not mixed.centers:
        yield plain_case(op, (5, 33), BF16, eps=None)
    if mixed.gated:
        yield mixed.alike(gate=F32, bias=F16)
        yield plain_case(op, (5, 33), F32, gate=F64, eps=1e-5 if mixed.centers else None)
        yield plain_case(op, (5, 33), BF16, gate=None)


def cases_with_options(op: str):
    options = [{"zero_centered": True}, *({"out_dtype": dtype} for dtype in DTYPES)]
    if not op.endswith("layer_norm"):
        llama = {"rounding": "llama"}
        options += [llama, llama | {"zero_centered": True}, llama | {"out_dtype": F16}]
    if op.startswith("add_"):
        options += [*({"residual_dtype": dtype} for dtype in DTYPES), {"residual_dtype": BF16, "out_dtype": F32}]
    if op.startswith("gated_"):
        options += [{"activation": "sigmoid"}, {"norm_before_gate": False}, {"group_size": 11}]
        options += [{"activation": "sigmoid", "norm_before_gate": False, "group_size": 1}]
        options += [{"norm_before_gate": False, "rounding": "llama"}] * op.endswith("rms_norm")
    for option in options:
        mixed = plain_case(op, (5, 33), BF16, weight=F32, options=option)
        yield from (plain_case(op, (5, 33), F32, options=option), mixed, mixed.alike(weight=None, bias=None))
        if "residual_dtype" in option:
            yield mixed.alike(residual=F64)
            if op == "add_rms_norm":
                yield mixed.alike(eps=None)
        elif mixed.adds:
            yield mixed.alike(residual=None)
    if op.startswith("add_"):
        yield plain_case(op, (5, 33), BF16, residual=None)
        yield plain_case(op, (5, 33), BF16, residual=None, options={"residual_dtype": BF16})


@operations
def test_both_ways_give_the_same_bits(op, monkeypatch):
    for case in cases(op):
        assert_both_ways_agree(case, inputs(case), monkeypatch)


@operations
def test_options_give_the_same_bits(op, monkeypatch):
    for case in cases_with_options(op):
        assert_both_ways_agree(case, inputs(case), monkeypatch)


@operations
def test_rows_that_are_not_adjacent(op, monkeypatch):
    case = plain_case(op, (4, 6, 8), F32)
    tensors = inputs(case)
    for name in {"residual", "gate"} & set(tensors):
        tensors[name] = torch.randn(4, 6, 16)[..., ::2]
    far, shifted = torch.zeros(4, 6, 24), torch.zeros(4 * 6 * 8 + 1)
    places = [
        torch.zeros(6, 4, 8).transpose(0, 1), far[..., 8:16], far[..., ::3], shifted[1:].view(4, 6, 8),
        torch.zeros(8, 4, 6).permute(1, 2, 0),
    ]  # fmt: skip
    for place in places:
        assert_both_ways_agree(case, tensors | {"x": place.copy_(tensors["x"])}, monkeypatch)
    # one row for all, and the weight twice in one place
    tensors["x"], tensors["weight"] = torch.randn(8).expand(4, 6, 8), torch.ones(1).expand(8)
    assert_both_ways_agree(case, tensors, monkeypatch)


@operations
@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
def test_autocast(op, autocast_dtype, monkeypatch):
    """PyTorch has no rule for the norms on the CPU. Where there is one, y is float32."""
    stock = op.removeprefix("add_")
    library = torch.library.Library("aten", "IMPL")
    try:
        for rule in (False, True):
            if rule:
                library.impl(stock, lambda *a: None, "AutocastCPU")
                monkeypatch.setitem(checks._AUTOCAST_FLOAT32, stock, ("cpu",))
            for case in (*cases(op), plain_case(op, (5, 33), BF16, options={"out_dtype": F16})):
                with torch.autocast("cpu", autocast_dtype):
                    assert_both_ways_agree(case, inputs(case), monkeypatch)
                    y, _ = call(case, inputs(case))
                is_cast = rule and case.dtype != F64 and not case.gated
                assert y.dtype == case.options.get("out_dtype", F32 if is_cast else case.dtype)
                assert call(case, inputs(case))[0].dtype == case.options.get("out_dtype", case.dtype)
    finally:
        library._destroy()


@operations
def test_the_backward_stays_native(op):
    case = plain_case(op, (3, 8), F32)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    y, _ = call(case, leaves)
    assert_stays_native(y.sum().backward)


@operations
def test_a_profiler_sees_the_call(op):
    assert_a_profiler_sees(op, direct, [3, 8])


@operations
def test_only_wanted_gradients_are_computed(op):
    case = plain_case(op, (3, 8), F32)
    for wanted in inputs(case):
        leaves = {name: t.requires_grad_(name == wanted) for name, t in inputs(case).items()}
        y, h = call(case, leaves)
        assert y.requires_grad and h.requires_grad == (wanted in ("x", "residual"))
        (y.square().sum() + (h.sum() if h.requires_grad else 0)).backward()
        assert {name for name, t in leaves.items() if t.grad is not None} == {wanted}


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_of_two_outputs_used(op, used, create_graph):
    case = plain_case(op, (3, 8), F64)
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    stream = [leaves["x"], leaves["residual"]]
    found = torch.autograd.grad(call(case, leaves)[used == "h"].square().sum(), stream, create_graph=create_graph)
    with fastnorm.use("reference"):
        expected = torch.autograd.grad(call(case, leaves)[used == "h"].square().sum(), stream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@operations
def test_double_backward(op):
    plain = plain_case(op, (3, 5), F64)
    options = [{}, {"zero_centered": True}]
    options += [{"norm_before_gate": False, "activation": "sigmoid"}] * plain.gated
    for case in (plain.alike(options=option) for option in options):
        leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}

        def function(*tensors, case=case, names=tuple(leaves)):
            y, h = call(case, dict(zip(names, tensors, strict=True)))
            return (y, h) if case.adds else y

        assert is_by_cpp(call(case, leaves)[0])
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@operations
def test_a_graph_of_the_gradients(op, monkeypatch):
    """With options: dtypes of the gradients, and what the gradients of the gradients are."""

    def second(case: Case):
        torch.manual_seed(2)
        leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
        outputs = call(case, leaves)[: 1 + case.adds]
        dys = [torch.randn_like(output) for output in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), dys, create_graph=True)
        return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), leaves["x"])]

    for case in cases_with_options(op):
        found = second(case)
        assert_same(found, through_python(monkeypatch, lambda case=case: second(case)))


@operations
def test_what_was_saved_is_watched(op):
    """In-place writes between forward and backward are found, and hooks see what is saved."""
    case = plain_case(op, (3, 8), F32)
    for name in ("weight", "h"):
        leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
        y, h = call(case, leaves)
        with torch.no_grad():
            (h if name == "h" else leaves["weight"]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    leaves = {name: t.requires_grad_() for name, t in inputs(case).items()}
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y, _ = call(case, leaves)
    assert case.shape in packed
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@operations
def test_results_can_be_written_to(op):
    case = plain_case(op, (2, 3, 8), F32)
    y, _ = call(case, {name: t.requires_grad_() for name, t in inputs(case).items()})
    y.relu_().sum().backward()


@operations
def test_modes_and_transforms_are_declined(op):
    arguments = positional(op)
    assert_declined_where_somebody_looks_on(lambda x: native.calls[op](NATIVE_ON_CPU, x, *arguments[1:]), arguments[0])


@operations
def test_what_is_not_plain_is_declined(op):
    x, adds = torch.randn(3, 8), op.startswith("add_")
    wrong = [{"x": t} for t in tensors_that_are_not_plain(x)]
    wrong += [{"x": torch.empty(0, 8)}, {"x": torch.tensor(1.0)}]
    wrong += [{"normalized_shape": s} for s in (
        8, None, (), [], (3,), (8.0,), (2, 3, 8), (1, 8), (2**70,), (-(2**70),), (True,), ("8",), torch.tensor([8]), "8"
    )]  # fmt: skip
    if op.startswith("gated_"):
        wrong += [{"gate": g} for g in (x[0], x[:2], x.T, *tensors_that_are_not_plain(x)[1:])]
        wrong += [{"activation": a} for a in ("relu", "SiLU", "silu ", "", None, 1, b"silu", torch.sigmoid)]
        wrong += [{"norm_before_gate": n} for n in (1, 0, None, "True", torch.tensor(True))]
        wrong += [{"group_size": g} for g in (0, -4, 3, 16, 2**70, -(2**70), 4.0, True, "4", torch.tensor(4))]
        wrong += [{"residual": torch.ones(3, 8)}]
    parameters = [torch.ones(7), torch.ones(1, 8), torch.ones(8).long(), 1.0, torch.ones(8, device="meta")]
    parameters += [t for t in tensors_that_are_not_plain(torch.ones(8)) if t is not None]
    wrong += [{name: p} for p in parameters for name in ("weight", "bias")]
    wrong += [{"eps": eps} for eps in ("1", x, 1, True, torch.tensor(1e-5))]
    wrong += [{"eps": None}] if op.endswith("layer_norm") else []
    wrong += [{"zero_centered": z} for z in (1, 0, None, "True", torch.tensor(True))]
    wrong += [{"rounding": r} for r in ("", "llama ", "Torch", None, 1, b"torch")]
    others = "float32", float, 7, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2, torch.strided
    wrong += [{name: other} for other in others for name in ("out_dtype", "residual_dtype")]
    if adds:
        wrong += [{"residual": r} for r in (x[0], x[:2], x.T, *tensors_that_are_not_plain(x)[1:])]
        wrong += [{"residual": None, "residual_dtype": F64}]  # h is x in another dtype
    for changes in wrong:
        assert direct(op, **changes) is NotImplemented, changes
    for served in (0, TRITON_ON_GPU, NATIVE_NAMED):
        assert direct(op, served) is NotImplemented
    assert direct(op) is not NotImplemented
    expected = len(positional(op)) + 2
    for count in (0, 1, expected):
        with pytest.raises(TypeError, match=f"takes {expected} arguments"):
            native.calls[op](*range(count))


@operations
def test_what_is_plain_is_not_declined(op):
    """But for these, the list above proves little."""
    plain = [{"normalized_shape": [8]}, {"normalized_shape": (3, 8), "weight": None, "bias": None}, {"weight": None}]
    plain += [{"weight": torch.nn.Parameter(torch.ones(8))}, {"weight": torch.ones(16, dtype=F64)[::2]}]
    plain += [{"eps": eps} for eps in (0.0, -1.0, float("nan"), float("inf"))]
    plain += [{"x": torch.randn(3, 16)[:, ::2]}, {"x": torch.randn(8, 3).T}, {"x": torch.randn(8).expand(3, 8)}]
    plain += [{"zero_centered": True}, {"out_dtype": F64}] + [{"rounding": "llama"}] * op.endswith("rms_norm")
    if op.startswith("add_"):
        plain += [{"residual_dtype": BF16}, {"residual": None}, {"residual": None, "residual_dtype": F32}]
    if op.startswith("gated_"):
        plain += [{"gate": None}, {"gate": torch.randn(3, 8).to(BF16)}, {"gate": torch.randn(3, 16)[:, 8:]}]
        plain += [{"activation": "sigmoid"}, {"norm_before_gate": False}]
        plain += [{"group_size": g} for g in (1, 4, 8)] + [{"gate": None, "group_size": 2}]
    for changes in plain:
        for served in (NATIVE_ON_CPU, NATIVE_ON_CPU | NATIVE_NAMED, NATIVE_ON_CPU | TRITON_ON_GPU):
            assert direct(op, served, **changes) is not NotImplemented, changes


@operations
def test_no_references_are_kept(op):
    mistakes = [{"normalized_shape": (2**70,)}, {"rounding": "up"}, {"out_dtype": torch.int32}, {"eps": "1"}]
    mistakes = [[NATIVE_ON_CPU, *positional(op, **changes)] for changes in mistakes]
    for changes in ({}, {"residual": None, "out_dtype": F64}):
        arguments = positional(op, x=torch.randn(3, 8, requires_grad=True), **changes)
        assert_keeps_no_references(native.calls[op], [NATIVE_ON_CPU, *arguments], mistakes)


@operations
def test_mistakes_are_explained(op):
    """What C++ declines is not lost."""
    for options, error in (({"rounding": "up"}, ValueError), ({"out_dtype": torch.int32}, NotImplementedError)):
        if "rounding" not in options or op.endswith("rms_norm"):
            case = plain_case(op, (3, 8), F32, options=options)
            with pytest.raises(error, match=rf"{op}\(\): {next(iter(options))} must be"):
                call(case, inputs(case))


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_a_stream_that_starts_in_another_dtype(op):
    """h is x, converted: Python serves this."""
    case = plain_case(op, (3, 8), F32, residual=None, options={"residual_dtype": F64})
    y, h = call(case, inputs(case))
    assert y.dtype == F32 and h.dtype == F64


@operations
@pytest.mark.parametrize("eps", [-0.5, -1e4, float("nan")])
def test_an_eps_that_is_not_positive(op, eps, monkeypatch):
    """NaN where stock has it, forwards and backwards, by both ways."""
    case = plain_case(op, (6, 8), F64, eps=eps)
    tensors = inputs(case)
    for name in {"x", "residual"} & set(tensors):
        tensors[name] *= torch.tensor([0.1, 0.1, 9, 9, 9, 9], dtype=F64).view(-1, 1)  # var + eps is negative, or large
    found = everything(case, tensors)
    assert found[0][:2].isnan().all() and found[0][2:].isfinite().all() == (eps == -0.5)
    assert_same(found, through_python(monkeypatch, lambda: everything(case, tensors)))
    with fastnorm.use("reference"):
        torch.testing.assert_close(found, everything(case, tensors), equal_nan=True)


@operations
def test_who_is_asked_for_a_whole_call(op, monkeypatch):
    assert_asks_the_right_one(op, positional(op), monkeypatch)


@pytest.mark.triton
@operations
def test_both_ways_launch_the_same_kernels(op, monkeypatch):
    """Triton's."""
    device = by_triton(monkeypatch)
    options = [{"zero_centered": True, "out_dtype": F32}] + [{"rounding": "llama"}] * op.endswith("rms_norm")
    if op.startswith("gated_"):
        options += [{"activation": "sigmoid", "norm_before_gate": False, "group_size": 11}]
    changes = [{}, {"weight": None, "bias": None}, *({"options": each} for each in options)]
    for change in changes:
        case = plain_case(op, (3, 33), BF16, **change)
        assert_both_ways_agree(case, inputs(case, device), monkeypatch)
    if case.adds:
        case = plain_case(op, (3, 33), BF16, residual=F32, options={"residual_dtype": BF16})
        assert_both_ways_agree(case, inputs(case, device), monkeypatch)
        assert_both_ways_agree(case := plain_case(op, (3, 33), F32, residual=None), inputs(case, device), monkeypatch)


@pytest.mark.triton
@operations
def test_what_a_launcher_raises(op, monkeypatch):
    """Arrives, from a forward and from a backward, and does no harm to the next call."""
    device = by_triton(monkeypatch)
    case = plain_case(op, (3, 33), F32)
    leaves = {name: t.requires_grad_() for name, t in inputs(case, device).items()}
    y, _ = call(case, leaves)
    assert_a_launchers_error_arrives("row_norm", lambda: call(case, leaves), y, monkeypatch)
    assert all(t.grad is None for t in leaves.values())
    assert_both_ways_agree(case, leaves, monkeypatch)
