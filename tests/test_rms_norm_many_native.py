"""RMSNorm of several inputs with rotary embeddings in the compiled backend: the operators, and the whole call."""

from types import SimpleNamespace

import pytest
import torch

import fastnorm
from fastnorm import backend, reference
from helpers.norms import DTYPES
from helpers.whole_calls import (
    NATIVE_ON_CPU,
    TRITON_ON_CPU,
    assert_a_profiler_sees,
    assert_declined_where_somebody_looks_on,
    assert_keeps_no_references,
    assert_same,
    assert_stays_native,
    by_triton,
    is_by_cpp,
    native,
    tensors_that_are_not_plain,
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def random(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(dtype)


def partners(r, interleaved):
    """Of each rotated column the partner, and the sign of its product with sin."""
    j = torch.arange(r)
    if interleaved:
        return j ^ 1, 2 * (j % 2) - 1
    return (j + r // 2) % r, torch.where(j < r // 2, -1, 1)


def rotated(z, cos, sin, interleaved):
    if cos is None:
        return z
    r = cos.shape[-1]
    partner, sign = partners(r, interleaved)
    first = z[..., :r] * cos.to(z.dtype) + sign * z[..., partner] * sin.to(z.dtype)
    return torch.cat([first, z[..., r:]], -1)


def rotated_back(dy, cos, sin, interleaved):
    """The gradient of z."""
    z = torch.zeros_like(dy, requires_grad=True)
    return torch.autograd.grad(rotated(z, cos, sin, interleaved), z, dy)[0]


def sizes(turn, values, cos, sin, interleaved):
    """The sums of the absolute values of what `rotated` or `rotated_back` adds."""
    if cos is None:
        return values.abs()
    positive = sin.abs() * partners(sin.shape[-1], interleaved)[1]
    return turn(values.abs(), cos.abs(), positive, interleaved)


def make(*shapes, rotary_dim=None, dtype=F32, factors=None, weights="same", sequence_dim=1, interleaved=False,
         zero_centered=False, cast=None, out=None, own_rows=False):  # fmt: skip
    """The tensors and options of a call. factors: the dtype of cos and sin; rotary_dim 0 is no rotation. weights: their
    dtype, or None. own_rows: cos and sin differ for every row; else they are expanded from one table."""
    rotary_dim = shapes[0][-1] // 2 * 2 if rotary_dim is None else rotary_dim
    xs = [random(*shape, dtype=dtype) for shape in shapes]
    weight_dtype = dtype if weights == "same" else weights
    weights = [None if weight_dtype is None else random(x.shape[-1], dtype=weight_dtype) for x in xs]
    cos, sin, table = [], [], None
    if rotary_dim:
        factors = factors or dtype
        table = [random(shapes[0][sequence_dim], rotary_dim, dtype=factors) for _ in range(2)]
        for x in xs:
            leading = [1] * (x.dim() - 1)
            leading[sequence_dim] = -1
            views = [t.view(*leading, rotary_dim).expand(*x.shape[:-1], rotary_dim) for t in table]
            if own_rows:
                views = [random(*view.shape, dtype=factors) for view in views]
            cos.append(views[0])
            sin.append(views[1])
    out = out or dtype
    dys = [random(*shape, dtype=out) for shape in shapes]
    return SimpleNamespace(
        xs=xs, weights=weights, cos=cos, sin=sin, table=table, interleaved=interleaved, zero_centered=zero_centered,
        cast=cast, out=out, dys=dys, sequence_dim=sequence_dim,
    )  # fmt: skip


def run(c):
    """ys, rstds, dxs and dweights of the operators; None without a weight."""
    found = native.rms_norm_many_forward(
        c.xs, c.weights, c.cos, c.sin, c.interleaved, 1e-5, c.zero_centered, c.cast, c.out
    )
    ys, rstds = found[: len(c.xs)], found[len(c.xs) :]
    wanted = [w is not None for w in c.weights]
    options = c.interleaved, c.zero_centered, c.cast, wanted
    gradients = native.rms_norm_many_backward(c.dys, c.xs, c.weights, rstds, c.cos, c.sin, *options)
    dweights = iter(gradients[len(c.xs) :])
    assert len(gradients) == len(c.xs) + sum(wanted)
    return ys, rstds, gradients[: len(c.xs)], [next(dweights) if is_wanted else None for is_wanted in wanted]


def flat(results):
    return [tensor for tensors in results for tensor in tensors]


def assert_rounded_once(found, exact, size, computed, steps):
    """To half a unit of its dtype, beside `steps` roundings in the dtype computed in, of terms of this size."""
    assert found.shape == exact.shape and found.is_contiguous()
    unit = 0.0 if found.dtype == computed else torch.finfo(found.dtype).eps / 2
    tiny = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    allowed = unit * exact.abs() * 1.001 + steps * torch.finfo(computed).eps * size + tiny
    error = (found.double() - exact).abs()
    assert (error <= allowed).all(), (error / allowed).max()


def check(c):
    """Every result against the formula in float64, from the rstd that the kernels have rounded."""
    computed = F64 if c.xs[0].dtype == F64 else F32
    for i, (y, rstd, dx, dweight) in enumerate(zip(*run(c), strict=True)):
        x, weight = c.xs[i], c.weights[i]
        cos, sin = (c.cos[i].double(), c.sin[i].double()) if c.cos else (None, None)
        exact_rstd = (x.double().square().mean(-1) + 1e-5).rsqrt()
        assert rstd.dtype == computed and rstd.shape == (x[..., 0].numel(),)
        rstd = rstd.view(exact_rstd.shape)
        torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2 * torch.finfo(computed).eps, atol=0)
        x_hat = x.to(computed) * rstd.unsqueeze(-1)
        exact_x_hat = x.double() * rstd.double().unsqueeze(-1)
        cast_x_hat = exact_x_hat if c.cast is None else x_hat.to(c.cast).double()
        w = (1.0 if weight is None else weight.double()) + c.zero_centered
        z, terms = cast_x_hat * w, len(x.shape)
        assert y.dtype == c.out
        size = sizes(rotated, z, cos, sin, c.interleaved)
        assert_rounded_once(y, rotated(z, cos, sin, c.interleaved), size, computed, 4)

        dy = c.dys[i].double()
        dz = rotated_back(dy, cos, sin, c.interleaved)
        size = sizes(rotated_back, dy, cos, sin, c.interleaved)
        c1, c1_size = ((exact_x_hat.abs() * t).mean(-1, True) for t in ((exact_x_hat.sign() * dz * w), size * abs(w)))
        scale = rstd.double().unsqueeze(-1)
        exact = (dz * w - exact_x_hat * c1) * scale
        assert dx.dtype == x.dtype
        assert_rounded_once(dx, exact, (size * abs(w) + exact_x_hat.abs() * c1_size) * scale, computed, 8)
        if weight is not None:
            assert dweight.dtype == weight.dtype
            rows = tuple(range(terms - 1))
            size = (size * cast_x_hat.abs()).sum(rows)
            # no more than 64 rows are added in the dtype computed in
            assert_rounded_once(dweight, (dz * cast_x_hat).sum(rows), size, computed, 66)
        else:
            assert dweight is None


QK = (2, 5, 4, 64), (2, 5, 1, 64)
CASES = {
    **{str(dtype): {"shapes": QK, "dtype": dtype} for dtype in DTYPES},
    **{f"{dtype} with {factors} factors": {"shapes": QK, "dtype": dtype, "factors": factors}
       for dtype, factors in ((BF16, F32), (BF16, F64), (F16, BF16), (F32, BF16), (F32, F16), (F32, F64), (F64, F32))},
    "float32 weights": {"shapes": QK, "dtype": BF16, "factors": F32, "weights": F32},
    "no weights": {"shapes": QK, "dtype": BF16, "weights": None},
    "fewer columns rotated": {"shapes": QK, "rotary_dim": 16},
    "two columns rotated": {"shapes": QK, "rotary_dim": 2, "dtype": BF16},
    "no rotation": {"shapes": QK, "rotary_dim": 0, "dtype": BF16},
    "zero-centered": {"shapes": QK, "zero_centered": True, "dtype": BF16},
    "x̂ rounded": {"shapes": QK, "cast": BF16, "dtype": BF16, "weights": F32, "out": F32},
    "x̂ rounded, zero-centered": {"shapes": QK, "cast": F16, "dtype": F16, "zero_centered": True, "factors": F32},
    "float32 y": {"shapes": QK, "dtype": BF16, "out": F32, "factors": F32},
    "bfloat16 y": {"shapes": QK, "out": BF16},
    "heads first": {"shapes": ((2, 4, 5, 64), (2, 2, 5, 64)), "sequence_dim": 2, "dtype": BF16, "factors": F32},
    "rows of their own": {"shapes": QK, "dtype": BF16, "factors": F32, "own_rows": True},
    "other columns": {"shapes": ((2, 5, 4, 64), (2, 5, 37), (1, 5, 3, 3, 2, 70)), "rotary_dim": 34, "dtype": F16},
    "four levels of rows": {"shapes": ((2, 3, 5, 2, 3, 10),), "sequence_dim": 2, "dtype": BF16, "factors": F32},
    "one row": {"shapes": ((1, 64),), "sequence_dim": 0},
    "two columns": {"shapes": ((3, 2),), "sequence_dim": 0},
    "many rows": {"shapes": ((2, 300, 2, 48), (2, 300, 1, 48)), "dtype": BF16, "weights": F32},
    "many columns": {"shapes": ((2, 3, 5002),), "rotary_dim": 2500, "dtype": BF16, "weights": F32},
}  # fmt: skip


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, interleaved):
    case = dict(case)
    check(make(*case.pop("shapes"), **case, interleaved=interleaved))


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_every_vector_tail(dtype, interleaved):
    for cols in (*range(2, 36), 63, 65, 127, 129, 130):
        rotary_dims = range(2, cols + 1, 2) if cols < 36 else (2, cols // 3 // 2 * 2, cols // 2 * 2)
        for rotary_dim in rotary_dims:
            check(make((2, cols), rotary_dim=rotary_dim, sequence_dim=0, dtype=dtype, interleaved=interleaved))


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_columns_beside_the_rotated_ones_are_the_plain_norms(dtype, interleaved):
    """And none of them is written by the last vector of another part."""
    c = make((4, 7, 40), rotary_dim=18, dtype=dtype, interleaved=interleaved)
    ys, *_ = run(c)
    plain = native.rms_norm_many_forward(c.xs, c.weights, [], [], False, 1e-5, False, None, dtype)[0]
    assert torch.equal(ys[0][..., 18:], plain[..., 18:])


@layouts
def test_inputs_are_read_at_any_strides(interleaved):
    """q and k as chunks of one tensor, transposed, with columns that are not adjacent; and so cos and sin."""
    c = make((2, 5, 4, 32), (2, 5, 2, 32), dtype=BF16, factors=F32, interleaved=interleaved)
    expected = flat(run(c))
    qkv = torch.cat([*c.xs, c.xs[1]], 2)
    c.xs = list(qkv.split((4, 2, 2), 2)[:2])
    assert_same(flat(run(c)), expected)
    c.xs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in c.xs]
    c.dys = [torch.stack([dy, dy], -1)[..., 0] for dy in c.dys]
    assert_same(flat(run(c)), expected)
    c.cos, c.sin = ([t.contiguous() for t in factors] for factors in (c.cos, c.sin))
    assert_same(flat(run(c)), expected)
    c.cos = [torch.stack([t, t], -1)[..., 0] for t in c.cos]
    c.sin = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in c.sin]
    c.xs = [torch.stack([x, x], -1)[..., 1] for x in c.xs]
    assert_same(flat(run(c)), expected)


@layouts
@pytest.mark.parametrize("factors", [F32, BF16], ids=str)
def test_the_number_of_threads_changes_nothing(threads, factors, interleaved):
    c = make((2, 70, 8, 64), (2, 70, 2, 64), factors=factors, interleaved=interleaved)
    threads(1)
    expected = flat(run(c))
    for count in (2, 3, 7):
        threads(count)
        assert_same(flat(run(c)), expected)


@layouts
def test_results_depend_on_no_other_input_and_no_other_row(interleaved):
    c = make((2, 40, 4, 64), (2, 40, 2, 64), dtype=BF16, factors=F32, weights=F32, interleaved=interleaved)
    together = run(c)
    lists = "xs", "weights", "cos", "sin", "dys"
    for i in range(2):
        alone = SimpleNamespace(**vars(c) | {name: getattr(c, name)[i : i + 1] for name in lists})
        assert_same(flat(run(alone)), [results[i] for results in together])
    per_row = [name for name in lists if name != "weights"]
    part = SimpleNamespace(**vars(c) | {name: [t[1:, 7:9] for t in getattr(c, name)] for name in per_row})
    ys, _, dxs, _ = run(part)
    own = [t[1:, 7:9].clone(memory_format=torch.contiguous_format) for t in (*together[0], *together[2])]
    assert_same([*ys, *dxs], own)


def test_empty_inputs():
    c = make((2, 5, 0, 64), (0, 5, 1, 64))
    ys, rstds, dxs, dweights = run(c)
    assert [t.shape for t in ys] == [t.shape for t in dxs] == [x.shape for x in c.xs]
    assert not any(t.numel() for t in rstds) and not any(t.count_nonzero() for t in dweights)


def forward_arguments(c):
    return [c.xs, c.weights, c.cos, c.sin, c.interleaved, 1e-5, c.zero_centered, c.cast, c.out]


@pytest.mark.parametrize("name", ["torch.bfloat16", "no weights", "no rotation"])
def test_operators_keep_to_their_schemas(name):
    case = dict(CASES[name])
    c = make(*case.pop("shapes"), **case)
    torch.library.opcheck(torch.ops.fastnorm.rms_norm_many_forward.default, forward_arguments(c))
    _, rstds, *_ = run(c)
    wanted = [w is not None and i == 1 for i, w in enumerate(c.weights)]
    backward = c.dys, c.xs, c.weights, rstds, c.cos, c.sin, c.interleaved, c.zero_centered, c.cast, wanted
    torch.library.opcheck(torch.ops.fastnorm.rms_norm_many_backward.default, backward)
    assert isinstance(native.rms_norm_many_backward(*backward), list)


def test_wrong_arguments_raise():
    c = make((2, 5, 4, 8), (2, 5, 1, 8))
    wide = random(2, 5, 4, 10)
    for place, value, message in (
        (0, [c.xs[0], c.xs[1].double()], "inputs of one dtype, got Float and Double"),
        (0, c.xs[:1], "expected 1 weights, one for each input, got 2"),
        (0, [c.xs[0].int(), c.xs[1].int()], "float32, bfloat16"),
        (1, c.weights[:1], "expected 2 weights"),
        (1, [c.weights[0][:7], None], r"weight of shape \[8\], got \[7\]"),
        (2, [], "expected 2 cos, one for each input, got 0"),
        (3, c.sin[:1], "expected 2 sin, one for each input, got 1"),
        (2, [c.cos[0][:1], c.cos[1]], r"cos of shape \[2, 5, 4, 8\], got \[1, 5, 4, 8\]"),
        (2, [c.cos[0][0], c.cos[1]], r"cos of shape \[2, 5, 4, 8\], got \[5, 4, 8\]"),
        (2, [c.cos[0][..., :7], c.cos[1]], "cos with an even number of columns, at most 8, got"),
        (2, [c.cos[0][..., :0], c.cos[1]], "cos with an even number of columns, at most 8, got"),
        (2, [wide, c.cos[1]], "cos with an even number of columns, at most 8, got"),
        (2, [torch.ones(()), c.cos[1]], "cos with an even number of columns, at most 8, got"),
        (3, [c.sin[0][..., :6], c.sin[1]], r"sin of shape \[2, 5, 4, 8\], got \[2, 5, 4, 6\]"),
        (3, [c.sin[0].int(), c.sin[1]], "float32, bfloat16"),
        (0, [torch.ones(()), c.xs[1]], "x with elements in its last 1 dimensions"),
    ):  # fmt: skip
        arguments = forward_arguments(c)
        arguments[place] = value
        with pytest.raises((RuntimeError, TypeError), match=message):
            native.rms_norm_many_forward(*arguments)
    _, rstds, *_ = run(c)
    given = [c.dys, c.xs, c.weights, rstds, c.cos, c.sin, False, False, None, [True, True]]
    for place, value, message in (
        (0, c.dys[:1], "expected 2 grads"),
        (0, [c.dys[0][:1], c.dys[1]], "dy of shape"),
        (2, [None, c.weights[1]], "a weight where its gradient is wanted"),
        (3, rstds[:1], "expected 2 rstds"),
        (3, [rstds[0][1:], rstds[1]], "rstd of shape"),
        (3, [rstds[0].double(), rstds[1]], "rstd in Float, got Double"),
        (4, [c.cos[0][..., :6], c.cos[1]], r"sin of shape \[2, 5, 4, 6\]"),
        (5, [], "expected 2 sin"),
        (9, [True], "expected 2 wants_dweight"),
    ):
        arguments = [*given]
        arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            native.rms_norm_many_backward(*arguments)


# The whole call, with autograd


def direct(c, served=NATIVE_ON_CPU, **changes):
    cos, sin = c.table or (None, None)
    given = {"inputs": list(zip(c.xs, c.weights, strict=True)), "cos": cos, "sin": sin}
    given |= {"sequence_dim": c.sequence_dim, "interleaved": c.interleaved, "eps": 1e-5}
    given |= {"zero_centered": c.zero_centered, "out_dtype": None if c.cast else c.out}
    given |= {"rounding": "llama" if c.cast else "torch"}
    assert given.keys() >= changes.keys()
    return native.calls["rms_norm_many"](served, *(given | changes).values())


def leaves_of(c):
    return [t.requires_grad_() for pair in zip(c.xs, c.weights, strict=True) for t in pair if t is not None]


def gradients_of(results):
    """dxs and dweights in the order of the leaves."""
    return [t for pair in zip(*results[2:], strict=True) for t in pair if t is not None]


@layouts
@pytest.mark.parametrize(
    "name", [*map(str, DTYPES), "no weights", "fewer columns rotated", "no rotation", "zero-centered", "x̂ rounded",
             "float32 y", "heads first", "one row"],
)  # fmt: skip
def test_whole_calls_are_the_operators(name, interleaved):
    case = dict(CASES[name])
    c = make(*case.pop("shapes"), **case, interleaved=interleaved)
    expected = run(c)
    with torch.no_grad():
        ys = direct(c)
        assert isinstance(ys, tuple)
        assert_same(ys, expected[0])
    assert_same(direct(c), expected[0])
    leaves = leaves_of(c)
    ys = direct(c)
    assert all(map(is_by_cpp, ys)) and len({y.grad_fn for y in ys}) == 1
    assert_same([y.detach() for y in ys], expected[0])
    assert_same(torch.autograd.grad(ys, leaves, c.dys), gradients_of(expected))


def test_factors_of_each_sample():
    """(B, S, r), (1, S, r) and (S, r); rows of a longer table, and a sequence dimension from the end."""
    c = make((3, 5, 4, 16), (3, 5, 16), own_rows=True)
    cos, sin = random(3, 5, 8), random(3, 9, 16)[:, 4:, ::2]
    c.cos = [cos.unsqueeze(2).expand(3, 5, 4, 8), cos]
    c.sin = [sin.unsqueeze(2).expand(3, 5, 4, 8), sin]
    expected = run(c)
    leaves = leaves_of(c)
    ys = direct(c, cos=cos, sin=sin)
    assert_same([y.detach() for y in ys], expected[0])
    assert_same(torch.autograd.grad(ys, leaves, c.dys), gradients_of(expected))
    c.cos, c.sin = ([t[:1].expand_as(t) for t in factors] for factors in (c.cos, c.sin))
    expected = run(c)[0]
    for factors in ((cos[:1], sin[:1]), (cos[0], sin[0])):
        assert_same([y.detach() for y in direct(c, cos=factors[0], sin=factors[1])], expected)
    from_the_end = direct(c, inputs=[(c.xs[0], c.weights[0])], cos=cos[:1], sin=sin[:1], sequence_dim=-3)
    assert_same([y.detach() for y in from_the_end], expected[:1])


def test_outputs_that_are_not_used():
    """Their inputs get no gradients, and are left out of the backward."""
    c = make(*QK, (2, 5, 2, 64))
    expected = run(c)
    leaves = leaves_of(c)
    ys = direct(c)
    found = torch.autograd.grad([ys[0], ys[2]], leaves, [c.dys[0], c.dys[2]], allow_unused=True)
    assert found[2] is found[3] is None
    assert_same([*found[:2], *found[4:]], [t for i in (0, 2) for t in (expected[2][i], expected[3][i])])


def test_only_wanted_gradients_are_computed():
    c = make(*QK)
    expected = run(c)
    c.weights[0].requires_grad_()
    c.xs[1].requires_grad_()
    ys = direct(c)
    found = torch.autograd.grad(ys, [c.weights[0], c.xs[1]], c.dys)
    assert_same(found, [expected[3][0], expected[2][1]])


@layouts
@pytest.mark.parametrize("rotary_dim", [0, 4, 6])
def test_double_backward_goes_through_the_formula(rotary_dim, interleaved):
    c = make((2, 3, 2, 6), (2, 3, 6), rotary_dim=rotary_dim, dtype=F64, interleaved=interleaved, zero_centered=True)
    c.weights[1] = None
    leaves = leaves_of(c)

    def function(q, weight, k):
        return direct(c, inputs=[(q, weight), [k, None]])

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_the_formula_is_asked_with_lists(monkeypatch):
    """Pairs of inputs, gradients with None for outputs that are not used, factors of the inputs' shapes."""
    c = make(*QK, dtype=BF16, cast=BF16, weights=F32, out=F32, zero_centered=True)
    leaves, asked = leaves_of(c), []

    def formula(inputs, dys, *options):
        asked.append((inputs, dys, *options))
        return [None if t is None else torch.full_like(t, 7.0) for t in inputs]

    monkeypatch.setattr(reference, "rms_norm_many_gradients", formula, raising=False)
    ys = direct(c)
    found = torch.autograd.grad(ys[1], leaves, c.dys[1], create_graph=True, allow_unused=True)
    [(inputs, dys, cos, sin, *options)] = asked
    assert all((a == 7).all() for a in found) and options == [False, 1e-5, True, BF16]
    assert_same(inputs, [t for pair in zip(c.xs, c.weights, strict=True) for t in pair])
    assert dys[0] is None and torch.equal(dys[1], c.dys[1])
    for ours, theirs in ((cos, c.cos), (sin, c.sin)):
        assert [t.shape for t in ours] == [t.shape for t in theirs] and all(map(torch.equal, ours, theirs))


def test_defaults_of_dtypes_and_eps():
    c = make(*QK, dtype=BF16, weights=F32)
    for changes, dtype in (
        ({"out_dtype": None}, BF16), ({"out_dtype": F16}, F16), ({"out_dtype": None, "rounding": "llama"}, F32),
        ({"out_dtype": F64, "rounding": "llama"}, F64),
    ):  # fmt: skip
        assert {y.dtype for y in direct(c, **changes)} == {dtype}
    assert_same(direct(c, eps=None), direct(c, eps=torch.finfo(F32).eps))
    double = make(*QK, dtype=F64)
    assert_same(direct(double, eps=None), direct(double, eps=torch.finfo(F64).eps))
    mixed = [(c.xs[0], c.weights[0]), (c.xs[1], c.weights[1].bfloat16())]
    assert direct(c, inputs=mixed) is not NotImplemented
    assert direct(c, inputs=mixed, out_dtype=None, rounding="llama") is NotImplemented
    assert direct(c, inputs=mixed, out_dtype=F32, rounding="llama") is not NotImplemented


def test_autocast_makes_y_float32_where_it_has_a_rule():
    c = make(*QK, dtype=BF16)
    library = torch.library.Library("aten", "IMPL")
    try:
        for dtype in (BF16, F32):
            with torch.autocast("cpu", BF16):
                assert {y.dtype for y in direct(c, out_dtype=None)} == {dtype}
                assert {y.dtype for y in direct(c, out_dtype=BF16)} == {BF16}
            if dtype == BF16:
                library.impl("rms_norm", lambda *a: None, "AutocastCPU")
    finally:
        library._destroy()


def test_calls_that_are_wrong_or_not_plain_are_declined():
    c = make((2, 5, 4, 8), (2, 5, 1, 8))
    (q, k), (wq, wk), (cos, sin) = c.xs, c.weights, c.table
    assert direct(c) is not NotImplemented
    inputs = [
        (), [], None, q, [q, k], [(q,)], [(q, wq, wk)], {q: wq}, [(q, wq), None], [(q, wq[:7])], [(q, wq.unsqueeze(0))],
        [(q, wq), (k.double(), wk)], [(q, wq), (k[:0], wk)], [(q[..., 0, 0], None)], [(torch.ones(()), None)],
        [(q, wq.to("meta"))], [(q, wq), (k.to("meta"), None)], iter([(q, wq)]), [(q, 1.0)], [(wq, wq)],
    ]  # fmt: skip
    changes = [{"inputs": each} for each in inputs] + [{"cos": each} for each in tensors_that_are_not_plain(cos)]
    changes += [{"inputs": [(each, None)]} for each in tensors_that_are_not_plain(q)]
    changes += [
        {"sin": None}, {"cos": None}, {"sin": sin[:, :6]}, {"cos": cos[:4], "sin": sin[:4]},
        {"cos": cos[:, :7], "sin": sin[:, :7]}, {"cos": cos[:, :0], "sin": sin[:, :0]}, {"cos": cos[0], "sin": sin[0]},
        {"cos": random(5, 10), "sin": random(5, 10)}, {"cos": random(3, 5, 8), "sin": random(3, 5, 8)},
        {"cos": random(2, 5, 1, 8), "sin": random(2, 5, 1, 8)}, {"cos": cos.clone().requires_grad_()},
        {"sin": sin.clone().requires_grad_()}, {"sin": sin.to("meta")},
        {"sequence_dim": 0}, {"sequence_dim": 2}, {"sequence_dim": 3}, {"sequence_dim": -1}, {"sequence_dim": 4},
        {"sequence_dim": -5}, {"sequence_dim": 2**70}, {"sequence_dim": 1.0}, {"sequence_dim": None},
        {"interleaved": 1}, {"eps": 1}, {"zero_centered": None}, {"out_dtype": torch.int32}, {"out_dtype": "float32"},
        {"rounding": "hf"}, {"rounding": None},
        # the sequence can't be the dimension of the samples
        {"inputs": [(q.transpose(0, 1), wq)], "cos": random(1, 5, 8), "sin": random(1, 5, 8), "sequence_dim": 0},
    ]  # fmt: skip
    for change in changes:
        assert direct(c, **change) is NotImplemented, change
    assert direct(c, served=0) is NotImplemented
    assert direct(c, cos=None, sin=None) is not NotImplemented
    assert direct(c, cos=None, sin=None, sequence_dim=None) is NotImplemented
    assert_declined_where_somebody_looks_on(lambda x: direct(c, inputs=[(x, wq)]), q)
    with pytest.raises(TypeError, match="takes 10 arguments, but got 3"):
        native.calls["rms_norm_many"](1, 2, 3)


def test_a_call_keeps_no_references():
    c = make(*QK)
    leaves_of(c)
    inputs = [(c.xs[0], c.weights[0]), (c.xs[1], c.weights[1])]
    arguments = [NATIVE_ON_CPU, inputs, *c.table, 1, False, 1e-5, False, None, "torch"]
    mistakes = [[*arguments[:place], wrong, *arguments[place + 1 :]] for place, wrong in ((1, None), (4, 3), (9, "hf"))]
    assert_keeps_no_references(native.calls["rms_norm_many"], arguments, mistakes)


def test_a_profiler_sees_the_call():
    c = make(*QK)
    assert_a_profiler_sees("rms_norm_many", lambda op: direct(c, inputs=[(c.xs[0], None)]), list(c.xs[0].shape))


def test_the_backward_stays_native():
    c = make(*QK)
    leaves_of(c)
    ys = direct(c)
    assert_stays_native((ys[0].sum() + ys[1].sum()).backward)


def test_a_factor_that_was_changed_since_is_noticed():
    c = make(*QK)
    leaves_of(c)
    ys = direct(c)
    c.table[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].sum().backward()


def test_a_monitor_hears_the_statistics():
    c = make(*QK)
    leaves_of(c)
    native.listen()
    direct(c)
    size, mean, rstd, eps = native.heard()
    assert (size, mean, eps) == (c.xs[1].numel(), None, 1e-5)
    assert_same([rstd], run(c)[1][1:])


def test_a_named_backend_is_asked(monkeypatch):
    c = make(*QK)
    arguments = list(zip(c.xs, c.weights, strict=True)), *c.table, 1, False, 1e-5, False, None, "torch"
    with fastnorm.use("native"):
        assert_same(backend.call_directly("rms_norm_many", *arguments), run(c)[0])
    with fastnorm.use("reference"):
        assert backend.call_directly("rms_norm_many", *arguments) is NotImplemented


def test_triton_is_called_with_lists(monkeypatch):
    """Forward and backward, which leaves out what is not used; by launchers that here compute with native kernels."""
    by_triton(monkeypatch)
    asked = []
    for name in ("rms_norm_many_forward", "rms_norm_many_backward"):

        def launcher(*arguments, name=name):
            asked.append((name, *arguments))
            return getattr(native, name)(*arguments)

        monkeypatch.setattr(backend._triton, name, launcher)
    c = make(*QK, (2, 5, 2, 64), zero_centered=True)
    c.weights[0] = None
    expected = run(c)
    leaves = leaves_of(c)
    ys = direct(c, served=TRITON_ON_CPU)
    assert_same([y.detach() for y in ys], expected[0])
    [(name, inputs, weights, cos, sin, *options)] = asked
    assert name == "rms_norm_many_forward" and options == [False, 1e-5, True, None, F32]
    assert all(type(given) is list and len(given) == 3 for given in (inputs, weights, cos, sin)) and weights[0] is None
    assert [t.stride() for t in (*cos, *sin)] == [(0, 64, 0, 1)] * 6
    asked.clear()
    found = torch.autograd.grad([ys[0], ys[2]], leaves, [c.dys[0], c.dys[2]], allow_unused=True)
    assert_same([found[0], *found[3:]], [expected[2][0], expected[2][2], expected[3][2]])
    [(name, grads, _, weights, rstds, *_, wants_dweight)] = asked
    assert name == "rms_norm_many_backward" and wants_dweight == [False, True]
    assert len(grads) == len(rstds) == len(weights) == 2
    asked.clear()
    direct(c, served=TRITON_ON_CPU, cos=None, sin=None)
    assert asked[0][3:5] == ([], [])
