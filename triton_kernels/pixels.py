"""The kernels of batch_norm and group_norm where the channels of a pixel are adjacent: (N, S, C).

A tile's rows are vectors of adjacent channels, `VECTORS` of them side by side, `PIXELS` pixels below each other; a
program keeps its channels and goes along the pixels of a slice.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .activations import activated, affine, input_gradient, normalized, relu_gradient, silu_gradient, statistics
from .compiler import no_fma
from .jit import jit
from .moments import Partials, add_tiles, join_lanes, load_centered, moment_numbers
from .tiles import load_tile, store_tile
from .types import stat_dtype


@triton.jit
def _begin(n_pixels, n_blocks, slice_pixels, VECTORS: tl.constexpr, PIXELS: tl.constexpr):
    """This program's sample, the first pixel of its slice and how many it has; the tile's vectors of channels and its
    pixels, (rows, 1)."""
    row = tl.arange(0, VECTORS * PIXELS)[:, None]
    sample, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    start = tl.program_id(1).to(tl.int64) * slice_pixels
    size = tl.minimum(n_pixels - start, slice_pixels).to(tl.int32)
    return sample.to(tl.int64), start, size, block * VECTORS + row % VECTORS, row // VECTORS


@triton.jit
def tile_offset(sample, pixel, strides, ALIGN: tl.constexpr):
    """A pixel's first channel. Strides are those of samples and pixels, in ALIGN elements: what addresses are
    multiples of is then known at compile time, whatever the sizes."""
    return (sample * strides[0] + pixel.to(tl.int64) * strides[1]) * ALIGN


@triton.jit
def _statistic_at(sample, channel, n_channels, span, GROUPED: tl.constexpr):
    """Where the statistics of a channel are: pooled over the samples, or those of its group of `span` channels."""
    if GROUPED:
        return sample * (n_channels // span) + channel // span
    else:
        return channel


_SIZES = ["n_pixels", "channel_steps", "n_blocks", "slice_pixels", "span"]


@jit(do_not_specialize=_SIZES)  # one code for every size
def _pixels_moments_kernel(
    x_ptr, moments_ptr, x_strides, n_pixels, channel_steps, n_blocks, slice_pixels, span, GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """mean(x) and var(x) of this program's channels in its slice of the pixels; x₀ is the first pixel's element of the
    channel, or of the first of its group's `span` channels."""
    stat = moments_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, slice_pixels, VECTORS, PIXELS)
    channel, n_channels = vector * WIDTH + tl.arange(0, WIDTH)[None, :], channel_steps * ALIGN
    origin_ptr = x_ptr
    if GROUPED:
        origin_ptr += sample * x_strides[0] * ALIGN
    origin = tl.load(origin_ptr + (channel - channel % span), mask=channel < n_channels, other=0.0)
    x_ptr += tile_offset(sample, start + pixel, x_strides, ALIGN) + channel
    mean = tl.zeros((VECTORS * PIXELS, WIDTH), stat)
    variance = mean
    seen = tl.zeros((VECTORS * PIXELS, 1), stat)
    for done in range(0, size, DEPTH * PIXELS):
        tiles, masks = (), ()
        added = tl.zeros((VECTORS * PIXELS, 1), stat)
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            mask = pixel + here < size
            at = tile_offset(0, here, x_strides, ALIGN)
            tiles = tiles + (load_centered(x_ptr + at, mask & (channel < n_channels), origin, stat),)
            masks = masks + (mask,)
            added += mask.to(stat)
        mean, variance, seen = add_tiles(mean, variance, seen, tiles, masks, added, False, DEPTH)
    shape: tl.constexpr = (PIXELS, VECTORS * WIDTH)
    share = tl.reshape(seen.to(tl.float64) / size.to(tl.float64) + tl.zeros(mean.shape, tl.float64), shape)
    mean, variance = join_lanes(tl.reshape(mean, shape), tl.reshape(variance, shape), share, 0)
    channel = _block_channels(n_blocks, VECTORS * WIDTH)
    origin = tl.load(origin_ptr + (channel - channel % span), mask=channel < n_channels, other=0.0)
    _store_partials(moments_ptr, moment_numbers(mean, variance, origin, stat), channel, n_blocks, n_channels)


@triton.jit
def _block_channels(n_blocks, COLS: tl.constexpr):
    return tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _store_partials(partial_ptr, numbers, channel, n_blocks, n_channels):
    """Numbers of each channel of the tile, (1, channels), in (numbers, samples, slices, channels)."""
    n_slices = tl.num_programs(1)
    at = (tl.program_id(0) // n_blocks * n_slices + tl.program_id(1)).to(tl.int64) * n_channels + channel
    n_partials = (tl.num_programs(0) // n_blocks * n_slices).to(tl.int64) * n_channels
    for i in tl.static_range(len(numbers)):
        store_tile(partial_ptr + n_partials * i + at, numbers[i], channel < n_channels)


@jit(do_not_specialize=_SIZES)  # one code for every size
def _pixels_normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, spread_ptr, y_ptr, mask_ptr,
    x_strides, residual_strides, y_strides, mask_strides, n_pixels, channel_steps, n_blocks, slice_pixels, span,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · rstd · w + b + residual)."""
    stat: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, slice_pixels, VECTORS, PIXELS)
    channel, n_channels = vector * WIDTH + tl.arange(0, WIDTH)[None, :], channel_steps * ALIGN
    col_mask = channel < n_channels
    x_ptr += tile_offset(sample, start + pixel, x_strides, ALIGN) + channel
    y_ptr += tile_offset(sample, start + pixel, y_strides, ALIGN) + channel
    if residual_ptr is not None:
        residual_ptr += tile_offset(sample, start + pixel, residual_strides, ALIGN) + channel
    if mask_ptr is not None:
        mask_ptr += tile_offset(sample, start + pixel, mask_strides, 1) + vector
    at = _statistic_at(sample, channel, n_channels, span, GROUPED)
    mean, rstd = statistics(mean_ptr, spread_ptr, at, col_mask, stat, EPS)
    w, b = affine(weight_ptr, bias_ptr, channel, col_mask, stat)
    for done in range(0, size, DEPTH * PIXELS):
        tiles, residuals = (), ()
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            mask = (pixel + here < size) & col_mask
            tiles = tiles + (load_tile(x_ptr + tile_offset(0, here, x_strides, ALIGN), mask, stat),)
            if residual_ptr is not None:
                residual = load_tile(residual_ptr + tile_offset(0, here, residual_strides, ALIGN), mask, stat)
                residuals = residuals + (residual,)
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            row_mask = (pixel + here < size) & (vector * WIDTH < n_channels)
            mask = (pixel + here < size) & col_mask
            z = normalized(tiles[t], mean, rstd * w, b, EPS is not None)
            if residual_ptr is not None:
                z += residuals[t]
            bytes_ptr = mask_ptr + tile_offset(0, here, mask_strides, 1) if mask_ptr is not None else None
            y = activated(z, bytes_ptr, row_mask, mask, ACTIVATION, WIDTH, RAGGED)
            store_tile(y_ptr + tile_offset(0, here, y_strides, ALIGN), y, mask)


@triton.jit
def _dz(
    dy, c, mask_ptr, row_mask, scale, bias, here, mask_strides, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The gradient before the activation; relu's is known by the mask, silu's is worked out again."""
    if mask_ptr is not None:
        return relu_gradient(dy, mask_ptr + tile_offset(0, here, mask_strides, 1), row_mask, WIDTH)
    elif ACTIVATION == "silu":
        return silu_gradient(dy, c * scale + bias)
    else:
        return dy


@jit(do_not_specialize=_SIZES)  # one code for every size
def _pixels_sums_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr,
    dy_strides, mask_strides, x_strides, n_pixels, channel_steps, n_blocks, slice_pixels, span,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · x̂ of this program's channels in its slice of the pixels."""
    stat = sums_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, slice_pixels, VECTORS, PIXELS)
    channel, n_channels = vector * WIDTH + tl.arange(0, WIDTH)[None, :], channel_steps * ALIGN
    col_mask = channel < n_channels
    dy_ptr += tile_offset(sample, start + pixel, dy_strides, ALIGN) + channel
    x_ptr += tile_offset(sample, start + pixel, x_strides, ALIGN) + channel
    if mask_ptr is not None:
        mask_ptr += tile_offset(sample, start + pixel, mask_strides, 1) + vector
    at = _statistic_at(sample, channel, n_channels, span, GROUPED)
    mean, rstd = statistics(mean_ptr, rstd_ptr, at, col_mask, stat, None)
    w, b = affine(weight_ptr, bias_ptr, channel, col_mask, stat)
    total = tl.zeros((VECTORS * PIXELS, WIDTH), stat)
    product = total
    for done in range(0, size, DEPTH * PIXELS):
        tiles, gradients = (), ()
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            mask = (pixel + here < size) & col_mask
            tiles = tiles + (load_tile(x_ptr + tile_offset(0, here, x_strides, ALIGN), mask, stat),)
            gradients = gradients + (load_tile(dy_ptr + tile_offset(0, here, dy_strides, ALIGN), mask, stat),)
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            row_mask = (pixel + here < size) & (vector * WIDTH < n_channels)
            c = tiles[t] - mean
            dz = _dz(gradients[t], c, mask_ptr, row_mask, rstd * w, b, here, mask_strides, ACTIVATION, WIDTH)
            total += dz
            product += dz * c
    shape: tl.constexpr = (PIXELS, VECTORS * WIDTH)
    # a lane has few terms; those of all lanes together deserve more bits
    total = tl.sum(tl.reshape(total.to(tl.float64), shape), axis=0, keep_dims=True)
    product = tl.sum(tl.reshape(no_fma(product.to(tl.float64), rstd.to(tl.float64)), shape), axis=0, keep_dims=True)
    _store_partials(sums_ptr, (total, product), _block_channels(n_blocks, VECTORS * WIDTH), n_blocks, n_channels)


@jit(do_not_specialize=_SIZES)  # one code for every size
def _pixels_gradient_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, dresidual_ptr,
    dy_strides, mask_strides, x_strides, dx_strides, n_pixels, channel_steps, n_blocks, slice_pixels, span,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx = (w · dz − mean(w · dz) − x̂ · mean(w · dz · x̂)) · rstd; dresidual = dz. The means, where there are any, have
    w in them only where it differs within them."""
    stat = rstd_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, slice_pixels, VECTORS, PIXELS)
    channel, n_channels = vector * WIDTH + tl.arange(0, WIDTH)[None, :], channel_steps * ALIGN
    col_mask = channel < n_channels
    dy_ptr += tile_offset(sample, start + pixel, dy_strides, ALIGN) + channel
    dx_at = tile_offset(sample, start + pixel, dx_strides, ALIGN) + channel
    at = _statistic_at(sample, channel, n_channels, span, GROUPED)
    mean, rstd = statistics(mean_ptr, rstd_ptr, at, col_mask, stat, None)
    w, b = affine(weight_ptr, bias_ptr, channel, col_mask, stat)
    if mask_ptr is not None:
        mask_ptr += tile_offset(sample, start + pixel, mask_strides, 1) + vector
    if means_ptr is not None:
        x_ptr += tile_offset(sample, start + pixel, x_strides, ALIGN) + channel
        n_units = tl.num_programs(0) // n_blocks * (n_channels // span) if GROUPED else n_channels
        mean_dz = load_tile(means_ptr + at, col_mask, stat)
        slope = load_tile(means_ptr + n_units + at, col_mask, stat) * rstd
    for done in range(0, size, DEPTH * PIXELS):
        tiles, gradients = (), ()
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            mask = (pixel + here < size) & col_mask
            if means_ptr is not None:
                tiles = tiles + (load_tile(x_ptr + tile_offset(0, here, x_strides, ALIGN), mask, stat),)
            gradients = gradients + (load_tile(dy_ptr + tile_offset(0, here, dy_strides, ALIGN), mask, stat),)
        for t in tl.static_range(DEPTH):
            here = done + t * PIXELS
            row_mask = (pixel + here < size) & (vector * WIDTH < n_channels)
            mask = (pixel + here < size) & col_mask
            c = tiles[t] - mean if means_ptr is not None else None
            dz = _dz(gradients[t], c, mask_ptr, row_mask, rstd * w, b, here, mask_strides, ACTIVATION, WIDTH)
            dx = dz * (rstd * w)
            if means_ptr is not None:
                dx = input_gradient(dz, c, w, rstd, mean_dz, slope, GROUPED)
            out_at = dx_at + tile_offset(0, here, dx_strides, ALIGN)
            store_tile(dx_ptr + out_at, dx, mask)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr + out_at, dz, mask)


class _Walk(NamedTuple):
    """How tensors (N, S, C) are walked."""

    align: int
    sizes: tuple[int, ...]  # n_pixels, channel_steps, n_blocks, slice_pixels
    grid: tuple[int, int]
    tiles: dict[str, int]
    ragged: bool

    def strides(self, t):
        """Of samples and pixels, in `align` elements; zero where there is one of them."""
        if t is None:
            return (0, 0)
        return tuple(0 if n == 1 else s // self.align for n, s in zip(t.shape[:2], t.stride()[:2], strict=True))


def _walk(tensors, depth, mask=None, lone_samples=False):
    """A mask has a byte for each vector. lone_samples: slices as if there were one sample, so that what is summed in
    one does not depend on the others."""
    shape = tensors[0].shape
    align = launch.vector_width(shape[2], tensors)
    return _walk_of(shape, align, depth, mask is not None, lone_samples, launch.multiprocessors())


@launch.remembered
def _walk_of(shape, align, depth, has_mask, lone_samples, multiprocessors):
    samples, n_pixels, channels = shape
    width = 8 if has_mask else align
    depth = max(1, depth * align // width)  # narrow accesses are many, and each needs its registers
    tiling = launch.channel_vectors(launch.ceil_div(channels, width), n_pixels, depth)
    blocks = launch.ceil_div(channels, width * tiling.vectors)
    slice_pixels = launch.slice_length(
        n_pixels, tiling.step, blocks if lone_samples else samples * blocks, multiprocessors
    )
    return _Walk(
        align, (n_pixels, channels // align, blocks, slice_pixels),
        (samples * blocks, launch.ceil_div(n_pixels, slice_pixels)),
        dict(ALIGN=align, WIDTH=width, VECTORS=tiling.vectors, PIXELS=tiling.pixels, DEPTH=tiling.depth),
        channels % width > 0,
    )  # fmt: skip


def _partials(walk, numbers, x):
    """Room for what the slices leave of each channel."""
    samples, n_pixels, channels = x.shape
    values = x.new_empty((numbers, samples, walk.grid[1], channels), dtype=stat_dtype(x))
    return Partials(values, walk.sizes[-1], n_pixels)


def moments(x, groups=None):
    """x: (N, S, C). Partial means and variances of the channels in each sample."""
    walk = _walk([x], launch.MOMENTS_DEPTH, lone_samples=groups is not None)
    partials = _partials(walk, 3, x)
    # grid: (samples times blocks of channels, slices)
    _pixels_moments_kernel[walk.grid](
        x, partials.values, walk.strides(x), *walk.sizes, x.shape[2] // (groups or x.shape[2]),
        GROUPED=groups is not None, **walk.tiles, **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip
    return partials


def normalize(x, residual, affine, statistics, y, mask, *, eps=None, groups=None, activation=None):
    """Fills y, and the mask where there is one. affine: weight and bias; statistics: mean and rstd, or with an eps the
    variance."""
    walk = _walk([t for t in (x, residual, y) if t is not None], launch.STREAM_DEPTH, mask)
    # grid: (samples times blocks of channels, slices)
    _pixels_normalize_kernel[walk.grid](
        x, residual, *affine, *statistics, y, mask, *map(walk.strides, (x, residual, y)), _byte_strides(walk, mask),
        *walk.sizes, x.shape[2] // (groups or x.shape[2]), EPS=eps, ACTIVATION=activation, GROUPED=groups is not None,
        RAGGED=walk.ragged, **walk.tiles, **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip


def _byte_strides(walk, mask):
    return walk._replace(align=1).strides(mask)


def sums(dy, mask, x, affine, statistics, *, groups=None, silu=False):
    """Partial Σ dz and Σ dz · x̂ of the channels in each sample."""
    walk = _walk([dy, x], launch.STREAM_DEPTH, mask, groups is not None)
    partials = _partials(walk, 2, x)
    # grid: (samples times blocks of channels, slices)
    _pixels_sums_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, partials.values,
        walk.strides(dy), _byte_strides(walk, mask), walk.strides(x), *walk.sizes, x.shape[2] // (groups or x.shape[2]),
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, **walk.tiles,
        **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip
    return partials


def gradient(dy, mask, x, affine, statistics, means, dx, dresidual, *, groups=None, silu=False):
    """Fills dx, and dresidual where there is one. means: of dz and dz · x̂, without the weight where a unit has one;
    None where the statistics were given and not computed."""
    walk = _walk([t for t in (dy, x, dx, dresidual) if t is not None], launch.STREAM_DEPTH, mask)
    # grid: (samples times blocks of channels, slices)
    _pixels_gradient_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, means, dx, dresidual,
        walk.strides(dy), _byte_strides(walk, mask), walk.strides(x), walk.strides(dx),
        *walk.sizes, x.shape[2] // (groups or x.shape[2]),
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, **walk.tiles,
        **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip
