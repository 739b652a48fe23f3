"""The clips by the kernels of each backend, on the device whose tensors they serve, against torch.nn.utils there."""

import itertools

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import backend
from helpers.backends import backend_parameters
from helpers.clipping import HALVES, assert_like_stock, inf, nan, odd_lists, outcome, parameters_with

pytestmark = pytest.mark.parametrize("clip_device", backend_parameters("native", "triton"), indirect=True)
# what kernels read: the others go to PyTorch's operations, and a named backend refuses them. Duplicates are a race in
# stock's own clip on a card; test_clip_kernels has them.
READABLE = ("plain", "one", "zero_dim", "none", "zeros", "some_zeros", "nan", "inf", "minus_inf_and_nan",
            "mixed_dtypes", "double", "bfloat16", "float16", "empty_tensor", "only_empty_tensors", "channels_last",
            "transposed", "offset")  # fmt: skip


def list_on(device: str, name: str) -> list:
    with torch.device(device):
        return odd_lists()[name]


@pytest.mark.parametrize("name", READABLE)
def test_lists_like_stock(name, clip_device):
    grads = list_on(clip_device, name)
    for norm_type, max_norm in itertools.product((2.0, inf), (0.7, 1e6)):
        assert_like_stock(grads, max_norm, norm_type)
    for bound in (0.5, nan):
        ours, stock = (outcome(utils.clip_grad_value_, grads, bound)[1] for utils in (fastnorm, nn.utils))
        torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)


def test_the_two_halves_like_stock(clip_device):
    """get_total_norm, then clip_grads_with_norm_."""
    for name in ("plain", "nan", "bfloat16", "float16", "double", "channels_last"):
        grads = list_on(clip_device, name)
        wide = [g.float() if g.dtype in HALVES else g for g in grads]
        total = nn.utils.get_total_norm(wide)
        torch.testing.assert_close(fastnorm.get_total_norm(grads), total, rtol=1e-5, atol=0, equal_nan=True)
        _, ours = outcome(fastnorm.clip_grads_with_norm_, grads, 0.3, total)
        _, stock = outcome(nn.utils.clip_grads_with_norm_, wide, 0.3, total)
        stock = [s.to(g.dtype) for s, g in zip(stock, grads, strict=True)]
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=0, equal_nan=True)


def test_norm_types_like_stock(clip_device):
    for norm_type, name, max_norm in itertools.product((1.0, 0.0, -inf, -1.0, 3.5), ("plain", "nan"), (0.7, 1e6)):
        assert_like_stock(list_on(clip_device, name), max_norm, norm_type)


def test_odd_limits_like_stock(clip_device):
    for max_norm, name in itertools.product((0.0, -1.0, inf, -inf, nan, 1e-30), ("plain", "zeros", "inf")):
        assert_like_stock(list_on(clip_device, name), max_norm)


def test_a_nonfinite_gradient_is_named_before_anything_is_written(clip_device):
    grads = [torch.ones(3, device=clip_device), torch.tensor([1.0, nan], device=clip_device)]
    parameters = parameters_with(grads)
    with pytest.raises(RuntimeError, match=r"is parameters\[1\]$"):
        fastnorm.clip_grad_norm_(parameters, 0.1, error_if_nonfinite=True)
    assert torch.equal(parameters[0].grad, torch.ones(3, device=clip_device))
    assert fastnorm.clip_grad_norm_(parameters[:1], 0.1, error_if_nonfinite=True).item() == pytest.approx(3**0.5)


def test_lists_of_many_tensors(clip_device):
    """More than travel in a launch's arguments, of either length."""
    is_slow = backend._forced == "triton" and clip_device == "cpu"  # a program takes milliseconds there
    for count in (193,) if is_slow else (193, 1700):
        storage = torch.randn(17 * count, device=clip_device)
        exact = storage.double().norm()
        expected = storage.double() * (0.5 / (exact + 1e-6))
        total = fastnorm.clip_grad_norm_(parameters_with(storage.split(17)), 0.5)
        torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(storage.double(), expected, rtol=2e-6, atol=0)
