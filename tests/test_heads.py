"""Norms of attention heads, as of q and k: rows that no single stride describes are read in place.

`test_traffic.py` counts what the Triton kernels read there, `test_views.py` tries strides at random.
"""

import random

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import backend
from fastnorm.functional import gated_rms_norm, rms_norm
from fastnorm.views import row_levels
from helpers.norms import call, check, inputs, plain_case

native = pytest.mark.skipif(backend._native is None, reason="looks into the compiled operators")
OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "gated_rms_norm")


def packed(t: Tensor) -> Tensor:
    """k of a packed projection, (B, S, 3, H, D)."""
    return torch.stack([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], 2)[:, :, 1]


def transposed(t: Tensor) -> Tensor:
    """(B, H, S, D) of memory (B, S, H, D)."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


def cut(t: Tensor) -> Tensor:
    """From the middle of a tensor that is wider in every dimension: rows at three strides, off every boundary."""
    wide = t.new_full([n + 3 for n in t.shape], float("nan"))
    inner = wide[tuple(slice(1, 1 + n) for n in t.shape)]
    return inner.copy_(t)


def unaligned(t: Tensor) -> Tensor:
    """Transposed, and begins one element behind a boundary."""
    memory = t.new_full((t.numel() + 1,), float("nan"))
    return memory[1:].view(t.transpose(1, 2).shape).transpose(1, 2).copy_(t)


def expanded(t: Tensor) -> Tensor:
    """One head for all: rows that lie on one another."""
    return t[:, :, :1].expand(t.shape)


VIEWS = {f.__name__: f for f in (packed, transposed, cut, unaligned, expanded)}


def strided(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, *views) -> tuple:
    """A case, its tensors in these views, one after the other, and gradients (dy, dh), dh None where there is no h."""
    case = plain_case(op, shape, dtype)
    tensors = inputs(case, device)
    views = (views * 4)[:4]
    for name, view in zip(("x", "residual", "gate"), (views[0], views[1], views[1]), strict=True):
        if name in tensors:
            tensors[name] = view(tensors[name])
    gradients = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    dy, dh = (view(g) for view, g in zip(views[2:], gradients, strict=True))
    return case, tensors, dy, dh if case.adds else None


def results(case, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor | None) -> list[Tensor]:
    """y, h and all gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = call(case, leaves)
    found = torch.autograd.grad((y, h) if case.adds else y, list(leaves.values()), (dy, dh) if case.adds else dy)
    return [y, h, *found]


def assert_bits_of_copies(case, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor | None) -> None:
    """The same as of contiguous copies; and the inputs are not written to."""
    copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    found = results(case, tensors, dy, dh)
    expected = results(case, copies, dy.contiguous(), None if dh is None else dh.contiguous())
    for actual, right in zip(found, expected, strict=True):
        assert torch.equal(actual, right)
        assert actual.is_contiguous() or actual.data_ptr() == tensors["x"].data_ptr()  # h, which is x itself
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())


def check_all(*given) -> None:
    check(*given)
    assert_bits_of_copies(*given)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_heads(view, op, kernel_device):
    check_all(*strided(op, (2, 5, 3, 64), torch.bfloat16, kernel_device, view))


@pytest.mark.parametrize("op", OPERATIONS)
def test_streams_at_strides_of_their_own(op, kernel_device):
    """Common levels: each breaks elsewhere."""
    check_all(*strided(op, (2, 5, 3, 72), torch.float32, kernel_device, packed, transposed, torch.clone, cut))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cols", (33, 128, 256))
def test_widths_of_heads(cols, dtype, kernel_device):
    """Several rows a program, and more rows than one block has."""
    check_all(*strided("rms_norm", (2, 9, 4, cols), dtype, kernel_device, transposed))


@pytest.mark.slow
@pytest.mark.parametrize("op", ("add_rms_norm", "gated_rms_norm"))
def test_long_rows(op, kernel_device):
    """That don't fit in registers."""
    check_all(*strided(op, (1, 2, 2, 33000), torch.float32, kernel_device, transposed, packed))


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (1, 7, 3, 64), (3, 1, 2, 64), (2, 3, 1, 1), (6, 2, 64)])
def test_one_row_and_sizes_of_one(shape, kernel_device):
    check_all(*strided("rms_norm", shape, torch.float32, kernel_device, transposed))


def test_several_dimensions_of_columns(kernel_device):
    """(B, S, H, W, D) with rows of (W, D): the same levels, and columns that are one run."""
    case = plain_case("layer_norm", (2, 3, 4, 2, 16), torch.float32, normalized=2)
    tensors = inputs(case, kernel_device)
    dy = torch.randn(2, 4, 3, 2, 16, device=kernel_device).transpose(1, 2)
    check_all(case, tensors | {"x": packed(tensors["x"])}, dy, None)
    assert row_levels([packed(tensors["x"])], 2).sizes == (4,)


def reversed_rows(t: Tensor) -> Tensor:
    """Memory in the opposite order of the leading dimensions, of which none collapse."""
    order = [*range(t.dim() - 2, -1, -1), t.dim() - 1]
    return t.permute(order).contiguous().permute(order)


def test_rows_of_more_levels_are_copied(kernel_device):
    case, tensors, dy, dh = strided("add_rms_norm", (2, 3, 2, 3, 40), torch.float32, kernel_device, reversed_rows, cut)
    x, residual = row_levels([tensors["x"], tensors["residual"]], 1).tensors
    assert x.is_contiguous() and residual.is_contiguous()
    check_all(case, tensors, dy, dh)


def test_empty_inputs(kernel_device):
    for shape in ((2, 0, 3, 8), (0, 2, 3, 8)):
        x = torch.randn(shape, device=kernel_device).transpose(1, 2).requires_grad_()
        y = rms_norm(x, (8,))
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert y.shape == dx.shape == x.shape
    assert row_levels([torch.empty(2, 0, 3, 8).transpose(1, 2)], 1).rows == 0


def test_repeated_calls_with_other_strides(kernel_device):
    """Of one shape: no call runs by what was recorded for another's strides."""
    for view in (transposed, packed, torch.clone, transposed, cut, packed):
        assert_bits_of_copies(*strided("rms_norm", (2, 4, 6, 32), torch.bfloat16, kernel_device, view))


def test_views_of_one_memory(kernel_device):
    """x and residual of one projection, and their gradients of one tensor."""
    case = plain_case("add_rms_norm", (2, 4, 5, 32), torch.bfloat16)
    qkv, gradient = (torch.randn(2, 5, 3, 4, 32, device=kernel_device).bfloat16().transpose(1, 3) for _ in range(2))
    tensors = inputs(case, kernel_device) | {"x": qkv[:, :, 2], "residual": qkv[:, :, 0]}
    check_all(case, tensors, gradient[:, :, 2], gradient[:, :, 0])


@pytest.mark.parametrize("view", (packed, transposed, cut), ids=lambda f: f.__name__)
def test_the_view_itself_is_saved(view, kernel_device):
    saved = []
    q, gate = (view(torch.randn(2, 5, 3, 64, device=kernel_device)).detach().requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(q, (64,))
        gated_rms_norm(q, gate, (64,))
    addresses = [(t.data_ptr(), t.stride()) for t in saved]
    for t, count in ((q, 2), (gate, 1)):
        assert addresses.count((t.data_ptr(), t.stride())) == count
    assert sum(t.numel() == q.numel() for t in saved) == 3


@native
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("view", (packed, transposed, unaligned, expanded), ids=lambda f: f.__name__)
def test_nothing_is_copied(view, op):
    case, tensors, dy, dh = strided(op, (2, 5, 3, 64), torch.bfloat16, "cpu", view)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with fastnorm.use("native"), torch.profiler.profile() as profile:
        y, h = call(case, leaves)
        torch.autograd.grad((y, h) if case.adds else y, list(leaves.values()), (dy, dh) if case.adds else dy)
    assert not {event.key for event in profile.key_averages()} & {"aten::clone", "aten::copy_", "aten::contiguous"}


@pytest.mark.parametrize(
    "view, sizes, strides",
    [
        (torch.clone, (), (64,)),
        (packed, (3,), (64, 576)),
        (transposed, (3, 5), (320, 64, 960)),
        (expanded, (3,), (0, 192)),
    ],
    ids=["contiguous", "packed", "transposed", "expanded"],
)
def test_levels(view, sizes, strides):
    """As few as there can be, over all tensors; absent ones have no say."""
    x = view(torch.randn(2, 5, 3, 64))
    levels = row_levels([x, None], 1)
    assert levels.tensors[0] is x and levels.tensors[1] is None
    assert (levels.rows, levels.cols, levels.sizes) == (30, 64, sizes)
    assert levels.strides == [strides, (0,) * len(strides)]
    plain = torch.randn(2, 5, 3, 64)
    both = row_levels([plain, x], 1)
    assert both.sizes == sizes and both.strides[1] == strides
    assert both.tensors[0] is plain


@pytest.mark.triton
def test_divisions_are_exact():
    """Of numbers of 31 bits, by the constants that kernels get."""
    if backend._triton is None:
        pytest.skip("Triton is not installed")
    from fastnorm.triton_kernels.tiles import row_steps

    draw = random.Random(0)
    sizes = [2, 3, 5, 7, 641, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**30 + 1, 2**31 - 1]
    sizes += [draw.randrange(2, 2 ** draw.randrange(2, 31)) for _ in range(200)]
    for size in sizes:
        levels = row_levels([torch.empty(2, 2, 1).transpose(0, 1)], 1)._replace(sizes=(size,), strides=[(1, size)])
        ((_, step),), (division,) = row_steps(levels)
        multiplier, shift = division >> 6, division >> 1 & 31
        assert step == 0 and 2**31 <= multiplier < 2**32 and division % 2 == 1
        near = [size * k + d for k in (1, 2, (2**31 - 1) // size) for d in (-1, 0, 1)]
        for i in [0, 1, 2**31 - 1, *near, *(draw.randrange(2**31) for _ in range(50))]:
            if i < 2**31:
                assert i * multiplier >> 32 >> shift == i // size


@native
def test_many_rows():
    """The numbers of rows that a kernel divides have twenty bits."""
    x = torch.randn(3, 1009, 331, 2).transpose(1, 2)
    with fastnorm.use("native"):
        assert torch.equal(rms_norm(x, (2,)), rms_norm(x.contiguous(), (2,)))
