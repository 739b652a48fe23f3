"""RMSNorm of several inputs in one call, and a rotary embedding behind it: values and gradients, views, batches.

test_rms_norm_many_calls.py has what autograd, torch.compile and other callers see, wrong arguments and the module.
"""

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import backend
from fastnorm.functional import rms_norm, rms_norm_many
from helpers.many_norms import (
    BF16,
    EPS,
    F16,
    F32,
    F64,
    HEADS,
    PLACES,
    ROTATIONS,
    Case,
    call,
    check,
    formula,
    gradients_of,
    inputs,
    layouts,
    of_layout,
    packed,
    results,
    rotate,
    tables,
)

DTYPES = (F32, BF16, F16, F64)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name, device):
    case = Case(**ROTATIONS[name])
    check(case, inputs(case, device))


@pytest.mark.parametrize("name", PLACES)
def test_places_of_positions(name, device):
    case = Case(**PLACES[name])
    check(case, inputs(case, device))


PLAIN = {
    "latents": dict(shapes=((2, 3, 1536), (2, 3, 512))),
    "odd widths": dict(shapes=((3, 33), (5, 257), (2, 1))),
    "one column": dict(shapes=((5, 1), (3, 1))),
    "one row": dict(shapes=((1, 257), (1, 24))),
    "other numbers of rows": dict(shapes=((70, 24), (2, 3, 24), (1, 24))),
    "many blocks": dict(shapes=((130, 40), (3, 1160)), dtype=BF16),
    "a vector": dict(shapes=((40,), (24,))),
    "one input": dict(shapes=((4, 72),)),
    "three inputs": dict(shapes=((4, 72), (3, 16), (2, 128)), weight=None),
    "zero_centered": dict(options={"zero_centered": True}),
    "bfloat16": dict(dtype=BF16, weight=BF16),
    "float64 results": dict(dtype=BF16, options={"out_dtype": F64}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_rotation(name, device):
    case = Case(table=None).alike(**PLAIN[name])
    check(case, inputs(case, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight, cos, sin", [(None, None, None), (F32, BF16, F32), (F64, F64, F16), (BF16, F32, BF16)],
                         ids=str)  # fmt: skip
def test_dtypes(dtype, weight, cos, sin, device):
    """Of x, the weights, cos and sin: all alike, or each its own."""
    case = Case(dtype=dtype, weight=weight or dtype, cos=cos or dtype, sin=sin or dtype)
    found = check(case, inputs(case, device))
    assert found["y0"].dtype == dtype


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_out_dtype(dtype, out_dtype, device):
    case = Case(dtype=dtype, weight=F32, options={"out_dtype": out_dtype, "interleaved": True})
    assert check(case, inputs(case, device))["y1"].dtype == out_dtype


@pytest.mark.parametrize("changes", [
    dict(dtype=BF16, weight=BF16), dict(dtype=BF16, weight=F32), dict(dtype=F16, weight=None),
    dict(dtype=BF16, weight=F32, options={"out_dtype": BF16, "zero_centered": True}), dict(dtype=BF16, table=None),
], ids=str)  # fmt: skip
def test_llama_rounding(changes, device):
    """x̂ is rounded to x's dtype before the weight; the result has the promoted dtype."""
    case = Case(rotary_dim=8).alike(**changes)
    case = case.alike(options=case.options | {"rounding": "llama"})
    found = check(case, inputs(case, device))
    promoted = torch.promote_types(case.dtype, case.weight or case.dtype)
    assert found["y0"].dtype == case.options.get("out_dtype", promoted)


def test_llama_rounding_rounds_before_the_weight(device):
    case = Case(dtype=BF16, shapes=((2, 5, 4, 64),), options={"rounding": "llama"})
    tensors = inputs(case, device)
    exact = [formula(case.alike(options=o), {n: t.double() for n, t in tensors.items()})[0] for o in (case.options, {})]
    (y,) = call(case, tensors)
    errors = [(y.double() - e).abs().mean() for e in exact]
    assert y.dtype == F32 and errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("std", [1e-3, 300.0])
def test_small_and_large_values(std, device):
    """Beside eps, and far from it; rows of zeros stay zeros."""
    case = Case(shapes=((1, 4, 2, 64), (1, 4, 1, 64)), rotary_dim=32)
    tensors = {name: t * std if name[0] == "x" else t for name, t in inputs(case, device).items()}
    tensors["x0"][0, 1] = 0
    found = check(case, tensors)
    assert not found["y0"][0, 1].any()


def test_no_angle_is_the_norm_alone(device):
    case = Case(dtype=BF16, weight=BF16)
    tensors = inputs(case, device)
    tensors |= {"cos": torch.ones_like(tensors["cos"]), "sin": torch.zeros_like(tensors["sin"])}
    dys = gradients_of(case, device)
    turned = results(case, tensors, dys)
    still = results(case.alike(table=None), {n: t for n, t in tensors.items() if n not in ("cos", "sin")}, dys)
    for name, right in still.items():
        torch.testing.assert_close(turned[name], right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_angle_is_taken_off_again(interleaved, device):
    """A rotation by an angle and then, without a norm's effect, by its negative; lengths stay."""
    angles = torch.rand(5, 8, dtype=F64, device=device) * 6
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
    x = torch.randn(2, 5, 3, 16, dtype=F64, device=device)
    (y,) = rms_norm_many([(x, None)], 1e-30, rotary=(angles.cos(), angles.sin()), interleaved=interleaved)
    (back,) = rms_norm_many([(y, None)], 1e-30, rotary=(angles.cos(), -angles.sin()), interleaved=interleaved)
    torch.testing.assert_close(back, F.rms_norm(x, (16,), eps=1e-30))
    torch.testing.assert_close(y.square().sum(-1), back.square().sum(-1))
    assert not torch.allclose(y, back)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("is_kernelized", [False, True], ids=["(B, H, S, D)", "(B, S, H, D)"])
def test_as_in_models(dtype, is_kernelized, device):
    """Qwen3's attention up to its product: norms of q and k, then the rotation by halves of transposed heads, which
    models round to the activations' dtype in between."""
    batch, positions, heads, kv_heads, width = 2, 7, 4, 2, 32
    frequencies = 1e4 ** (-torch.arange(0, width, 2, dtype=F64) / width)
    angles = torch.arange(positions, dtype=F64)[:, None] * frequencies
    cos, sin = (
        torch.cat((t, t), -1)[None].expand(batch, -1, -1).to(device).to(dtype) for t in (angles.cos(), angles.sin())
    )
    q, k = (torch.randn(batch, positions, n, width).to(device).to(dtype) for n in (heads, kv_heads))
    weights = [torch.randn(width).to(device).to(dtype) for _ in range(2)]

    def eager(x, weight):
        x = F.rms_norm(x, (width,), weight, EPS).transpose(1, 2)
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    if is_kernelized:
        ys = rms_norm_many(list(zip((q, k), weights, strict=True)), EPS, rotary=(cos, sin))
        ys = [y.transpose(1, 2) for y in ys]
    else:
        transposed = [t.transpose(1, 2) for t in (q, k)]
        ys = rms_norm_many(list(zip(transposed, weights, strict=True)), EPS, rotary=(cos, sin), sequence_dim=-2)
    tolerance = 1e-5 if dtype == F32 else 4e-2  # three roundings of theirs
    for y, x, weight in zip(ys, (q, k), weights, strict=True):
        torch.testing.assert_close(y, eager(x, weight), rtol=tolerance, atol=tolerance)
        exact = [t.double() for t in (x, weight, cos, sin)]
        right = rotate(Case(), F.rms_norm(exact[0], (width,), exact[1], EPS), *exact[2:]).transpose(1, 2)
        errors = [(t.double() - right).abs().max() for t in (y, eager(x, weight))]
        assert errors[0] <= errors[1] or dtype == F32


@layouts
@tables
def test_views_of_a_packed_projection(is_transposed, table, device):
    """Right values; with the kernels, the same bits as of contiguous copies; nothing is written to."""
    case = HEADS.alike(table=table)
    case, tensors = of_layout(is_transposed, packed(case, device), case)
    copies = {name: t.contiguous() for name, t in tensors.items()}
    dys = gradients_of(case, device)
    views = [dy.transpose(1, 2).contiguous().transpose(1, 2) for dy in dys]
    found = check(case, tensors, views)
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())
    if fastnorm.explain(tensors["x0"], case.op).backend != "reference":
        for name, right in results(case, copies, dys).items():
            assert torch.equal(found[name], right), name
            assert found[name].is_contiguous()


@pytest.mark.skipif(backend._native is None, reason="looks into the compiled operators")
@layouts
@tables
def test_nothing_is_copied(is_transposed, table):
    """Neither heads nor tables, forward and backward."""
    case, tensors = of_layout(is_transposed, packed(HEADS.alike(table=table), "cpu"), HEADS.alike(table=table))
    dys = gradients_of(case, "cpu")
    with fastnorm.use("native"), torch.profiler.profile() as profile:
        results(case, tensors, dys)
    assert not {event.key for event in profile.key_averages()} & {"aten::clone", "aten::copy_", "aten::contiguous"}


@pytest.mark.triton
@layouts
@tables
def test_the_kernels_get_the_views_themselves(is_transposed, table, triton_device, monkeypatch):
    """Their addresses; cos and sin in the memory that they have."""
    from fastnorm.triton_kernels import rms_norm_many as module

    case, tensors = of_layout(is_transposed, packed(HEADS.alike(table=table), triton_device), HEADS.alike(table=table))
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments)

    for direction in ("forward", "backward"):
        monkeypatch.setattr(module, f"_rms_norm_many_{direction}_kernel", Recorder())
    monkeypatch.setattr(backend, "call_directly", lambda *arguments: NotImplemented)
    monkeypatch.setattr(backend, "pick", lambda op, x: backend._triton)  # not its plans, which give it other memory
    dys = [torch.zeros(t.shape, dtype=BF16, device=triton_device) for n, t in tensors.items() if n[0] == "x"]
    results(case, tensors, dys)
    assert len(launched) == 2
    for i in range(2):  # arguments are tuples with one tensor for each input
        f, b = ([of_inputs[i] for of_inputs in arguments[:5]] for arguments in launched)
        names = f"x{i}", f"weight{i}", "cos", "sin"
        places = [tensors[name].data_ptr() for name in names]
        assert [t.data_ptr() for t in f[:4]] == places
        assert [t.data_ptr() for t in b[1:5]] == places and b[0].data_ptr() == dys[i].data_ptr()
        assert all(t.untyped_storage().nbytes() == tensors[n].nbytes for n, t in zip(names[2:], f[2:4], strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (2, 2, 3, 5, 16)])
def test_strides_of_many_levels(shape, device):
    """Views that no kernel reads in place come out right all the same; and columns that are not adjacent."""
    case = Case(shapes=(shape, shape), table="BS")
    tensors = inputs(case, device)
    order = [*range(len(shape) - 2, -1, -1), len(shape) - 1]
    tensors["x0"] = tensors["x0"].permute(order).contiguous().permute(order)
    tensors["x1"] = tensors["x1"].mT.contiguous().mT
    tensors["cos"] = tensors["cos"].mT.contiguous().mT
    tensors["sin"] = torch.cat([tensors["sin"]] * 2, -1)[..., :16]
    tensors["weight0"] = tensors["weight0"].repeat_interleave(2)[::2]
    check(case, tensors)


def test_one_head_for_all(device):
    """An expanded x, rows that lie on one another; and dys that are expanded, as of a sum."""
    case = Case()
    tensors = inputs(case, device)
    tensors["x0"] = tensors["x0"][:, :, :1].expand(case.shapes[0])
    dys = [torch.ones((), device=device).expand(shape) for shape in case.shapes]
    check(case, tensors, dys)


def test_tables_of_other_strides(device):
    """Halves of one table, and positions taken out of a longer one."""
    case = Case(table="BS", options={"interleaved": True})
    tensors = inputs(case, device)
    longer = torch.randn(2, 9, 32, device=device)
    tensors["cos"], tensors["sin"] = longer[:, 2:7].chunk(2, -1)
    check(case, tensors)
    check(case.alike(table="S"), tensors | {"cos": longer[0, ::2, :16], "sin": longer[1, ::2, 16:]})


@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
@pytest.mark.parametrize("first", [BF16, F64], ids=str)
def test_inputs_of_several_dtypes(table, first, device):
    """Each is computed by itself, and has its own dtype."""
    case = Case(table=table)
    tensors = inputs(case, device)
    tensors["x0"] = tensors["x0"].to(first)
    dys = [torch.randn(shape, device=device).to(t) for shape, t in zip(case.shapes, (first, F32), strict=True)]
    found = results(case, tensors, dys)
    assert (found["y0"].dtype, found["y1"].dtype) == (first, F32)
    for i, name in enumerate(("x0", "x1")):
        alone = {f"{n}0": tensors[f"{n}{i}"] for n in ("x", "weight")}
        alone |= {n: tensors[n] for n in ("cos", "sin") if n in tensors}
        right = results(case.alike(shapes=(case.shapes[i],)), alone, [dys[i]])
        for part in ("y", "dx", "dweight"):
            assert torch.equal(found[f"{part}{i}"], right[f"{part}0"]), name


def test_weights_of_several_dtypes(device):
    """With "llama", each y has the promoted dtype of its own weight."""
    case = Case(dtype=BF16)
    tensors = inputs(case, device)
    tensors["weight0"] = tensors["weight0"].to(BF16)
    found = check(case, tensors)
    assert (found["dweight0"].dtype, found["dweight1"].dtype) == (BF16, F32)
    ys = call(case, tensors, rounding="llama")
    assert [y.dtype for y in ys] == [BF16, F32]
    pairs = [(tensors[f"x{i}"], tensors[f"weight{i}"]) for i in range(2)]
    for y, pair in zip(ys, pairs, strict=True):
        alone = rms_norm_many([pair], EPS, rotary=(tensors["cos"], tensors["sin"]), rounding="llama")
        assert torch.equal(y, alone[0])


@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
def test_some_weights_are_left_out(table, device):
    case = Case(table=table, dtype=BF16)
    tensors = inputs(case, device)
    del tensors["weight0"]
    found = check(case, tensors)
    assert "dweight0" not in found and found["dweight1"].any()


@pytest.mark.parametrize("shapes", [((2, 0, 4, 16), (2, 0, 1, 16)), ((0, 5, 4, 16), (0, 5, 1, 16)),
                                    ((2, 5, 0, 16), (2, 5, 1, 16))], ids=str)  # fmt: skip
@pytest.mark.parametrize("table", [None, "S", "BS"])
def test_no_rows(shapes, table, device):
    """Of all inputs, or of one: the gradients of its weight are zeros."""
    case = Case(shapes=shapes, table=table)
    tensors = inputs(case, device)
    found = results(case, tensors, [torch.randn(shape, device=device) for shape in shapes])
    assert found["y0"].shape == shapes[0] and found["dx0"].shape == shapes[0]
    assert found["dweight0"].shape == (16,) and not found["dweight0"].any()
    if 0 not in shapes[1]:
        alone = {f"{n}0": tensors[f"{n}1"] for n in ("x", "weight")} | {n: tensors[n] for n in ("cos", "sin") if table}
        (right,) = call(case.alike(shapes=shapes[1:]), alone)
        assert torch.equal(found["y1"], right) and found["dweight1"].any()


def test_no_columns(device):
    x = torch.randn(3, 0, device=device, requires_grad=True)
    ys = rms_norm_many([(x, None), (x, torch.ones(0, device=device))])
    assert [y.shape for y in ys] == [(3, 0), (3, 0)]
    assert torch.autograd.grad(ys[0].sum(), x)[0].shape == (3, 0)


def wide(rows: int, table: str | None) -> Case:
    """33,000 columns don't fit in registers."""
    return Case(shapes=((1, rows, 1, 33000), (1, rows, 1, 64)), table=table, rotary_dim=64)


def test_long_rows(kernel_device):
    case = wide(3, None)
    check(case, inputs(case, kernel_device))


@pytest.mark.triton
def test_long_rows_are_not_rotated_by_triton(triton_device):
    case = wide(2, "S")
    with pytest.raises(RuntimeError, match=r'33000 columns are too long .* rotary .*fastnorm\.use\("reference"\)'):
        call(case, inputs(case, triton_device))
    with fastnorm.use("reference"):
        check(case, inputs(case, triton_device))


# widths whose tilings differ in rows a program and in warps
BATCHES = {
    "heads": Case(shapes=((3, 9, 4, 128), (3, 9, 2, 128)), dtype=BF16, weight=BF16, table="BS"),
    "interleaved": Case(shapes=((3, 9, 4, 64), (3, 9, 2, 64)), options={"interleaved": True}, table="BS"),
    "latents": Case(shapes=((3, 11, 1536), (3, 11, 512)), dtype=BF16, table=None),
    "narrow and wide": Case(shapes=((3, 40, 32), (3, 2, 3000)), table=None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_row_does_not_depend_on_the_batch_nor_on_other_inputs(name, kernel_device):
    """Its y and dx are bitwise the same alone, in any batch, and beside whatever other inputs."""
    case = BATCHES[name]
    tensors, dys = inputs(case, kernel_device), gradients_of(case, kernel_device)
    whole = results(case, tensors, dys)
    for part in (slice(0, 1), slice(1, 3)):
        shapes = tuple((part.stop - part.start, *shape[1:]) for shape in case.shapes)
        given = {name: t if "weight" in name else t[part] for name, t in tensors.items()}
        found = results(case.alike(shapes=shapes), given, [dy[part] for dy in dys])
        for name, value in found.items():
            assert "weight" in name or torch.equal(value, whole[name][part]), name
    for i in range(2):
        alone = {f"{n}0": tensors[f"{n}{i}"] for n in ("x", "weight")}
        alone |= {n: tensors[n] for n in ("cos", "sin") if n in tensors}
        found = results(case.alike(shapes=case.shapes[i : i + 1]), alone, dys[i : i + 1])
        assert torch.equal(found["y0"], whole[f"y{i}"]) and torch.equal(found["dx0"], whole[f"dx{i}"])
        torch.testing.assert_close(found["dweight0"], whole[f"dweight{i}"], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", BATCHES)
def test_results_are_the_same_from_run_to_run(name, kernel_device):
    """Sums too: they are added in a fixed order."""
    case = BATCHES[name]
    tensors, dys = inputs(case, kernel_device), gradients_of(case, kernel_device)
    first, second = (results(case, tensors, dys) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(2, 5, 4, 128), (4, 1536), (3, 40, 33), (2, 300, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"zero_centered": True}, {"rounding": "llama"}, {"out_dtype": F64}], ids=str)
def test_without_a_rotation_it_is_rms_norm(shape, options, device):
    """Bit by bit, of y and dx; the sum over rows, where other programs share it, to its rounding."""
    case = Case(shapes=(shape, (3, 24)), dtype=BF16, table=None, options=options)
    tensors = inputs(case, device)
    dys = gradients_of(case, device)
    found = results(case, tensors, dys)
    for i, dy in enumerate(dys):
        x, weight = (tensors[f"{n}{i}"].detach().requires_grad_() for n in ("x", "weight"))
        y = rms_norm(x, x.shape[-1:], weight, EPS, **options)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        assert torch.equal(found[f"y{i}"], y) and torch.equal(found[f"dx{i}"], dx)
        torch.testing.assert_close(found[f"dweight{i}"], dweight, rtol=1e-5, atol=1e-4)
