"""The kernels of batch_norm and group_norm for contiguous tensors, seen as (N, C, S): a channel's S positions are
adjacent in memory, and make a plane. channels_last tensors, seen as (N, S, C), go to pixels.py, and so do batch_norm's
odd planes of many samples.

A unit is what shares its statistics: a channel of all samples (batch_norm), or a group of a sample (group_norm). It is
made of planes. plane_walk.py shows how programs walk along units, in tiles of (UNITS · LANES, WIDTH), a row for a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import channel_launch, launch
from .channel_tiles import activated, activation_gradient, affine, input_gradient, load_mask, normalized, statistics
from .jit import jit
from .moments import add_tiles, join_lanes, load_centered, moment_fields
from .plane_walk import advance, begin, element_mask, unit_offset, vector_offset, walk_units
from .tiles import load_tile, store_tile, sum_pair

_SIZES = [
    "n_units", "n_inner", "n_vectors", "plane_vectors", "plane_steps", "chunk_vectors", "n_planes", "group_channels",
]  # fmt: skip


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _planes_moments_kernel(
    x_ptr, moments_ptr, x_strides, n_units, n_inner, n_vectors, plane_vectors, plane_steps, chunk_vectors,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """mean(x) and var(x) of a chunk of each unit, as partials; x₀ is the unit's first element.

    Grid: (blocks of UNITS units, chunks)."""
    stat = moments_ptr.dtype.element_ty
    unit, lane, plane, vector, size, lane_size = begin(n_units, n_vectors, plane_vectors, chunk_vectors, UNITS, LANES)
    first_ptr = x_ptr
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN)
    origin = tl.load(x_ptr + tl.zeros((1, 1), tl.int32))
    units = tl.minimum(tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None], n_units - 1)
    unit_origin = tl.load(first_ptr + unit_offset(units, n_inner, x_strides, ALIGN))
    x_ptr += tl.arange(0, WIDTH)[None, :]
    mean = tl.zeros((UNITS * LANES, 1), stat)
    var = mean
    whole = size - size % (DEPTH * LANES)  # the steps in which no lane is masked
    for done in range(0, whole, DEPTH * LANES):
        tiles = ()
        for _ in tl.static_range(DEPTH):
            x = tl.load(x_ptr + vector_offset(plane, vector, x_strides, WIDTH, ALIGN))
            tiles = tiles + (x.to(stat) - origin.to(stat),)
            plane, vector = advance(plane, vector, plane_vectors, LANES)
        count, added = tl.cast(done // LANES * WIDTH, stat), tl.full((1, 1), DEPTH * WIDTH, stat)
        mean, var = add_tiles(mean, var, count, tiles, (), added, True, DEPTH)
    count = tl.zeros((UNITS * LANES, 1), stat) + tl.cast(whole // LANES * WIDTH, stat)
    for done in range(whole, size, DEPTH * LANES):
        tiles, masks = (), ()
        added = tl.zeros((UNITS * LANES, 1), stat)
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            offset = vector_offset(plane, vector, x_strides, WIDTH, ALIGN)
            tiles = tiles + (load_centered(x_ptr + offset, vector_mask, origin, stat),)
            masks = masks + (vector_mask,)
            added += vector_mask.to(stat) * WIDTH
            plane, vector = advance(plane, vector, plane_vectors, LANES)
        mean, var = add_tiles(mean, var, count, tiles, masks, added, True, DEPTH)
        count += added
    shape: tl.constexpr = (UNITS, LANES)
    mean, var = join_lanes(
        tl.reshape(mean, shape), tl.reshape(var, shape), tl.reshape(count, shape), size.to(tl.int64) * WIDTH, 1
    )
    _store_partials(moments_ptr, moment_fields(mean, var, unit_origin, stat), n_units, n_inner, UNITS)


@triton.jit
def _store_partials(partial_ptr, fields, n_units, n_inner, UNITS: tl.constexpr):
    """Stores the fields of this program's units, (UNITS, 1) each, into (fields, outer, chunks, inner): see Partials."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    n_chunks = tl.num_programs(1)
    offsets = (unit // n_inner * n_chunks + tl.program_id(1)).to(tl.int64) * n_inner + unit % n_inner
    for i in tl.static_range(len(fields)):
        store_tile(partial_ptr + tl.cast(n_units, tl.int64) * n_chunks * i + offsets, fields[i], unit < n_units)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _planes_normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_or_var_ptr, y_ptr, mask_ptr,
    x_strides, residual_strides, y_strides, mask_strides,
    n_units, n_inner, n_vectors, plane_vectors, plane_steps, chunk_vectors, n_planes,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · rstd · w + b + residual). GROUPED: the planes of a unit are channels with their own w and b.

    Grid: (blocks of UNITS units, chunks)."""
    stat: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    unit, lane, plane, vector, size, lane_size = begin(n_units, n_vectors, plane_vectors, chunk_vectors, UNITS, LANES)
    cols = tl.arange(0, WIDTH)[None, :]
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN) + cols
    y_ptr += unit_offset(unit, n_inner, y_strides, ALIGN) + cols
    if residual_ptr is not None:
        residual_ptr += unit_offset(unit, n_inner, residual_strides, ALIGN) + cols
    if mask_ptr is not None:
        mask_ptr += unit_offset(unit, n_inner, mask_strides, 1)
    mean, rstd = statistics(mean_ptr, rstd_or_var_ptr, unit, None, stat, EPS)
    if not GROUPED:
        w, b = affine(weight_ptr, bias_ptr, unit % n_inner, None, stat)
    for done in range(0, size, DEPTH * LANES):
        x_tiles, residual_tiles, planes, vectors = (), (), (), ()
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            mask = element_mask(vector_mask, vector, cols, plane_steps * ALIGN, RAGGED)
            x_tiles = x_tiles + (load_tile(x_ptr + vector_offset(plane, vector, x_strides, WIDTH, ALIGN), mask, stat),)
            if residual_ptr is not None:
                offset = vector_offset(plane, vector, residual_strides, WIDTH, ALIGN)
                residual_tiles = residual_tiles + (load_tile(residual_ptr + offset, mask, stat),)
            planes, vectors = planes + (plane,), vectors + (vector,)
            plane, vector = advance(plane, vector, plane_vectors, LANES)
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            mask = element_mask(vector_mask, vectors[t], cols, plane_steps * ALIGN, RAGGED)
            if GROUPED:
                channel = unit % n_inner * n_planes + planes[t]
                w, b = affine(weight_ptr, bias_ptr, channel, vector_mask, stat)
            z = normalized(x_tiles[t], mean, rstd * w, b, EPS is not None)
            if residual_ptr is not None:
                z += residual_tiles[t]
            byte_offset = vector_offset(planes[t], vectors[t], mask_strides, 1, 1)
            byte_ptr = mask_ptr + byte_offset if mask_ptr is not None else None
            y = activated(z, byte_ptr, vector_mask, mask, ACTIVATION, WIDTH, RAGGED)
            store_tile(y_ptr + vector_offset(planes[t], vectors[t], y_strides, WIDTH, ALIGN), y, mask)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _planes_sums_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr,
    dy_strides, mask_strides, x_strides,
    n_units, n_inner, n_vectors, plane_vectors, plane_steps, chunk_vectors, group_channels,
    ACTIVATION: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · x̂ of a chunk of each unit, as partials. Units are channels here, of one sample in group_norm,
    where `group_channels` adjacent ones, a group, share their statistics.

    Grid: (blocks of UNITS units, chunks)."""
    stat = sums_ptr.dtype.element_ty
    unit, lane, plane, vector, size, lane_size = begin(n_units, n_vectors, plane_vectors, chunk_vectors, UNITS, LANES)
    cols = tl.arange(0, WIDTH)[None, :]
    dy_ptr += unit_offset(unit, n_inner, dy_strides, ALIGN) + cols
    x_ptr += unit_offset(unit, n_inner, x_strides, ALIGN) + cols
    if mask_ptr is not None:
        mask_ptr += unit_offset(unit, n_inner, mask_strides, 1)
    mean, rstd = statistics(mean_ptr, rstd_ptr, unit // group_channels, None, stat, None)
    w, b = affine(weight_ptr, bias_ptr, unit % n_inner, None, stat)
    dz_sum = tl.zeros((UNITS * LANES, WIDTH), stat)
    dz_x_hat_sum = dz_sum
    for done in range(0, size, DEPTH * LANES):
        x_tiles, dy_tiles, byte_tiles = (), (), ()
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            mask = element_mask(vector_mask, vector, cols, plane_steps * ALIGN, RAGGED)
            x_tiles = x_tiles + (load_tile(x_ptr + vector_offset(plane, vector, x_strides, WIDTH, ALIGN), mask, stat),)
            offset = vector_offset(plane, vector, dy_strides, WIDTH, ALIGN)
            dy_tiles = dy_tiles + (load_tile(dy_ptr + offset, mask, stat),)
            if mask_ptr is not None:
                byte_ptr = mask_ptr + vector_offset(plane, vector, mask_strides, 1, 1)
                byte_tiles = byte_tiles + (load_mask(byte_ptr, vector_mask, ALIGN, WIDTH),)
            plane, vector = advance(plane, vector, plane_vectors, LANES)
        for t in tl.static_range(DEPTH):
            centered = x_tiles[t] - mean
            byte = byte_tiles[t] if mask_ptr is not None else None
            dz = activation_gradient(dy_tiles[t], centered, rstd * w, b, byte, ACTIVATION, WIDTH)
            dz_sum += dz
            dz_x_hat_sum = tl.fma(dz, centered, dz_x_hat_sum)
    # float32 is enough for the terms of a lane, which are few; the lanes' sums are added in float64
    dz_sum = tl.sum(dz_sum, axis=1, keep_dims=True).to(tl.float64)
    dz_x_hat_sum = tl.sum(dz_x_hat_sum, axis=1, keep_dims=True).to(tl.float64) * rstd.to(tl.float64)
    dz_sum, dz_x_hat_sum = sum_pair(tl.reshape(dz_sum, (UNITS, LANES)), tl.reshape(dz_x_hat_sum, (UNITS, LANES)))
    _store_partials(sums_ptr, (dz_sum, dz_x_hat_sum), n_units, n_inner, UNITS)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _planes_gradient_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, dresidual_ptr,
    dy_strides, mask_strides, x_strides, dx_strides,
    n_units, n_inner, n_vectors, plane_vectors, plane_steps, chunk_vectors, n_planes,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx = (w · dz − c2 − x̂ · c1) · rstd with c1 = mean(w · dz · x̂), c2 = mean(w · dz); dresidual = dz.

    means_ptr: (2, units), c2 and c1, of batch_norm without w, which is the same in the whole unit; None of batch_norm
    in evaluation, where dx = w · dz · rstd. GROUPED: the planes of a unit are channels with their own w and b.

    Grid: (blocks of UNITS units, chunks)."""
    stat = rstd_ptr.dtype.element_ty
    unit, lane, plane, vector, size, lane_size = begin(n_units, n_vectors, plane_vectors, chunk_vectors, UNITS, LANES)
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
        c2 = load_tile(means_ptr + unit, None, stat)
        c1_rstd = load_tile(means_ptr + n_units + unit, None, stat) * rstd
    for done in range(0, size, DEPTH * LANES):
        x_tiles, dy_tiles, byte_tiles, planes, vectors = (), (), (), (), ()
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            mask = element_mask(vector_mask, vector, cols, plane_steps * ALIGN, RAGGED)
            if means_ptr is not None:
                x = load_tile(x_ptr + vector_offset(plane, vector, x_strides, WIDTH, ALIGN), mask, stat)
                x_tiles = x_tiles + (x,)
            dy = load_tile(dy_ptr + vector_offset(plane, vector, dy_strides, WIDTH, ALIGN), mask, stat)
            dy_tiles = dy_tiles + (dy,)
            if mask_ptr is not None:
                byte_ptr = mask_ptr + vector_offset(plane, vector, mask_strides, 1, 1)
                byte_tiles = byte_tiles + (load_mask(byte_ptr, vector_mask, ALIGN, WIDTH),)
            planes, vectors = planes + (plane,), vectors + (vector,)
            plane, vector = advance(plane, vector, plane_vectors, LANES)
        for t in tl.static_range(DEPTH):
            vector_mask = lane + (done + t * LANES) < lane_size
            mask = element_mask(vector_mask, vectors[t], cols, plane_steps * ALIGN, RAGGED)
            if GROUPED:
                channel = unit % n_inner * n_planes + planes[t]
                w, b = affine(weight_ptr, bias_ptr, channel, vector_mask, stat)
            centered = x_tiles[t] - mean if means_ptr is not None else None
            byte = byte_tiles[t] if mask_ptr is not None else None
            dz = activation_gradient(dy_tiles[t], centered, rstd * w, b, byte, ACTIVATION, WIDTH)
            dx = dz * (rstd * w)
            if means_ptr is not None:
                dx = input_gradient(dz, centered, w, rstd, c2, c1_rstd, GROUPED)
            offset = vector_offset(planes[t], vectors[t], dx_strides, WIDTH, ALIGN)
            store_tile(dx_ptr + offset, dx, mask)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr + offset, dz, mask)


def moments(x, groups=None):
    """x: (N, C, S). Partial moments of the channels over all samples, or of the groups of each sample."""
    walk = walk_units([x], groups, channel_launch.MOMENTS_DEPTH, batch_invariant=groups is not None)
    partials = walk.partials(3, x)
    # grid: (blocks of units, chunks)
    _planes_moments_kernel[walk.grid](
        x, partials.values, walk.strides(x), *walk.sizes, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS, channel_launch.CHANNEL_PROGRAMS),
    )  # fmt: skip
    return partials


def normalize(x, residual, affine, statistics, y, mask, *, eps=None, groups=None, activation=None):
    """Fills y, and a ReLU's mask unless it is None. affine: weight and bias; statistics: mean and rstd, or with an eps
    mean and variance."""
    walk = walk_units([t for t in (x, residual, y) if t is not None], groups, channel_launch.ELEMENTWISE_DEPTH, mask)
    # grid: (blocks of units, chunks)
    _planes_normalize_kernel[walk.grid](
        x, residual, *affine, *statistics, y, mask, *map(walk.strides, (x, residual, y)), walk.byte_strides(mask),
        *walk.sizes, x.shape[1] // (groups or x.shape[1]), EPS=eps, ACTIVATION=activation, GROUPED=groups is not None,
        RAGGED=walk.ragged, **walk.constants, **launch.options(channel_launch.CHANNEL_WARPS),
    )  # fmt: skip


def sums(dy, mask, x, affine, statistics, *, groups=None, silu=False):
    """Partial Σ dz and Σ dz · x̂ of the channels over all samples, or, with groups, of the channels of each sample."""
    channels = x.shape[1]
    units = None if groups is None else channels
    walk = walk_units([dy, x], units, channel_launch.ELEMENTWISE_DEPTH, mask, batch_invariant=groups is not None)
    partials = walk.partials(2, x)
    # grid: (blocks of channels, chunks)
    _planes_sums_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, partials.values,
        walk.strides(dy), walk.byte_strides(mask), walk.strides(x), *walk.sizes, channels // (groups or channels),
        ACTIVATION="silu" if silu else None, RAGGED=walk.ragged, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS),
    )  # fmt: skip
    return partials


def gradient(dy, mask, x, affine, statistics, means, dx, dresidual, *, groups=None, silu=False):
    """Fills dx, and dresidual unless it is None. means: (2, units), c2 and c1, of batch_norm without the weight; None
    where the statistics are constants."""
    tensors = [t for t in (dy, x, dx, dresidual) if t is not None]
    walk = walk_units(tensors, groups, channel_launch.ELEMENTWISE_DEPTH, mask)
    # grid: (blocks of units, chunks)
    _planes_gradient_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, means, dx, dresidual,
        walk.strides(dy), walk.byte_strides(mask), walk.strides(x), walk.strides(dx),
        *walk.sizes, x.shape[1] // (groups or x.shape[1]),
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, RAGGED=walk.ragged, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS),
    )  # fmt: skip
