"""The clip's kernels over lists of tensors, against float64 and the reference: Triton's wherever Triton runs, the
extension's CUDA ones on a card, and on a virtual GPU those same ones, compiled without torch, together with the host
code that plans their launches.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnorm import backend, reference
from helpers.backends import backend_parameters, has_cuda_clips
from helpers.clip_kernels import Cuda, assert_norms, randn

triton_kernels = backend._triton
ROOT = Path(__file__).resolve().parents[1]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
INF = math.inf
# of a changed element: its rounding, and that of a float32 product or norm
CHANGED = {F32: 2e-6, F64: 1e-6, F16: 2**-10, BF16: 2**-7}


VIRTUAL, TRITON = pytest.param("virtual", id="cuda", marks=pytest.mark.cuda), *backend_parameters("triton")


@pytest.fixture(params=[VIRTUAL, "native", TRITON])
def kernels(request):
    """A backend's functions; what the test makes lies on the device whose tensors they take."""
    if request.param == "virtual":
        yield Cuda()
        return
    functions, device = triton_kernels, triton_kernels and triton_kernels.device_type()
    if request.param == "native":
        functions, device = backend._native, "cuda" if has_cuda_clips() else None
    if device is None:
        pytest.skip(f"no device for these kernels: {backend.statuses()[request.param].detail}")
    with torch.device(device):
        yield functions


def scaled(x: Tensor, coefficient: Tensor) -> Tensor:
    """The product, rounded once: torch rounds a coefficient that lies on a card to x's dtype first."""
    wide = torch.promote_types(x.dtype, F32)
    return (x.to(wide) * coefficient.to(wide)).to(x.dtype)


def mixed_list() -> list[Tensor]:
    """Odd sizes, offset starts, an empty tensor, a scalar, a transposed one, several chunks."""
    transposed = randn(33 * 7, F32).view(33, 7).t()
    return [randn(5, F32), randn(4999, F32, 3), randn(0, F32), randn(1, BF16), randn(9001, BF16, 1), randn(777, F16, 5),
            transposed]  # fmt: skip


@pytest.mark.parametrize("p", (2.0, 1.0, INF, -INF, 0.0, 3.5, -1.0))
def test_norms_of_every_kind(kernels, p):
    assert_norms(kernels, mixed_list(), p)


@pytest.mark.parametrize("p", (2.0, INF))
@pytest.mark.parametrize("dtype", (F16, BF16, F64), ids=str)
def test_norms_of_every_dtype(kernels, dtype, p):
    assert_norms(kernels, [randn(3001, dtype, 1), randn(9001, dtype), randn(8, dtype)], p)
    assert_norms(kernels, [randn(3001, dtype, 1), randn(4500, F32)], p)


def test_what_squares_in_float32_would_lose(kernels):
    """Too large, too small, both in one tensor, and beside a zero tensor."""
    both = torch.full((4100,), 1e-30)
    both[4000:] = 1e30
    tiny = torch.full((4097,), 1e-30)
    for tensors in ([torch.full((4099,), 1e30)], [tiny], [both], [tiny, torch.zeros(4096)], [both, tiny],
                    [torch.full((300,), 1e-38)], [tiny.bfloat16(), both.bfloat16()]):  # fmt: skip
        assert_norms(kernels, tensors)
    assert kernels.multi_tensor_norm([torch.full((64,), 3e38)], 2.0, 1.0)[0] == INF  # 2.4e39 is no float32


@pytest.mark.parametrize("p", (2.0, INF, -INF))
@pytest.mark.parametrize("bad", (math.nan, -INF))
def test_nonfinite_elements(kernels, bad, p):
    x = randn(5000, F32)
    for place in (0, 1234, 4999):
        y = x.clone()
        y[place] = bad
        assert_norms(kernels, [randn(100, F32), y], p)


def test_max_norms(kernels):
    x = [randn(100, F32)]
    for max_norm in (0.0, -1.0, 1e9, INF, 1e-3):
        assert_norms(kernels, x, max_norm=max_norm)


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
def test_every_start_and_the_neighbours(kernels, dtype):
    """Only the tensors' own elements are changed, wherever they begin and end."""
    for offset in range(16 // dtype.itemsize):
        for count in (1, 3, 16, 1029):
            storage = randn(count + offset + 9, dtype)
            before = storage.clone()
            coefficient = torch.tensor(0.37)
            kernels.multi_tensor_scale_([storage[offset : offset + count]], coefficient)
            before[offset : offset + count] = scaled(before[offset : offset + count], coefficient)
            torch.testing.assert_close(storage, before, rtol=0, atol=0)
        if triton_kernels is kernels:
            break  # it compiles nothing anew for another start


def test_scale_and_duplicates(kernels):
    """A tensor that is there twice is multiplied twice, with a rounding in between, as one after the other would."""
    tensors = [*mixed_list(), randn(3000, F64)]
    tensors += [tensors[1], tensors[4], tensors[1]]
    expected = [t.clone() for t in tensors[:-3]]
    coefficient = torch.tensor(0.37)
    kernels.multi_tensor_scale_(tensors, coefficient)
    for i in (*range(len(expected)), 1, 4, 1):
        expected[i].copy_(scaled(expected[i], coefficient))
    for tensor, right in zip(tensors, expected, strict=False):
        torch.testing.assert_close(tensor, right, rtol=0, atol=0)


@pytest.mark.parametrize("coefficient", (1.0, INF, math.nan, -0.5, 0.0))
def test_coefficients(kernels, coefficient):
    x = randn(1000, F32)
    expected = x.clone() if coefficient >= 1 else x * coefficient
    for dtype in (F32, F64):
        y = x.clone()
        kernels.multi_tensor_scale_([y], torch.tensor(coefficient, dtype=dtype))
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bound", (0.1, -2.0, math.nan, INF, 0.0))
def test_clamp(kernels, bound):
    tensors = [*mixed_list(), randn(300, F64), torch.tensor([1.0, math.nan, -INF, INF])]
    expected = [t.clone() for t in tensors]
    kernels.multi_tensor_clamp_(tensors, bound)
    reference.multi_tensor_clamp_(expected, bound)
    for tensor, right in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", (2.0, 1.0, INF, 3.0))
def test_adaptive_clipping(kernels, p):
    """Units of a few elements, of a warp, of a block, longer than it holds; clipped or not, NaN, inf; a duplicate."""
    shapes = [(10, 9), (3, 1100), (2, 9001), (7,), (3, 16, 5), (0, 3), (5, 700), (1,), (8, 64)]
    units = [10, 3, 2, 1, 3, 1, 5, 1, 8]
    dtypes = [F32, BF16, F32, F16, BF16, F32, F32, F32, BF16]
    scales = [1.0, 1.0, 1e-3, 1.0, 1e-4, 1.0, 1e-2, 1e-7, 1.0]
    grads = [randn(math.prod(s), d, scale=k).view(s) for s, d, k in zip(shapes, dtypes, scales, strict=True)]
    params = [randn(math.prod(s), d).view(s) for s, d in zip(shapes, [F32, F32, F32, F16, BF16, F32, BF16, F32, BF16],
                                                             strict=True)]  # fmt: skip
    grads[0][3, 2], grads[6][1, 5], params[6][2, 2] = math.nan, INF, math.nan
    grads, params, units = [*grads, grads[1]], [*params, params[1]], [*units, 3]
    expected = [g.double() for g in grads]
    expected[-1] = expected[1]
    kernels.multi_tensor_agc_(grads, params, units, 0.01, 1e-3, p)
    # in float64 but for the duplicate's rounding in between
    reference.multi_tensor_agc_(expected, [w.double() for w in params], units, 0.01, 1e-3, p)
    for i, (grad, right) in enumerate(zip(grads, expected, strict=True)):
        rounding = CHANGED[grad.dtype] * (2 if i in (1, 9) else 1)
        torch.testing.assert_close(grad.double(), right, rtol=rounding, atol=1e-6 * rounding, equal_nan=True)


def test_adaptive_clipping_leaves_the_other_units_alone(kernels):
    grads, params = randn(6 * 50, F32).view(6, 50), randn(6 * 50, F32).view(6, 50)
    grads[::2] *= 1e-4
    before = grads.clone()
    kernels.multi_tensor_agc_([grads], [params], [6], 0.01, 1e-3, 2.0)
    assert torch.equal(grads[::2], before[::2]) and not torch.isclose(grads[1::2], before[1::2]).any()


def test_long_units(kernels):
    """Units that several blocks share, beside short ones."""
    if isinstance(kernels, Cuda):
        return _cuda_long_units(kernels)
    grads = [randn(2 * 70001, F32), randn(100, F32), randn(131073, BF16, scale=1e-6)]
    params = [randn(2 * 70001, F32), randn(100, F32), randn(131073, F32)]
    expected = [g.double() for g in grads]
    reference.multi_tensor_agc_(expected, [w.double() for w in params], [2, 4, 1], 0.01, 1e-3, 2.0)
    kernels.multi_tensor_agc_(grads, params, [2, 4, 1], 0.01, 1e-3, 2.0)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=CHANGED[grad.dtype], atol=0)


def _cuda_long_units(kernels: Cuda) -> None:
    grads, params = randn(2 * 70001, F32), randn(2 * 70001, F32)
    grads[:70001] *= 1e-4
    expected = grads.double()
    reference.multi_tensor_agc_([expected], [params.double()], [2], 0.01, 1e-3, 2.0)
    clipped = kernels.gpu.agc_long_(grads, params, 2)
    torch.testing.assert_close(grads.double(), expected, rtol=CHANGED[F32], atol=0)
    assert clipped.written(grads) == 4 * 70001


def test_two_runs_are_bitwise_equal(kernels):
    """Whatever order the blocks run in."""
    tensors = [randn(40001, F32, 1), randn(9001, BF16), randn(30000, F32)]
    first = kernels.multi_tensor_norm(tensors, 2.0, 1.0)
    if isinstance(kernels, Cuda):
        for seed in range(3):
            again = Cuda(order="shuffled", seed=seed, blocks_at_once=2).multi_tensor_norm(tensors, 2.0, 1.0)
            assert all(map(torch.equal, first, again))
        again = Cuda(order="reversed").multi_tensor_norm(tensors, 2.0, 1.0)
    else:
        again = kernels.multi_tensor_norm(tensors, 2.0, 1.0)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("kernels", [TRITON], indirect=True)
def test_tables_are_kept(kernels, monkeypatch):
    """The same list copies nothing; gradients that lie elsewhere copy their addresses and nothing else."""
    from fastnorm.triton_kernels import tables

    copied, upload = [], tables.upload

    def counting(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        copied.append(len(values))
        return upload(values, dtype, device)

    monkeypatch.setattr(tables, "upload", counting)
    sizes = (5, 4097, 300)
    kept = [[randn(n, F32) for n in sizes] for _ in range(2)]
    calls: list[Callable] = [
        lambda tensors: kernels.multi_tensor_norm(tensors, 2.0, 1.0),
        lambda tensors: kernels.multi_tensor_scale_(tensors, torch.tensor(0.5)),
    ]
    for call in calls:
        call(kept[0])
    assert len(copied) == 3
    copied.clear()
    for call in calls:
        call(kept[0])
    assert not copied
    calls[0](kept[1])
    assert copied == [3]


@pytest.mark.parametrize("kernels", ["native", TRITON], indirect=True)
def test_a_default_device_is_for_factories_alone(kernels):
    """The tables of a list are made on the host and read on the tensors' device."""
    tensors = [randn(9, F32), randn(5000, BF16), randn(300, F32)]
    grads, params = ([randn(12, F32), randn(40, F32)] for _ in range(2))
    with torch.device("meta"):
        found = kernels.multi_tensor_norm(tensors, 2.0, 1.0)
        kernels.multi_tensor_agc_(grads, params, [3, 5], 0.01, 1e-3, 2.0)
    assert all(map(torch.equal, found, kernels.multi_tensor_norm(tensors, 2.0, 1.0)))
    assert all(grad.norm() < 0.02 * param.norm() for grad, param in zip(grads, params, strict=True))


def test_launch_choices():
    pytest.importorskip("triton")
    from fastnorm.triton_kernels import list_launch

    for total in (0, 1 << 14, 1 << 29, 1 << 40):
        size = list_launch.chunk_bytes(total)
        assert 1 << 14 <= size <= 1 << 30 and (total // size <= 4096 or size == 1 << 30)
    for itemsize in (2, 4, 8):
        rows, cols, warps = list_launch.chunk_tile(itemsize)
        assert cols * itemsize == 16 and rows % (32 * warps) == 0 and rows * cols * itemsize <= 1 << 14
        for length in (1, 9, 64, 1000, 4096, 8192, 16384, 16385, 100000):
            tiles = list_launch.unit_tiles(length, itemsize)
            registers = tiles.cols * tiles.rows // (32 * tiles.warps) * itemsize // 4
            assert tiles.looped or (tiles.cols >= length and registers <= 32)


def test_parts_share_no_memory():
    """Copies of a tensor, and views that overlap, come one after the other; what is empty doesn't come at all."""
    pytest.importorskip("triton")
    from fastnorm.triton_kernels import tables

    x, y = randn(100, F32), randn(10, BF16)
    tensors = [x, y, x, x[50:], y[:5], randn(0, F32), x[:50]]
    entries = tables.entries_of(tensors)
    groups = tables.disjoint(entries)
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4, 6]
    assert len(groups) == 3  # two whole ones, and one of two halves
    for group in groups:
        spans = sorted((entries[i].address, entries[i].end) for i in group)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
