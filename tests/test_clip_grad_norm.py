"""Clipping by norm and by value against torch.nn.utils: odd inputs, numbers, errors, and what is written.

Lists and numbers by each backend, on a card too, are in test_clip_backends.
"""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastnorm
from helpers.backends import on_a_card_too
from helpers.clipping import HALVES, assert_like_stock, copied, inf, nan, odd_lists, outcome, parameters_with
from helpers.drawing import examples

pytestmark = pytest.mark.usefixtures("served_by")
NORM_TYPES = (2.0, 1.0, inf, 0.0, -inf, -1.0, 0.5, 3.0, "2", 2)

# (gradients, arguments) -> (total norm, all elements afterwards) by torch.nn.utils.clip_grad_norm_ of torch 2.14
CAPTURED = [
    ([[3.0, 4.0]], (1.0,), 5.0, [[0.5999999, 0.7999998]]),
    ([[3.0, 4.0]], (10.0,), 5.0, [[3.0, 4.0]]),
    ([[3.0], [4.0]], (1.0, '2'), 5.0, [[0.5999999], [0.7999998]]),
    ([[1.0, -2.0], [3.0]], (1.0, 1.0), 6.0, [[0.1666666, -0.3333333], [0.4999999]]),
    ([[1.0, -2.0], [3.0]], (1.0, inf), 3.0, [[0.3333332, -0.6666664], [0.9999996]]),
    ([[1.0, -2.0], [3.0]], (1.0, -inf), 1.0, [[0.999999, -1.999998], [2.999997]]),
    ([[0.0, -2.0], [0.0], [3.0]], (1.0, 0), 2.0, [[0.0, -0.9999995], [0.0], [1.499999]]),
    ([[1.0, -2.0], [4.0]], (0.5, -1.0), 0.5714286, [[0.8749984, -1.749997], [3.499994]]),
    ([[1.0, -4.0], [9.0]], (1.0, 0.5), 36.0, [[0.02777778, -0.1111111], [0.25]]),
    ([[0.0, 1.0]], (1.0, -1.0), 0.0, [[0.0, 1.0]]),
    ([[0.0, 0.0]], (1.0,), 0.0, [[0.0, 0.0]]),
    ([[0.0, 0.0]], (0.0,), 0.0, [[0.0, 0.0]]),
    ([[3.0, 4.0]], (-1.0,), 5.0, [[-0.5999999, -0.7999998]]),
    ([[3.0, 4.0]], (inf,), 5.0, [[3.0, 4.0]]),
    ([[3.0, 4.0]], (-inf,), 5.0, [[-inf, -inf]]),
    ([[3.0, 4.0]], (nan,), 5.0, [[nan, nan]]),
    ([[3.0, nan], [1.0]], (1.0,), nan, [[nan, nan], [nan]]),
    ([[3.0, nan], [1.0]], (1.0, inf), nan, [[nan, nan], [nan]]),
    ([[3.0, nan], [1.0]], (1.0, 0.0), 2.0, [[1.499999, nan], [0.4999998]]),
    ([[3.0, nan], [1.0]], (1.0, -inf), nan, [[nan, nan], [nan]]),
    ([[3.0, inf], [1.0]], (1.0,), inf, [[0.0, nan], [0.0]]),
    ([[3.0, -inf], [1.0]], (1.0, inf), inf, [[0.0, nan], [0.0]]),
    ([[3.0, inf], [1.0]], (1.0, -1.0), 0.75, [[3.0, inf], [1.0]]),
    ([[3.0, inf], [0.0]], (inf,), inf, [[nan, nan], [nan]]),
    ([[3.0, inf], [nan]], (1.0,), nan, [[nan, nan], [nan]]),
    ([None, [6.0, 8.0]], (5.0,), 10.0, [[3.0, 4.0]]),
    ([[], [3.0]], (1.0,), 3.0, [[], [0.9999996]]),
    ([3.0, [4.0]], (1.0,), 5.0, [0.5999999, [0.7999998]]),
]


@pytest.mark.parametrize("grads, arguments, total, after", CAPTURED)
def test_captured_results_of_stock(grads, arguments, total, after):
    parameters = parameters_with(grads)
    result = fastnorm.clip_grad_norm_(parameters, *arguments)
    assert result.shape == () and result.device.type == "cpu"
    torch.testing.assert_close(result.double(), torch.tensor(total).double(), rtol=2e-6, atol=0, equal_nan=True)
    for parameter, expected in zip((p for p in parameters if p.grad is not None), after, strict=True):
        expected = torch.tensor(expected, dtype=parameter.grad.dtype)
        torch.testing.assert_close(parameter.grad, expected, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", odd_lists())
def test_odd_lists_like_stock(name):
    for norm_type, max_norm in itertools.product(NORM_TYPES, (0.7, 1e6)):
        grads = odd_lists()[name]
        if name == "integers":
            parameters = [torch.zeros(3, dtype=torch.long)]
            parameters[0].grad = grads[0]
            for clip in (nn.utils.clip_grad_norm_, fastnorm.clip_grad_norm_):
                with pytest.raises(RuntimeError, match="floating"):
                    clip(parameters, max_norm, norm_type)
        elif name == "duplicates":
            assert_duplicates_like_stock(max_norm, norm_type)
        else:
            assert_like_stock(grads, max_norm, norm_type)


def assert_duplicates_like_stock(max_norm, norm_type):
    """A tensor listed twice, and a part of it: counted and scaled as often, one after the other."""
    results = []
    for clip in (fastnorm.clip_grad_norm_, nn.utils.clip_grad_norm_):
        grads = odd_lists()["duplicates"]
        results.append((clip(parameters_with(grads), max_norm, norm_type), *grads))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, -0.0, inf, -inf, nan, 1e-30, torch.tensor(0.5), "0.5"])
@pytest.mark.parametrize("name", ["plain", "mixed_dtypes", "zeros", "nan", "inf", "sparse"])
def test_odd_limits_like_stock(name, max_norm):
    assert_like_stock(odd_lists()[name], max_norm)
    assert_like_stock(odd_lists()[name], max_norm, inf, foreach=False)


@pytest.mark.parametrize("name", ["plain", "nan", "mixed_dtypes", "gaps", "complex", "nothing", "channels_last"])
@pytest.mark.parametrize("norm_type", [2.0, inf, 0.0, "3"])
def test_the_two_halves_like_stock(name, norm_type):
    """get_total_norm, then clip_grads_with_norm_."""
    grads = [g for g in odd_lists()[name] if name != "mixed_dtypes" or g.dtype not in HALVES]
    stock = nn.utils.get_total_norm(grads, norm_type)
    total = fastnorm.get_total_norm(grads, norm_type)
    torch.testing.assert_close(total, stock, rtol=1e-5, atol=0, equal_nan=True)
    results = []
    for clip in (fastnorm.clip_grads_with_norm_, nn.utils.clip_grads_with_norm_):
        result, after = outcome(clip, grads, 0.3, stock)
        assert result is None
        results.append(after)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0, equal_nan=True)


ODD_TENSORS = {
    "sparse_csr": lambda: torch.randn(3, 4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
    "mkldnn": lambda: torch.randn(3, 4).to_mkldnn(),
    "zero": lambda: torch._efficientzerotensor((3, 4)),
}


@pytest.mark.parametrize("name", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
def test_norms_of_odd_tensors_like_stock(name):
    """Those that can't well be gradients; most are refused."""
    tensors = [ODD_TENSORS[name](), torch.randn(3)]
    found = []
    for utils in (fastnorm, nn.utils):
        try:
            found.append(utils.get_total_norm(tensors))
        except Exception as error:  # noqa: BLE001, whatever it is, it is compared
            found.append(type(error))
    assert found[0] is found[1] or torch.allclose(*found)


@pytest.mark.parametrize("name", [n for n in odd_lists() if n not in ("integers", "duplicates")])
def test_clip_by_value_like_stock(name):
    for bound in (0.5, 0.0, -0.5, inf, nan, "0.25", torch.tensor(0.3)):
        grads = odd_lists()[name]
        result, after = outcome(fastnorm.clip_grad_value_, grads, bound)
        if name in ("nothing", "only_none"):
            assert result is None, "stock raises an internal error where there is nothing to clip"
            continue
        stock, expected = outcome(nn.utils.clip_grad_value_, grads, bound)
        assert result is stock
        if result is None:
            torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)


def test_warnings_like_stock():
    """An empty generator warns at the caller; an empty list does not."""
    for clip in (nn.utils.clip_grad_norm_, fastnorm.clip_grad_norm_):
        with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur") as caught:
            total = clip((p for p in ()), 1.0)
        assert caught[0].filename == __file__
        assert total.shape == () and total.item() == 0 and total.device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.clip_grad_norm_([], 1.0)
        fastnorm.clip_grad_value_((p for p in ()), 1.0)
        fastnorm.clip_grads_with_norm_((p for p in ()), 1.0, torch.tensor(1.0))


@on_a_card_too
def test_generators_and_single_tensors():
    model = nn.Linear(3, 4)
    model(torch.ones(2, 3)).sum().backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(fastnorm.clip_grad_norm_(model.parameters(), 1.0), expected)
    fastnorm.clip_grad_norm_(model.weight, 0.5)
    torch.testing.assert_close(fastnorm.get_total_norm(model.weight.grad), torch.tensor(0.5), rtol=1e-5, atol=0)
    fastnorm.clip_grad_value_(model.weight, 0.1)
    assert model.weight.grad.abs().max().item() == pytest.approx(0.1)


@on_a_card_too
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_non_finite_norms_raise_before_anything_is_written(bad):
    grads = [torch.randn(3), torch.tensor([1.0, bad]), torch.tensor([nan])]
    parameters = parameters_with([None, *grads])
    before = [copied(g) for g in grads]
    pairs = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
    with pytest.raises(RuntimeError, match=r"of order 2\.0 .* is non-finite.* is layer\.2$"):
        fastnorm.clip_grad_norm_(pairs, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"is parameters\[2\]$"):
        fastnorm.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"is tensors\[1\]$"):
        fastnorm.get_total_norm(grads, error_if_nonfinite=True)
    torch.testing.assert_close(grads, before, rtol=0, atol=0, equal_nan=True)
    finite = parameters_with([torch.full((2,), 1.5e38), torch.full((1,), 2e38)])  # none alone is to blame
    with pytest.raises(RuntimeError, match=r"error_if_nonfinite=False`$"):
        fastnorm.clip_grad_norm_(finite, 1.0, 1.0, error_if_nonfinite=True)


@on_a_card_too
def test_names_change_nothing_else():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.ones(1, 3)).sum().backward()
    total = fastnorm.clip_grad_norm_(model.named_parameters(), 0.5)
    assert total > 0.5
    torch.testing.assert_close(fastnorm.get_total_norm([p.grad for p in model.parameters()]), torch.tensor(0.5))


@on_a_card_too
@pytest.mark.parametrize("max_norm", [1.0, 3e4])
def test_half_norms_beyond_halfs_range_clip(max_norm):
    """Stock's norm is inf in float16, and its coefficient zero."""
    grads = [torch.full((100, 100), 1000.0, dtype=torch.float16), torch.full((7,), -2000.0, dtype=torch.float16)]
    total, after = outcome(fastnorm.clip_grad_norm_, grads, max_norm)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    after = torch.cat([g.double().flatten() for g in after])
    assert after.norm().item() == pytest.approx(max_norm, rel=2e-3) and bool((after != 0).all())


@on_a_card_too
@pytest.mark.parametrize("max_norm", [1.0, 0.37])
def test_bfloat16_gradients_land_on_max_norm(max_norm):
    grads = [torch.randn(300, 70).bfloat16(), torch.randn(70).bfloat16()]
    _, after = outcome(fastnorm.clip_grad_norm_, grads, max_norm)
    assert torch.cat([g.double().flatten() for g in after]).norm().item() == pytest.approx(max_norm, rel=2e-3)


@st.composite
def tensors(draw) -> Tensor:
    """Any shape and strides: dense in any order, with gaps, expanded, offset, empty."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, *HALVES]))
    scale = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 2]))
    offset = draw(st.integers(0, 3))
    flat = torch.randn(offset + math.prod(shape) * step, dtype=torch.float64).mul(scale).to(dtype)
    return flat[offset:].view([*shape, step])[..., 0].permute(order)


@given(st.lists(tensors(), max_size=6), st.sampled_from([2.0, 1.0, inf, 0.0, 3.0, 0.5]), st.booleans())
@examples(60)
def test_any_list_like_stock(grads, norm_type, tight):
    assert_like_stock(grads, 0.5 if tight else 1e9, norm_type)
