"""BatchNorm (Ioffe & Szegedy 2015) with a residual and a ReLU fused in: whole calls, and their parts for SyncBatchNorm.

x: (N, C, *), any strides; residual and dy are as x. Statistics are those of a channel in all samples. Results like x
have the memory format that is given.
"""

from __future__ import annotations

from ..views import ChannelView, contiguous
from . import launch, pixels, planes
from .moments import join_moments
from .tiles import column_sums


def batch_norm_forward(
    x, residual, weight, bias, running_mean, running_var, factor, momentum, eps, memory_format, relu, out_dtype
):
    """Returns y in out_dtype, the mask of relu, or None, and mean and rstd: (C,). Updates the running statistics."""
    view = ChannelView(x, memory_format, across_samples=True)
    x, residual = view.blocks(x), view.blocks(residual)
    with launch.on_device(x):
        partials = _layout(view).moments(x)
        mean, rstd = (partials.values.new_empty(view.channels) for _ in range(2))
        running = running_mean, running_var
        join_moments(partials, mean, rstd, x.numel() // view.channels, eps, None, running, factor, momentum)
        y, mask = _normalize(view, x, residual, (weight, bias), (mean, rstd), None, relu, relu, out_dtype)
    return y, mask, mean, rstd


def batch_norm_statistics(x, memory_format):
    """Returns mean and Σ(x − mean)²: (2, C)."""
    view = ChannelView(x, memory_format, across_samples=True)
    x = view.blocks(x)
    with launch.on_device(x):
        partials = _layout(view).moments(x)
        moments = partials.values.new_empty((2, view.channels))
        join_moments(partials, *moments, x.numel() // view.channels, None)
    return moments


def batch_norm_normalize(x, residual, weight, bias, mean, rstd, memory_format, relu, out_dtype):
    """Returns y in out_dtype, and the mask of relu, or None."""
    view = ChannelView(x, memory_format, across_samples=True)
    x, residual = view.blocks(x), view.blocks(residual)
    with launch.on_device(x):
        return _normalize(view, x, residual, (weight, bias), (mean, rstd), None, relu, relu, out_dtype)


def batch_norm_evaluation(
    x, residual, weight, bias, running_mean, running_var, eps, memory_format, relu, wants_mask, out_dtype
):
    """Returns y in out_dtype, and the mask of relu where it is wanted."""
    view = ChannelView(x, memory_format, across_samples=True)
    x, residual, statistics = view.blocks(x), view.blocks(residual), (running_mean, running_var)
    with launch.on_device(x):
        return _normalize(view, x, residual, (weight, bias), statistics, eps, relu, wants_mask, out_dtype)


def batch_norm_backward(
    dy, mask, x, weight, mean, rstd, training, memory_format, dresidual_dtype, dweight_dtype, dbias_dtype
):
    """Returns dx, dresidual, dweight and dbias, None where their dtype is None."""
    view = ChannelView(x, memory_format, across_samples=True)
    dy, x = view.blocks(dy), view.blocks(x)
    dweight = dbias = means = None
    with launch.on_device(x):
        if training or dweight_dtype is not None or dbias_dtype is not None:
            if training:
                means = mean.new_empty((2, *mean.shape))
            partials = _layout(view).sums(dy, mask, x, (None, None), (mean, rstd))
            count = x.numel() // view.channels
            dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype], means, count)
        dx, dresidual = _gradient(view, dy, mask, x, weight, (mean, rstd), means, dresidual_dtype)
    return dx, dresidual, dweight, dbias


def batch_norm_backward_sums(dy, mask, x, mean, rstd, memory_format):
    """Returns Σ dz and Σ dz · x̂: (2, C)."""
    view = ChannelView(x, memory_format, across_samples=True)
    dy, x, sums = view.blocks(dy), view.blocks(x), mean.new_empty((2, *mean.shape))
    with launch.on_device(x):
        column_sums(_layout(view).sums(dy, mask, x, (None, None), (mean, rstd)).rows, [None, None], sums)
    return sums


def batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, memory_format, dresidual_dtype):
    """means: (2, C), of dz and dz · x̂ over all elements. Returns dx and dresidual, None where its dtype is None."""
    view = ChannelView(x, memory_format, across_samples=True)
    dy, x = view.blocks(dy), view.blocks(x)
    with launch.on_device(x):
        return _gradient(view, dy, mask, x, weight, (mean, rstd), means, dresidual_dtype)


def _layout(view):
    return pixels if view.channels_last else planes


def _normalize(view, x, residual, affine, statistics, eps, relu, wants_mask, out_dtype):
    """y and the mask from blocks; with an eps the statistics are mean and variance, else mean and rstd."""
    y, mask = view.make_result(out_dtype), view.make_mask(relu and wants_mask)
    affine, activation = [contiguous(parameter) for parameter in affine], "relu" if relu else None
    _layout(view).normalize(x, residual, affine, statistics, view.blocks(y), mask, eps=eps, activation=activation)
    return y, mask


def _gradient(view, dy, mask, x, weight, statistics, means, dresidual_dtype):
    """dx and dresidual from blocks."""
    dx, dresidual = view.make_result(x.dtype), view.make_result(dresidual_dtype)
    affine, results = (contiguous(weight), None), (view.blocks(dx), view.blocks(dresidual))
    _layout(view).gradient(dy, mask, x, affine, statistics, means, *results)
    return dx, dresidual
