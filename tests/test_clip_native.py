"""What only the compiled clip has: accuracy, range, threads, instruction sets, and memory that is not written."""

import math
import mmap

import pytest
import torch

import fastnorm
from fastnorm import backend
from helpers.clipping import parameters_with
from helpers.norms import DTYPES

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
inf, nan = math.inf, math.nan
NORM_TYPES = (2.0, 1.0, inf, -inf, 0.0, -1.0, 0.5, 3.0, 1.7, -2.5)


def test_shapes_of_lists():
    """Equal keys mean equal shapes: where a size is, and which dimension it belongs to, is in them."""

    tensors = [torch.ones(()), torch.ones(3), torch.ones(2, 0, 5), torch.ones(300, 2).T, torch.ones(1)]
    key, empty = native.shape_key(tensors), native.shape_key([])
    assert key == native.shape_key([torch.empty(t.shape, dtype=torch.int8) for t in tensors])
    assert key == native.shape_key(tuple(tensors)) and empty != key
    assert all(native.all_readable(*case) for case in ((tensors, key), (tuple(tensors), key), ([], empty)))
    lists = [tensors[:4], [*tensors, torch.ones(2)], [torch.ones(2)], []]
    for place, shape in (0, (1,)), (1, ()), (1, (4,)), (1, (3, 1)), (2, (2, 0)), (2, (0, 2, 5)), (3, (300, 2)):
        lists.append([*tensors[:place], torch.ones(shape), *tensors[place + 1 :]])
    for other in lists:
        assert native.shape_key(other) != key and native.all_readable(other, None)
        assert not native.all_readable(other, key) and not native.all_readable(tensors, native.shape_key(other))
    assert native.shape_key([torch.ones(2), torch.ones(())]) != native.shape_key([torch.ones(()), torch.ones(2)])
    assert native.shape_key([*tensors, torch.nested.nested_tensor([torch.ones(2)])]) is None
    with pytest.raises(TypeError, match="expected tensors, but got int"):
        native.shape_key([3])
    with pytest.raises(TypeError, match=r"all_readable\(tensors, shapes\)"):
        native.all_readable(tensors, "3")


def test_the_key_of_shapes_is_no_linear_sum():
    """Such a sum can't tell these orders of two shapes apart, of which one has a 1 where the other has a 0."""
    order = [place.bit_count() % 2 for place in range(1024)]
    shapes = torch.ones(1), torch.ones(4097)
    assert native.shape_key([shapes[i] for i in order]) != native.shape_key([shapes[1 - i] for i in order])


def test_adagc_compares_shapes_in_the_walk_that_every_list_gets(monkeypatch):
    policy, params = fastnorm.AdaGC(), parameters_with([torch.ones(2, 3), torch.ones(5)])
    fastnorm.clip_grad_norm_(params, policy)
    monkeypatch.setattr(backend, "shape_key", None)
    fastnorm.clip_grad_norm_(params, policy)
    assert policy.steps == 2


@pytest.mark.parametrize("place", (0, 20, 39))
def test_one_tensor_that_kernels_cannot_read(place):
    """It is found wherever it stands in a list, whatever its neighbours are."""
    tensors = [torch.ones(3, dtype=dtype) for dtype in DTYPES for _ in range(10)]
    key = native.shape_key(tensors)
    assert native.all_readable(tensors, None) and native.all_readable(tensors, key)
    for other in (
        torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.int32), torch.ones(6)[::2], torch.ones(1).expand(3),
        torch._neg_view(torch.ones(3)), torch._efficientzerotensor((3,)), torch.ones(3, device="meta"), 3,
        torch.nested.nested_tensor([torch.ones(3)]), torch.ones(3, dtype=torch.complex64),
    ):  # fmt: skip
        changed = [*tensors[:place], other, *tensors[place + 1 :]]
        assert not native.all_readable(changed, None) and not native.all_readable(changed, key)


def test_gradients_and_types_of_lists():
    class Computed(torch.nn.Parameter):
        grad = property(lambda self: torch.full((2,), 3.0))

    with_grad, without = torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    with_grad.grad = torch.ones(2)
    computed = Computed(torch.ones(2))
    first, second = native.gradients((with_grad, without, computed))
    assert first is with_grad.grad and torch.equal(second, computed.grad) and native.gradients([without]) == []
    assert native.are_plain([with_grad, without]) and native.are_plain([]) and not native.are_plain([without, computed])
    assert native.all_readable([with_grad, without], None) and not native.all_readable([without, computed], None)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'grad'"):
        native.gradients([with_grad, 3])


def test_only_clipped_tensors_are_touched():
    """A write would make the copy that these clones have put off."""
    tensors = [torch.ones(70)._lazy_clone() for _ in range(4)]
    native.multi_tensor_scale_(tensors, torch.tensor([1.0, 0.5, 2.0, nan]))
    assert [torch._C._is_cow_tensor(t) for t in tensors] == [True, False, True, False]
    assert tensors[1].eq(0.5).all() and tensors[3].isnan().all()


def norm_of(tensors, norm_type=2.0):
    return native.multi_tensor_norm(tensors, norm_type, 1.0)[0].item()


def random_lists(dtype):
    """Long and short tensors: several chunks, several tensors a chunk, every vector tail."""
    torch.manual_seed(1)
    sizes = [200_000, *range(71), 65536, 65537, 1000]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_every_size_against_float64(dtype, norm_type):
    tensors = [t for t in random_lists(dtype) if t.numel()]
    total, coefficient, nonfinite, norms = native.multi_tensor_norm(tensors, norm_type, 0.5)
    expected = torch.stack([torch.linalg.vector_norm(t.double(), norm_type) for t in tensors])
    unit = 1e-12 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(norms.double(), expected, rtol=unit, atol=0)
    torch.testing.assert_close(total.double(), torch.linalg.vector_norm(expected, norm_type), rtol=unit, atol=0)
    torch.testing.assert_close(coefficient, (0.5 / (total + 1e-6)).clamp(max=1))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert nonfinite.dtype == torch.float32 and nonfinite.item() == 0


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_and_clamping_every_size(dtype):
    coefficient = torch.tensor(0.37)
    tensors, expected = random_lists(dtype), [t * coefficient for t in random_lists(dtype)]
    native.multi_tensor_scale_(tensors, coefficient)
    assert all(map(torch.equal, tensors, expected))
    expected = [t.clamp(-0.2, 0.2) for t in tensors]
    native.multi_tensor_clamp_(tensors, 0.2)
    assert all(map(torch.equal, tensors, expected))


@pytest.mark.slow
def test_a_hundred_million_elements():
    """Stock's float32 sum is off by one part in a hundred here."""
    x = torch.full((1,), 0.1).expand(100_000_000).contiguous()
    exact = math.sqrt(1e8) * x[0].item()
    assert norm_of([x]) == pytest.approx(exact, rel=1e-6)
    assert norm_of([x], 1.0) == pytest.approx(1e8 * x[0].item(), rel=1e-6)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype, sizes", [
    (torch.float32, (1e30, 1e-30, 3e38, 1e-38, 1e-44)), (torch.bfloat16, (1e30, 1e-30)),
    (torch.float64, (1e30, 1e300, 1e-300, 5e-322)), (torch.float16, (6e4, 6e-8)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, 3.0, 40.0, -1.0, -40.0, inf])
def test_sizes_whose_powers_leave_the_dtype(dtype, sizes, norm_type):
    """The norm is right wherever it fits itself."""
    for size in sizes:
        x = torch.full((1001,), size, dtype=dtype)
        root = 1.0 if norm_type == inf else 2002 ** (1 / norm_type)
        total, _, _, norms = native.multi_tensor_norm([x, x], norm_type, 1.0)
        exact = torch.tensor(float(x[0]) * root, dtype=torch.float64).to(total.dtype)
        torch.testing.assert_close(total, exact, rtol=1e-6, atol=1.5e-45 if dtype != torch.float64 else 1e-323)
        assert norms.isfinite().all() or total.isinf()


@pytest.mark.instruction_sets
def test_special_values_anywhere():
    """In the middle of vectors, in their tails, and in the last chunk."""
    for n, where in ((5, 0), (67, 66), (70_000, 12_345), (140_000, 139_999)):
        x = torch.ones(n)
        for bad in (nan, inf, -inf):
            x[where] = bad
            for norm_type in NORM_TYPES:
                total = torch.tensor(norm_of([torch.ones(3), x], norm_type))
                norms = torch.stack([torch.linalg.vector_norm(t.double(), norm_type) for t in (torch.ones(3), x)])
                stock = torch.linalg.vector_norm(norms, norm_type).float()
                torch.testing.assert_close(total, stock, rtol=1e-6, atol=0, equal_nan=True)
            flag = native.multi_tensor_norm([x], 2.0, 1.0)[2]
            assert flag.item() == 1


def test_shares_without_elements_are_neutral():
    """Other ranks may have some: stock's error is the caller's to raise."""
    x = torch.full((2,), -3.0)
    for norm_type in NORM_TYPES:
        assert norm_of([torch.empty(0), x], norm_type) == norm_of([x], norm_type)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0])
def test_the_number_of_threads_changes_nothing(norm_type, threads):
    tensors = random_lists(torch.float32)
    threads(1)
    expected = native.multi_tensor_norm(tensors, norm_type, 1.0)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, native.multi_tensor_norm(tensors, norm_type, 1.0), expected))


def test_shared_memory_is_scaled_in_turn(threads):
    """A tensor listed twice and views of it: as often as they are listed, with any number of threads."""
    threads(7)
    x = torch.randn(300_000)
    y = x.clone()
    views = lambda t: [t, t[1000:250_000], t, t[:1]]  # noqa: E731
    for view in views(y):
        view.mul_(0.7)
    native.multi_tensor_scale_(views(x), torch.tensor(0.7))
    torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_nothing_is_written_where_nothing_is_clipped():
    """The gradient lies in memory that the process may only read."""
    with open(__file__, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        with pytest.warns(UserWarning, match="not writable"):
            raw = torch.frombuffer(memory, dtype=torch.uint8, count=4096)
        grad = (raw.view(torch.bfloat16)).detach()
        parameters = parameters_with([grad])
        norm = fastnorm.clip_grad_norm_(parameters, inf)
        assert norm.isfinite()
        fastnorm.clip_grad_norm_(parameters, norm.item() * 1.1)
        fastnorm.clip_grad_value_(parameters, grad.abs().max().item())
        fastnorm.clip_grads_with_norm_(parameters, 2.0, torch.tensor(1.0))
        del grad, raw, parameters


def adaptively_clipped(grad, param, units, clip_factor, eps, norm_type):
    """The rule in float64."""
    g, p = (t.double().view(units, -1) for t in (grad, param))
    norm, size = (torch.linalg.vector_norm(t, norm_type, dim=1, keepdim=True) for t in (g, p))
    limit = size.clamp(min=eps) * clip_factor
    return torch.where(norm < limit, g, g * limit / norm.clamp(min=1e-6)).view(grad.shape)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, inf, 3.0])
def test_adaptive_clipping_by_the_rule(dtype, norm_type):
    """Rows, whole tensors longer than a chunk, and rows longer than a chunk; some clipped, some not."""
    shapes = [((64, 9), 64), ((3, 5), 1), ((7,), 7), ((200_000,), 1), ((2, 70_001), 2), ((0, 4), 1)]
    params = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, _ in shapes]
    scale = torch.tensor([0.003, 0.03])
    grads = [(p * scale[torch.randint(2, (len(p),) + (1,) * (p.ndim - 1))]).to(dtype) for p in params]
    units = [count for _, count in shapes]
    expected = [
        adaptively_clipped(g, p, count, 0.01, 1e-3, norm_type) if g.numel() else g.double()
        for g, p, count in zip(grads, params, units, strict=True)
    ]
    before = [g.clone() for g in grads]
    native.multi_tensor_agc_(grads, params, units, 0.01, 1e-3, norm_type)
    unit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), value, rtol=unit, atol=6e-8 if dtype == torch.float16 else 1e-30)
    assert not torch.equal(grads[0], before[0]) and (grads[0] == before[0]).all(1).any()


def test_a_unit_that_is_nan_spoils_only_itself():
    param = torch.ones(4, 300)
    grad = torch.full((4, 300), 1.0)
    grad[2, 7] = nan
    native.multi_tensor_agc_([grad], [param], [4], 0.01, 1e-3, 2.0)
    assert grad[2].isnan().all() and torch.allclose(grad[[0, 1, 3]], torch.tensor(0.01))


def test_wrong_arguments_raise():
    x = torch.randn(6, 8)
    with pytest.raises(RuntimeError, match="no tensor arguments"):
        native.multi_tensor_norm([], 2.0, 1.0)
    with pytest.raises(RuntimeError, match="without gaps and overlaps"):
        native.multi_tensor_norm([x[:, ::2]], 2.0, 1.0)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        native.multi_tensor_norm([x.int()], 2.0, 1.0)
    with pytest.raises(RuntimeError, match="one number for each tensor"):
        native.multi_tensor_scale_([x], torch.ones(2))
    with pytest.raises(TypeError, match="float32 or float64"):
        native.multi_tensor_scale_([x], torch.tensor(1.0).half())
    with pytest.raises(RuntimeError, match="units of equal size"):
        native.multi_tensor_agc_([x], [x.clone()], [5], 0.01, 1e-3, 2.0)
    with pytest.raises(RuntimeError, match="same shapes"):
        native.multi_tensor_agc_([x], [x[:3]], [1], 0.01, 1e-3, 2.0)
