"""BatchNorm (Ioffe & Szegedy 2015) with a residual and a ReLU fused in: whole calls, and their parts for SyncBatchNorm.

x: (N, C, S), or (N, S, C) where channels_last; statistics are those of a channel in all samples.
"""

from __future__ import annotations

import torch

from . import launch, pixels, planes
from .moments import join_moments
from .tiles import column_sums


def batch_norm_forward(
    x, residual, weight, bias, running_mean, running_var, factor, momentum, eps, channels_last, relu, out_dtype
):
    """Returns y in out_dtype, the mask of relu, or None, and mean and rstd: (C,). Updates the running statistics."""
    channels = _channels(x, channels_last)
    with launch.on_device(x):
        partials = _layout(channels_last).moments(x)
        mean, rstd = (partials.values.new_empty(channels) for _ in range(2))
        running = running_mean, running_var
        join_moments(partials, mean, rstd, x.numel() // channels, eps, None, running, factor, momentum)
        y, mask = _normalize(x, residual, weight, bias, mean, rstd, None, channels_last, relu, relu, out_dtype)
    return y, mask, mean, rstd


def batch_norm_statistics(x, channels_last):
    """Returns mean and Σ(x − mean)²: (2, C)."""
    channels = _channels(x, channels_last)
    with launch.on_device(x):
        partials = _layout(channels_last).moments(x)
        moments = partials.values.new_empty((2, channels))
        join_moments(partials, *moments, x.numel() // channels, None)
    return moments


def batch_norm_normalize(x, residual, weight, bias, mean, rstd, channels_last, relu, out_dtype):
    """Returns y in out_dtype, and the mask of relu, or None."""
    with launch.on_device(x):
        return _normalize(x, residual, weight, bias, mean, rstd, None, channels_last, relu, relu, out_dtype)


def batch_norm_evaluate(
    x, residual, weight, bias, running_mean, running_var, eps, channels_last, relu, wants_mask, out_dtype
):
    """Returns y in out_dtype, and the mask of relu where it is wanted."""
    with launch.on_device(x):
        return _normalize(
            x, residual, weight, bias, running_mean, running_var, eps, channels_last, relu, wants_mask, out_dtype
        )


def batch_norm_backward(
    dy, mask, x, weight, mean, rstd, training, channels_last, dresidual_dtype, dweight_dtype, dbias_dtype
):
    """Returns dx, dresidual, dweight and dbias, None where their dtype is None."""
    dweight = dbias = means = None
    with launch.on_device(x):
        if training or dweight_dtype is not None or dbias_dtype is not None:
            if training:
                means = mean.new_empty((2, *mean.shape))
            partials = _layout(channels_last).sums(dy, mask, x, (None, None), (mean, rstd))
            count = x.numel() // _channels(x, channels_last)
            dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype], means, count)
        dx, dresidual = batch_norm_backward_apply(
            dy, mask, x, weight, mean, rstd, means, channels_last, dresidual_dtype
        )
    return dx, dresidual, dweight, dbias


def batch_norm_backward_sums(dy, mask, x, mean, rstd, channels_last):
    """Returns Σ dz and Σ dz · x̂: (2, C)."""
    sums = mean.new_empty((2, *mean.shape))
    with launch.on_device(x):
        column_sums(_layout(channels_last).sums(dy, mask, x, (None, None), (mean, rstd)).rows, [None, None], sums)
    return sums


def batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, channels_last, dresidual_dtype):
    """means: (2, C), of dz and dz · x̂ over all elements. Returns dx and dresidual, None where its dtype is None."""
    dx = x.new_empty(x.shape)
    dresidual = None if dresidual_dtype is None else x.new_empty(x.shape, dtype=dresidual_dtype)
    with launch.on_device(x):
        _layout(channels_last).gradient(dy, mask, x, (weight, None), (mean, rstd), means, dx, dresidual)
    return dx, dresidual


def _layout(channels_last):
    return pixels if channels_last else planes


def _channels(x, channels_last):
    return x.shape[2 if channels_last else 1]


def _normalize(x, residual, weight, bias, mean, spread, eps, channels_last, relu, wants_mask, out_dtype):
    """y and the mask; with an eps the spread is the variance, else it is rstd."""
    y = x.new_empty(x.shape, dtype=out_dtype)
    mask = x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8) if relu and wants_mask else None
    _layout(channels_last).normalize(
        x, residual, (weight, bias), (mean, spread), y, mask, eps=eps, activation="relu" if relu else None
    )
    return y, mask
