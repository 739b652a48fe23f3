"""GroupNorm (Wu & He 2018), alone and with a SiLU behind it, forward and backward."""

from __future__ import annotations

from . import launch, pixels, planes
from .moments import group_means, join_moments
from .tiles import column_sums


def group_norm_forward(x, groups, weight, bias, eps, channels_last, silu, out_dtype):
    """x: (N, C, S), or (N, S, C) where channels_last. Returns y in out_dtype, mean and rstd: (N, groups)."""
    layout = pixels if channels_last else planes
    y = x.new_empty(x.shape, dtype=out_dtype)
    activation = "silu" if silu else None
    with launch.on_device(x):
        partials = layout.moments(x, groups)
        mean, rstd = (partials.values.new_empty((x.shape[0], groups)) for _ in range(2))
        join_moments(partials, mean, rstd, x[0].numel() // groups, eps, groups)
        layout.normalize(x, None, (weight, bias), (mean, rstd), y, None, groups=groups, activation=activation)
    return y, mean, rstd


def group_norm_backward(
    dy, x, groups, weight, bias, mean, rstd, channels_last, silu, dweight_dtype, dbias_dtype
):  # fmt: skip
    """dy: as x. Returns dx, dweight and dbias: (C,), None where their dtype is None."""
    layout = pixels if channels_last else planes
    dx = x.new_empty(x.shape)
    affine, statistics = (weight, bias), (mean, rstd)
    with launch.on_device(x):
        partials = layout.sums(dy, None, x, affine, statistics, groups=groups, silu=silu)
        means = group_means(partials, weight, x[0].numel() // groups, groups)
        dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype])
        layout.gradient(dy, None, x, affine, statistics, means, dx, None, groups=groups, silu=silu)
    return dx, dweight, dbias
