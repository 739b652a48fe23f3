"""GroupNorm (Wu & He 2018), alone and with a SiLU after it, forward and backward.

The kernels are batch_norm's: planes.py for contiguous results, pixels.py for channels_last ones; moments.py joins the
statistics and sums of their chunks into those of the groups.
"""

from __future__ import annotations

import torch

from ..views import ChannelView, contiguous
from . import kept_groups, launch, pixels, planes
from .moments import group_means, join_moments
from .tiles import column_sums
from .types import stat_dtype


def group_norm_forward(x, groups, weight, bias, eps, memory_format, silu, out_dtype):
    """x: (N, C, *), any strides; weight, bias: (C,) or None.

    Returns y: like x, in the memory format and out_dtype; mean, rstd: (N, groups)."""
    view = ChannelView(x, memory_format, across_samples=False)
    layout = pixels if view.channels_last else planes
    x, y, affine = view.blocks(x), view.make_result(out_dtype), (contiguous(weight), contiguous(bias))
    activation = "silu" if silu else None
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=stat_dtype(x)) for _ in range(2))
    kept = kept_groups.kept(x.shape, groups, view.channels_last, launch.access_bytes([x, y]), 1)
    with launch.on_device(x):
        if kept:
            kept_groups.forward(kept, x, affine, view.blocks(y), mean, rstd, eps, activation)
            return y, mean, rstd
        partials = layout.moments(x, groups)
        join_moments(partials, mean, rstd, x[0].numel() // groups, eps, groups)
        layout.normalize(x, None, affine, (mean, rstd), view.blocks(y), None, groups=groups, activation=activation)
    return y, mean, rstd


def group_norm_backward(
    dy, x, groups, weight, bias, mean, rstd, memory_format, silu, dweight_dtype, dbias_dtype
):  # fmt: skip
    """dy: like x. Returns dx: like x, in the memory format; dweight, dbias: (C,), None where their dtype is None."""
    view = ChannelView(x, memory_format, across_samples=False)
    layout = pixels if view.channels_last else planes
    dy, x, dx = view.blocks(dy), view.blocks(x), view.make_result(x.dtype)
    affine, statistics = (contiguous(weight), contiguous(bias)), (mean, rstd)
    kept = kept_groups.kept(x.shape, groups, view.channels_last, launch.access_bytes([dy, x]), 2)
    with launch.on_device(x):
        if kept:
            activation = "silu" if silu else None
            partials = kept_groups.backward(kept, dy, x, affine, statistics, view.blocks(dx), activation)
            dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype])
            return dx, dweight, dbias
        partials = layout.sums(dy, None, x, affine, statistics, groups=groups, silu=silu)
        means = group_means(partials, affine[0], x[0].numel() // groups, groups)
        dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype])
        if x[0].numel() == groups:
            statistics = mean, torch.zeros_like(rstd)  # groups of one element: dx is exactly 0, without rounding errors
        layout.gradient(dy, None, x, affine, statistics, means, view.blocks(dx), None, groups=groups, silu=silu)
    return dx, dweight, dbias
