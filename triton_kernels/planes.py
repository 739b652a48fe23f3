"""The kernels of batch_norm and group_norm where the positions of a channel are adjacent: (N, C, S).

A unit has its own statistics: a channel of all samples, or the adjacent channels of a sample's group. It is made of
segments, which are planes of S elements, and is walked along vectors, which are rows of a tile and parts of a segment:
in one order through all segments, so that no lane is idle where a plane is short, or is no power of two long.
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
from .tiles import load_tile, store_tile, sum_pair
from .types import stat_dtype


@triton.jit
def _begin(n_units, n_vectors, row_vectors, slice_vectors, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Where the lanes of this program's slice begin: unit, lane in the unit, segment and vector in the segment, all
    (rows, 1) but for the unit of a program that has one; the vectors of the slice, and of each lane's unit."""
    row = tl.arange(0, UNITS * LANES)[:, None]
    start = tl.program_id(1).to(tl.int64) * slice_vectors
    size = tl.minimum(n_vectors - start, slice_vectors).to(tl.int32)
    if UNITS == 1:
        unit, lane, left = tl.program_id(0), row, size
    else:
        unit, lane = tl.program_id(0) * UNITS + row // LANES, row % LANES
        left = tl.where(unit < n_units, size, 0)
        unit = tl.minimum(unit, n_units - 1)
    segment = start // row_vectors
    vector = (start - segment * row_vectors).to(row_vectors.dtype) + lane
    return unit, lane, segment + vector // row_vectors, vector % row_vectors, size, left


@triton.jit
def _advance(segment, vector, row_vectors, LANES: tl.constexpr):
    """The place LANES vectors on."""
    vector += LANES % row_vectors
    wraps = vector >= row_vectors
    return segment + LANES // row_vectors + wraps.to(tl.int64), tl.where(wraps, vector - row_vectors, vector)


@triton.jit
def unit_offset(unit, n_inner, strides, ALIGN: tl.constexpr):
    """The first element of a unit. Strides are those of samples, units and segments, in ALIGN elements: what addresses
    are multiples of is then known at compile time, whatever the sizes."""
    outer, inner = unit // n_inner, unit % n_inner
    return (tl.cast(outer, tl.int64) * strides[0] + tl.cast(inner, tl.int64) * strides[1]) * ALIGN


@triton.jit
def vector_offset(segment, vector, strides, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """The first element of a vector in its unit."""
    return segment * strides[2] * ALIGN + vector.to(tl.int64) * WIDTH


@triton.jit
def _element_mask(row_mask, vector, cols, row_cols, RAGGED: tl.constexpr):
    """That of the rows, without the elements past a segment's end."""
    if RAGGED:
        return row_mask & (vector * cols.shape[1] + cols < row_cols)
    else:
        return row_mask


_SIZES = ["n_units", "n_inner", "n_vectors", "row_vectors", "row_steps", "slice_vectors", "n_segments", "span"]


@jit(do_not_specialize=_SIZES)  # one code for every size
def _planes_moments_kernel(
    x_ptr, moments_ptr, x_strides, n_units, n_inner, n_vectors, row_vectors, row_steps, slice_vectors,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """mean(x) and var(x) of this program's slice of its units; x₀ is the unit's first element."""
    stat = moments_ptr.dtype.element_ty
    unit, lane, segment, vector, size, left = _begin(n_units, n_vectors, row_vectors, slice_vectors, UNITS, LANES)
    first_ptr = x_ptr
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN)
    origin = tl.load(x_ptr + tl.zeros((1, 1), tl.int32))
    x_ptr += tl.arange(0, WIDTH)[None, :]
    mean = tl.zeros((UNITS * LANES, 1), stat)
    variance, seen = mean, mean
    for done in range(0, size, DEPTH * LANES):
        tiles, masks = (), ()
        added = tl.zeros((UNITS * LANES, 1), stat)
        for t in tl.static_range(DEPTH):
            mask = lane + (done + t * LANES) < left
            at = vector_offset(segment, vector, x_strides, WIDTH, ALIGN)
            tiles, masks = tiles + (load_centered(x_ptr + at, mask, origin, stat),), masks + (mask,)
            added += mask.to(stat) * WIDTH
            segment, vector = _advance(segment, vector, row_vectors, LANES)
        mean, variance, seen = add_tiles(mean, variance, seen, tiles, masks, added, True, DEPTH)
    share = tl.reshape(seen.to(tl.float64) / (size.to(tl.int64) * WIDTH).to(tl.float64), (UNITS, LANES))
    mean, variance = join_lanes(tl.reshape(mean, (UNITS, LANES)), tl.reshape(variance, (UNITS, LANES)), share, 1)
    units = tl.minimum(tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None], n_units - 1)
    origin = tl.load(first_ptr + unit_offset(units, n_inner, x_strides, ALIGN))
    _store_partials(moments_ptr, moment_numbers(mean, variance, origin, stat), n_units, n_inner, UNITS)


@triton.jit
def _store_partials(partial_ptr, numbers, n_units, n_inner, UNITS: tl.constexpr):
    """Numbers of each unit, (UNITS, 1), in (numbers, outer, slices, inner)."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    n_slices = tl.num_programs(1)
    at = (unit // n_inner * n_slices + tl.program_id(1)).to(tl.int64) * n_inner + unit % n_inner
    for i in tl.static_range(len(numbers)):
        store_tile(partial_ptr + tl.cast(n_units, tl.int64) * n_slices * i + at, numbers[i], unit < n_units)


@jit(do_not_specialize=_SIZES)  # one code for every size
def _planes_normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, spread_ptr, y_ptr, mask_ptr,
    x_strides, residual_strides, y_strides, mask_strides,
    n_units, n_inner, n_vectors, row_vectors, row_steps, slice_vectors, n_segments,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · rstd · w + b + residual)."""
    stat: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, lane, segment, vector, size, left = _begin(n_units, n_vectors, row_vectors, slice_vectors, UNITS, LANES)
    cols = tl.arange(0, WIDTH)[None, :]
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN) + cols
    y_ptr += unit_offset(unit, n_inner, y_strides, ALIGN) + cols
    if residual_ptr is not None:
        residual_ptr += unit_offset(unit, n_inner, residual_strides, ALIGN) + cols
    if mask_ptr is not None:
        mask_ptr += unit_offset(unit, n_inner, mask_strides, 1)
    mean, rstd = statistics(mean_ptr, spread_ptr, unit, None, stat, EPS)
    if not GROUPED:
        w, b = affine(weight_ptr, bias_ptr, unit % n_inner, None, stat)
    for done in range(0, size, DEPTH * LANES):
        tiles, residuals, segments, vectors = (), (), (), ()
        for t in tl.static_range(DEPTH):
            row_mask = lane + (done + t * LANES) < left
            mask = _element_mask(row_mask, vector, cols, row_steps * ALIGN, RAGGED)
            tiles = tiles + (load_tile(x_ptr + vector_offset(segment, vector, x_strides, WIDTH, ALIGN), mask, stat),)
            if residual_ptr is not None:
                at = vector_offset(segment, vector, residual_strides, WIDTH, ALIGN)
                residuals = residuals + (load_tile(residual_ptr + at, mask, stat),)
            segments, vectors = segments + (segment,), vectors + (vector,)
            segment, vector = _advance(segment, vector, row_vectors, LANES)
        for t in tl.static_range(DEPTH):
            row_mask = lane + (done + t * LANES) < left
            mask = _element_mask(row_mask, vectors[t], cols, row_steps * ALIGN, RAGGED)
            if GROUPED:
                channel = unit % n_inner * n_segments + segments[t]
                w, b = affine(weight_ptr, bias_ptr, channel, row_mask, stat)
            z = normalized(tiles[t], mean, rstd * w, b, EPS is not None)
            if residual_ptr is not None:
                z += residuals[t]
            bytes_ptr = mask_ptr
            if mask_ptr is not None:
                bytes_ptr += vector_offset(segments[t], vectors[t], mask_strides, 1, 1)
            y = activated(z, bytes_ptr, row_mask, mask, ACTIVATION, WIDTH, RAGGED)
            store_tile(y_ptr + vector_offset(segments[t], vectors[t], y_strides, WIDTH, ALIGN), y, mask)


@triton.jit
def _dz(
    dy, c, mask_ptr, row_mask, scale, bias, segment, vector, mask_strides,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation; relu's is known by the mask, silu's is worked out again."""
    if mask_ptr is not None:
        return relu_gradient(dy, mask_ptr + vector_offset(segment, vector, mask_strides, 1, 1), row_mask, WIDTH)
    elif ACTIVATION == "silu":
        return silu_gradient(dy, c * scale + bias)
    else:
        return dy


@jit(do_not_specialize=_SIZES)  # one code for every size
def _planes_sums_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr,
    dy_strides, mask_strides, x_strides,
    n_units, n_inner, n_vectors, row_vectors, row_steps, slice_vectors, span,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · x̂ of this program's slice of its units; `span` adjacent units have one mean."""
    stat = sums_ptr.dtype.element_ty
    unit, lane, segment, vector, size, left = _begin(n_units, n_vectors, row_vectors, slice_vectors, UNITS, LANES)
    cols = tl.arange(0, WIDTH)[None, :]
    dy_ptr += unit_offset(unit, n_inner, dy_strides, ALIGN) + cols
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN) + cols
    if mask_ptr is not None:
        mask_ptr += unit_offset(unit, n_inner, mask_strides, 1)
    mean, rstd = statistics(mean_ptr, rstd_ptr, unit // span, None, stat, None)
    w, b = affine(weight_ptr, bias_ptr, unit % n_inner, None, stat)
    total = tl.zeros((UNITS * LANES, WIDTH), stat)
    product = total
    for done in range(0, size, DEPTH * LANES):
        tiles, gradients, masks, segments, vectors = (), (), (), (), ()
        for t in tl.static_range(DEPTH):
            row_mask = lane + (done + t * LANES) < left
            mask = _element_mask(row_mask, vector, cols, row_steps * ALIGN, RAGGED)
            tiles = tiles + (load_tile(x_ptr + vector_offset(segment, vector, x_strides, WIDTH, ALIGN), mask, stat),)
            at = vector_offset(segment, vector, dy_strides, WIDTH, ALIGN)
            gradients = gradients + (load_tile(dy_ptr + at, mask, stat),)
            masks, segments, vectors = masks + (row_mask,), segments + (segment,), vectors + (vector,)
            segment, vector = _advance(segment, vector, row_vectors, LANES)
        for t in tl.static_range(DEPTH):
            c = tiles[t] - mean
            dz = _dz(
                gradients[t], c, mask_ptr, masks[t], rstd * w, b, segments[t], vectors[t], mask_strides,
                ACTIVATION, WIDTH,
            )  # fmt: skip
            total += dz
            product += dz * c
    # a lane has few terms; those of all lanes together deserve more bits
    total = tl.sum(total, axis=1, keep_dims=True).to(tl.float64)
    product = no_fma(tl.sum(product, axis=1, keep_dims=True).to(tl.float64), rstd.to(tl.float64))
    total, product = sum_pair(tl.reshape(total, (UNITS, LANES)), tl.reshape(product, (UNITS, LANES)))
    _store_partials(sums_ptr, (total, product), n_units, n_inner, UNITS)


@jit(do_not_specialize=_SIZES)  # one code for every size
def _planes_gradient_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, dresidual_ptr,
    dy_strides, mask_strides, x_strides, dx_strides,
    n_units, n_inner, n_vectors, row_vectors, row_steps, slice_vectors, n_segments,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx = (w · dz − mean(w · dz) − x̂ · mean(w · dz · x̂)) · rstd; dresidual = dz. The means, where there are any, have
    w in them only where it is not the same in the whole unit."""
    stat = rstd_ptr.dtype.element_ty
    unit, lane, segment, vector, size, left = _begin(n_units, n_vectors, row_vectors, slice_vectors, UNITS, LANES)
    cols = tl.arange(0, WIDTH)[None, :]
    dy_ptr += unit_offset(unit, n_inner, dy_strides, ALIGN) + cols
    dx_ptr += unit_offset(unit, n_inner, dx_strides, ALIGN) + cols
    if means_ptr is not None:
        x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN) + cols
    if dresidual_ptr is not None:
        dresidual_ptr += unit_offset(unit, n_inner, dx_strides, ALIGN) + cols
    if mask_ptr is not None:
        mask_ptr += unit_offset(unit, n_inner, mask_strides, 1)
    mean, rstd = statistics(mean_ptr, rstd_ptr, unit, None, stat, None)
    if not GROUPED:
        w, b = affine(weight_ptr, bias_ptr, unit % n_inner, None, stat)
    if means_ptr is not None:
        mean_dz = load_tile(means_ptr + unit, None, stat)
        slope = load_tile(means_ptr + n_units + unit, None, stat) * rstd
    for done in range(0, size, DEPTH * LANES):
        tiles, gradients, segments, vectors = (), (), (), ()
        for t in tl.static_range(DEPTH):
            row_mask = lane + (done + t * LANES) < left
            mask = _element_mask(row_mask, vector, cols, row_steps * ALIGN, RAGGED)
            if means_ptr is not None:
                x = load_tile(x_ptr + vector_offset(segment, vector, x_strides, WIDTH, ALIGN), mask, stat)
                tiles = tiles + (x,)
            dy = load_tile(dy_ptr + vector_offset(segment, vector, dy_strides, WIDTH, ALIGN), mask, stat)
            gradients = gradients + (dy,)
            segments, vectors = segments + (segment,), vectors + (vector,)
            segment, vector = _advance(segment, vector, row_vectors, LANES)
        for t in tl.static_range(DEPTH):
            row_mask = lane + (done + t * LANES) < left
            mask = _element_mask(row_mask, vectors[t], cols, row_steps * ALIGN, RAGGED)
            if GROUPED:
                channel = unit % n_inner * n_segments + segments[t]
                w, b = affine(weight_ptr, bias_ptr, channel, row_mask, stat)
            c = tiles[t] - mean if means_ptr is not None else None
            dz = _dz(
                gradients[t], c, mask_ptr, row_mask, rstd * w, b, segments[t], vectors[t], mask_strides,
                ACTIVATION, WIDTH,
            )  # fmt: skip
            dx = dz * (rstd * w)
            if means_ptr is not None:
                dx = input_gradient(dz, c, w, rstd, mean_dz, slope, GROUPED)
            at = vector_offset(segments[t], vectors[t], dx_strides, WIDTH, ALIGN)
            store_tile(dx_ptr + at, dx, mask)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr + at, dz, mask)


class _Walk(NamedTuple):
    """How the units of tensors (N, C, S) are walked."""

    groups: int | None
    align: int
    sizes: tuple[int, ...]  # n_units, n_inner, n_vectors, row_vectors, row_steps, slice_vectors
    outer: int
    slices: int
    tiles: dict[str, int]
    ragged: bool

    @property
    def grid(self) -> tuple[int, int]:
        return launch.ceil_div(self.sizes[0], self.tiles["UNITS"]), self.slices

    def strides(self, t):
        """Of samples, units and segments, in `align` elements; zero where there is one of them."""
        if t is None:
            return (0, 0, 0)
        sample, channel = (0 if n == 1 else s // self.align for n, s in zip(t.shape[:2], t.stride()[:2], strict=True))
        if self.groups is None:
            return (0, channel, sample)
        return (sample, t.shape[1] // self.groups * channel, channel)

    def partials(self, numbers, x):
        """Room for what the slices leave of each unit."""
        _, inner, vectors, _, _, slice_vectors = self.sizes
        values = x.new_empty((numbers, self.outer, self.slices, inner), dtype=stat_dtype(x))
        width = self.tiles["WIDTH"]
        return Partials(values, slice_vectors * width, vectors * width)


def _walk(tensors, groups, depth, mask=None, lone_samples=False):
    """Units are channels of all samples, or `groups` in each. A mask has a byte for each vector. lone_samples: slices
    as if there were one sample, so that what is summed in one does not depend on the others."""
    shape = tensors[0].shape
    align = launch.vector_width(shape[2], tensors)
    return _walk_of(shape, align, groups, depth, mask is not None, lone_samples, launch.multiprocessors())


@launch.remembered
def _walk_of(shape, align, groups, depth, has_mask, lone_samples, multiprocessors):
    samples, channels, cols = shape
    width = 8 if has_mask else align
    inner, segments = (channels, samples) if groups is None else (groups, channels // groups)
    outer = 1 if groups is None else samples
    depth = max(1, depth * align // width)  # narrow accesses are many, and each needs its registers
    row_vectors = launch.ceil_div(cols, width)
    units = inner if lone_samples else outer * inner
    tiling = launch.unit_lanes(segments * row_vectors, units, depth, multiprocessors)
    blocks = launch.ceil_div(units, tiling.units)
    slice_vectors = launch.slice_length(segments * row_vectors, tiling.step, blocks, multiprocessors)
    return _Walk(
        groups, align,
        (outer * inner, inner, segments * row_vectors, row_vectors, cols // align, slice_vectors),
        outer, launch.ceil_div(segments * row_vectors, slice_vectors),
        dict(ALIGN=align, WIDTH=width, UNITS=tiling.units, LANES=tiling.lanes, DEPTH=tiling.depth),
        cols % width > 0,
    )  # fmt: skip


def moments(x, groups=None):
    """x: (N, C, S). Partial means and variances of the channels, pooled over N, or of the groups in each sample."""
    walk = _walk([x], groups, launch.MOMENTS_DEPTH, lone_samples=groups is not None)
    partials = walk.partials(3, x)
    # grid: (blocks of units, slices)
    _planes_moments_kernel[walk.grid](
        x, partials.values, walk.strides(x), *walk.sizes, **walk.tiles, **launch.options(launch.VECTOR_WARPS)
    )
    return partials


def normalize(x, residual, affine, statistics, y, mask, *, eps=None, groups=None, activation=None):
    """Fills y, and the mask where there is one. affine: weight and bias; statistics: mean and rstd, or with an eps the
    variance."""
    walk = _walk([t for t in (x, residual, y) if t is not None], groups, launch.STREAM_DEPTH, mask)
    # grid: (blocks of units, slices)
    _planes_normalize_kernel[walk.grid](
        x, residual, *affine, *statistics, y, mask, *map(walk.strides, (x, residual, y)), _byte_strides(walk, mask),
        *walk.sizes, x.shape[1] // (groups or x.shape[1]), EPS=eps, ACTIVATION=activation, GROUPED=groups is not None,
        RAGGED=walk.ragged, **walk.tiles, **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip


def _byte_strides(walk, mask):
    return walk._replace(align=1).strides(mask)


def sums(dy, mask, x, affine, statistics, *, groups=None, silu=False):
    """Partial Σ dz and Σ dz · x̂ of the channels, pooled over N, or in each sample where there are groups."""
    channels = x.shape[1]
    walk = _walk([dy, x], None if groups is None else channels, launch.STREAM_DEPTH, mask, groups is not None)
    partials = walk.partials(2, x)
    # grid: (blocks of channels, slices)
    _planes_sums_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, partials.values,
        walk.strides(dy), _byte_strides(walk, mask), walk.strides(x), *walk.sizes, channels // (groups or channels),
        ACTIVATION="silu" if silu else None, RAGGED=walk.ragged, **walk.tiles, **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip
    return partials


def gradient(dy, mask, x, affine, statistics, means, dx, dresidual, *, groups=None, silu=False):
    """Fills dx, and dresidual where there is one. means: of dz and dz · x̂, without the weight where a unit has one;
    None where the statistics were given and not computed."""
    walk = _walk([t for t in (dy, x, dx, dresidual) if t is not None], groups, launch.STREAM_DEPTH, mask)
    # grid: (blocks of units, slices)
    _planes_gradient_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, means, dx, dresidual,
        walk.strides(dy), _byte_strides(walk, mask), walk.strides(x), walk.strides(dx),
        *walk.sizes, x.shape[1] // (groups or x.shape[1]),
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, RAGGED=walk.ragged, **walk.tiles,
        **launch.options(launch.VECTOR_WARPS),
    )  # fmt: skip
