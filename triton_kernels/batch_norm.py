"""BatchNorm (Ioffe & Szegedy 2015) with a residual and a ReLU fused in, and its steps one by one for SyncBatchNorm.

x: (N, C, *), any strides; residual and dy: like x. Statistics and sums are of a channel over all samples: (C,). Results
like x have the given memory format. The kernels are in planes.py for contiguous results and in pixels.py for
channels_last ones and odd planes; moments.py joins the statistics of their chunks, tiles.column_sums their sums.

dz is dy where the ReLU passed, x̂ = (x − mean) · rstd, dx = (w · dz − c2 − x̂ · c1) · rstd with c1 = mean(w · dz · x̂)
and c2 = mean(w · dz). A mask of the ReLU has one bit an element.
"""

from __future__ import annotations

import torch

from ..operators import OPERATORS
from ..views import ChannelView, contiguous
from . import channel_launch, launch, pixels, planes
from .moments import join_moments
from .tiles import column_sums


class _View(ChannelView):
    """How a call's kernels see its tensors: `layout` is their module. Odd planes are pixels of `parts` columns a
    channel, (1, N, C · S)."""

    def __init__(self, x, memory_format):
        super().__init__(x, memory_format, across_samples=True)
        self.layout, self.parts = pixels if self.channels_last else planes, 1
        if not self.channels_last and channel_launch.odd_planes(*self.shape):
            samples, channels, size = self.shape
            self.layout, self.parts, self.shape = pixels, size, (1, samples, channels * size)
            self.mask_shape = 1, samples, channels * size // 8

    def moments(self, x):
        """Partial moments of blocks."""
        return pixels.moments(x, parts=self.parts) if self.layout is pixels else planes.moments(x)


def _has_mask(launcher):
    """Gives the launcher a fake implementation that knows how the mask of odd planes is packed."""
    usual = OPERATORS[launcher.__name__].fake

    def fake(x, *arguments):
        y, mask, *statistics = usual(x, *arguments)
        if mask is not None and mask.shape[0] > 1:  # of planes
            mask = mask.new_empty(_View(x, torch.contiguous_format).mask_shape)
        return y, mask, *statistics

    launcher.fake = fake
    return launcher


@_has_mask
def batch_norm_forward(
    x, residual, weight, bias, running_mean, running_var, factor, momentum, eps, memory_format, relu, out_dtype
):
    """Returns y in out_dtype, the ReLU's mask or None, and mean and rstd: (C,). Updates the running statistics, unless
    they are None, by factor, a tensor, or by momentum."""
    view = _View(x, memory_format)
    x, residual = view.blocks(x), view.blocks(residual)
    with launch.on_device(x):
        partials = view.moments(x)
        mean, rstd = (partials.values.new_empty(view.channels) for _ in range(2))
        running = running_mean, running_var
        join_moments(partials, mean, rstd, x.numel() // view.channels, eps, None, running, factor, momentum)
        y, mask = _normalize(view, x, residual, (weight, bias), (mean, rstd), None, relu, relu, out_dtype)
    return y, mask, mean, rstd


def batch_norm_statistics(x, memory_format):
    """Returns the moments mean and m2 = Σ(x − mean)²: (2, C)."""
    view = _View(x, memory_format)
    x = view.blocks(x)
    with launch.on_device(x):
        partials = view.moments(x)
        moments = partials.values.new_empty((2, view.channels))
        join_moments(partials, *moments, x.numel() // view.channels, None)
    return moments


@_has_mask
def batch_norm_normalize(x, residual, weight, bias, mean, rstd, memory_format, relu, out_dtype):
    """Returns y in out_dtype, and the ReLU's mask or None."""
    view = _View(x, memory_format)
    x, residual = view.blocks(x), view.blocks(residual)
    with launch.on_device(x):
        return _normalize(view, x, residual, (weight, bias), (mean, rstd), None, relu, relu, out_dtype)


@_has_mask
def batch_norm_evaluation(
    x, residual, weight, bias, running_mean, running_var, eps, memory_format, relu, wants_mask, out_dtype
):
    """Normalises by the running statistics. Returns y in out_dtype, and the ReLU's mask if it is wanted, else None."""
    view = _View(x, memory_format)
    x, residual, statistics = view.blocks(x), view.blocks(residual), (running_mean, running_var)
    with launch.on_device(x):
        return _normalize(view, x, residual, (weight, bias), statistics, eps, relu, wants_mask, out_dtype)


def batch_norm_backward(
    dy, mask, x, weight, mean, rstd, training, memory_format, dresidual_dtype, dweight_dtype, dbias_dtype
):
    """Returns dx, dresidual, dweight and dbias; the last three are None where their dtype is None. Not training: mean
    and rstd are constants, and dx = w · dz · rstd."""
    view = _View(x, memory_format)
    dy, x = view.blocks(dy), view.blocks(x)
    dweight = dbias = means = None
    with launch.on_device(x):
        if training or dweight_dtype is not None or dbias_dtype is not None:
            if training:
                means = mean.new_empty((2, *mean.shape))
            partials = view.layout.sums(dy, contiguous(mask), x, (None, None), (mean, rstd))
            count = x.numel() // view.channels
            dbias, dweight = column_sums(partials.rows, [dbias_dtype, dweight_dtype], means, count)
        dx, dresidual = _gradient(view, dy, mask, x, weight, (mean, rstd), means, dresidual_dtype)
    return dx, dresidual, dweight, dbias


def batch_norm_backward_sums(dy, mask, x, mean, rstd, memory_format):
    """Returns Σ dz and Σ dz · x̂: (2, C)."""
    view = _View(x, memory_format)
    dy, x, sums = view.blocks(dy), view.blocks(x), mean.new_empty((2, *mean.shape))
    with launch.on_device(x):
        column_sums(view.layout.sums(dy, contiguous(mask), x, (None, None), (mean, rstd)).rows, [None, None], sums)
    return sums


def batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, memory_format, dresidual_dtype):
    """means: (2, C), of dz and of dz · x̂ over all elements. Returns dx, and dresidual, None if its dtype is None."""
    view = _View(x, memory_format)
    dy, x = view.blocks(dy), view.blocks(x)
    with launch.on_device(x):
        return _gradient(view, dy, mask, x, weight, (mean, rstd), means, dresidual_dtype)


def _normalize(view, x, residual, affine, statistics, eps, relu, wants_mask, out_dtype):
    """y and the mask, or None, from blocks. statistics: mean and rstd, or, with an eps, mean and variance."""
    y, mask = view.make_result(out_dtype), view.make_mask(relu and wants_mask)
    affine, activation = [contiguous(parameter) for parameter in affine], "relu" if relu else None
    view.layout.normalize(x, residual, affine, statistics, view.blocks(y), mask, eps=eps, activation=activation)
    return y, mask


def _gradient(view, dy, mask, x, weight, statistics, means, dresidual_dtype):
    """dx, and dresidual or None, from blocks."""
    dx, dresidual = view.make_result(x.dtype), view.make_result(dresidual_dtype)
    affine, results = (contiguous(weight), None), (view.blocks(dx), view.blocks(dresidual))
    view.layout.gradient(dy, contiguous(mask), x, affine, statistics, means, *results)
    return dx, dresidual
