"""The kernels of batch_norm and group_norm for channels_last tensors, seen as (N, S, C): the C channels of a position,
a pixel, are adjacent in memory. Contiguous tensors, seen as (N, C, S), go to planes.py.

The columns of a pixel are its channels. batch_norm's odd planes, which don't divide into vectors, come here too, with a
sample for a pixel: (1, N, C · S). Its columns are the S positions of each of C channels, and a vector may have elements
of two channels. What is summed over the pixels is then a partial of each position.

A vector is WIDTH adjacent columns of a pixel, which a thread loads at once. A tile is VECTORS adjacent vectors of
PIXELS pixels, (VECTORS · PIXELS, WIDTH), a row for each vector. With WIDTH = 8, VECTORS = 4 and PIXELS = 2:

    column      0 … 7   8 … 15  16 … 23  24 … 31 │ 32 …
    pixel 0     row 0   row 1   row 2    row 3   │            tile 0
    pixel 1     row 4   row 5   row 6    row 7   │ another
    pixel 2     row 0   row 1   row 2    row 3   │ program    tile 1
    pixel 3     row 4   row 5   row 6    row 7   │

A program keeps its columns, and loads DEPTH tiles before it uses one. The pixels of a sample are cut into chunks, one
for each program of the grid's second dimension; moments.py joins what they leave, for batch_norm of all samples, for
group_norm of all channels of a group. batch_norm's samples may be seen as one, (1, N · S, C). Strides and offsets are
multiples of ALIGN elements.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import channel_launch, launch
from .channel_tiles import activated, activation_gradient, affine, input_gradient, load_mask, normalized, statistics
from .jit import jit
from .moments import Partials, add_tiles, join_lanes, load_centered, moment_fields
from .tiles import load_tile, store_tile
from .types import stat_dtype


@triton.jit
def _begin(n_pixels, n_blocks, chunk_pixels, VECTORS: tl.constexpr, PIXELS: tl.constexpr):
    """This program's sample, the first pixel of its chunk and the number of them; the vector of columns and the pixel
    of each row of its first tile, (VECTORS · PIXELS, 1)."""
    row = tl.arange(0, VECTORS * PIXELS)[:, None]
    sample, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    start = tl.program_id(1).to(tl.int64) * chunk_pixels
    size = tl.minimum(n_pixels - start, chunk_pixels).to(tl.int32)
    return sample.to(tl.int64), start, size, block * VECTORS + row % VECTORS, row // VECTORS


@triton.jit
def _pixel_offset(sample, pixel, strides, ALIGN: tl.constexpr):
    """The offset of a pixel's first column. strides: of samples and pixels, in ALIGN elements, so that the compiler
    knows what offsets are multiples of, whatever the sizes."""
    return (sample * strides[0] + pixel.to(tl.int64) * strides[1]) * ALIGN


@triton.jit
def _unit_of(sample, col, n_cols, unit_cols, GROUPED: tl.constexpr):
    """The unit that a column's statistics belong to: its group in the sample, or the channel of all samples."""
    if GROUPED:
        return sample * (n_cols // unit_cols) + col // unit_cols
    else:
        return col // unit_cols


_SIZES = ["n_pixels", "col_steps", "n_blocks", "chunk_pixels", "unit_cols"]


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _pixels_moments_kernel(
    x_ptr, moments_ptr, x_strides, n_pixels, col_steps, n_blocks, chunk_pixels, unit_cols,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """mean(x) and var(x) of each column in a chunk of the pixels, as partials; x₀ is the first pixel's element of the
    first of the unit's columns.

    Grid: (samples times blocks of columns, chunks)."""
    stat = moments_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, chunk_pixels, VECTORS, PIXELS)
    col, n_cols = vector * WIDTH + tl.arange(0, WIDTH)[None, :], col_steps * ALIGN
    origin_ptr = x_ptr
    if GROUPED:
        origin_ptr += sample * x_strides[0] * ALIGN
    origin = tl.load(origin_ptr + (col - col % unit_cols), mask=col < n_cols, other=0.0)
    block_col = _block_cols(n_blocks, VECTORS * WIDTH)
    origin_ptr += block_col - block_col % unit_cols
    block_origin = tl.load(origin_ptr, mask=block_col < n_cols, other=0.0)
    x_ptr += _pixel_offset(sample, start + pixel, x_strides, ALIGN) + col
    mean = tl.zeros((VECTORS * PIXELS, WIDTH), stat)
    var = mean
    whole = size - size % (DEPTH * PIXELS)  # the steps in which no pixel is masked
    for done in range(0, whole, DEPTH * PIXELS):
        tiles = ()
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            offset = _pixel_offset(0, first, x_strides, ALIGN)
            tiles = tiles + (load_centered(x_ptr + offset, col < n_cols, origin, stat),)
        count, added = tl.cast(done // PIXELS, stat), tl.full((1, 1), DEPTH, stat)
        mean, var = add_tiles(mean, var, count, tiles, (), added, False, DEPTH)
    count = tl.zeros((VECTORS * PIXELS, 1), stat) + tl.cast(whole // PIXELS, stat)
    for done in range(whole, size, DEPTH * PIXELS):
        tiles, masks = (), ()
        added = tl.zeros((VECTORS * PIXELS, 1), stat)
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            pixel_mask = pixel + first < size
            offset = _pixel_offset(0, first, x_strides, ALIGN)
            tiles = tiles + (load_centered(x_ptr + offset, pixel_mask & (col < n_cols), origin, stat),)
            masks = masks + (pixel_mask,)
            added += pixel_mask.to(stat)
        mean, var = add_tiles(mean, var, count, tiles, masks, added, False, DEPTH)
        count += added
    shape: tl.constexpr = (PIXELS, VECTORS * WIDTH)
    count = tl.reshape(count + tl.zeros(mean.shape, stat), shape)
    mean, var = join_lanes(tl.reshape(mean, shape), tl.reshape(var, shape), count, size, 0)
    fields, parts = moment_fields(mean, var, block_origin, stat), 1 if GROUPED else unit_cols
    _store_partials(moments_ptr, fields, block_col, n_blocks, n_cols, parts)


@triton.jit
def _block_cols(n_blocks, COLS: tl.constexpr):
    """The columns of this program's block, (1, COLS)."""
    return tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _store_partials(partial_ptr, fields, col, n_blocks, n_cols, parts):
    """Stores the fields of this program's columns, (1, COLS) each, into (fields, samples, chunks, parts, columns /
    parts): `parts` adjacent columns are a channel."""
    n_chunks = tl.num_programs(1)
    chunk = (tl.program_id(0) // n_blocks * n_chunks + tl.program_id(1)).to(tl.int64)
    offsets = chunk * n_cols + col % parts * (n_cols // parts) + col // parts
    n_partials = (tl.num_programs(0) // n_blocks * n_chunks).to(tl.int64) * n_cols
    for i in tl.static_range(len(fields)):
        store_tile(partial_ptr + n_partials * i + offsets, fields[i], col < n_cols)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _pixels_normalize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_or_var_ptr, y_ptr, mask_ptr,
    x_strides, residual_strides, y_strides, mask_strides,
    n_pixels, col_steps, n_blocks, chunk_pixels, unit_cols,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, RAGGED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · rstd · w + b + residual).

    Grid: (samples times blocks of columns, chunks)."""
    stat: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, chunk_pixels, VECTORS, PIXELS)
    col, n_cols = vector * WIDTH + tl.arange(0, WIDTH)[None, :], col_steps * ALIGN
    col_mask = col < n_cols
    x_ptr += _pixel_offset(sample, start + pixel, x_strides, ALIGN) + col
    y_ptr += _pixel_offset(sample, start + pixel, y_strides, ALIGN) + col
    if residual_ptr is not None:
        residual_ptr += _pixel_offset(sample, start + pixel, residual_strides, ALIGN) + col
    if mask_ptr is not None:
        mask_ptr += _pixel_offset(sample, start + pixel, mask_strides, 1) + vector
    unit = _unit_of(sample, col, n_cols, unit_cols, GROUPED)
    mean, rstd = statistics(mean_ptr, rstd_or_var_ptr, unit, col_mask, stat, EPS)
    w, b = affine(weight_ptr, bias_ptr, col if GROUPED else unit, col_mask, stat)
    for done in range(0, size, DEPTH * PIXELS):
        x_tiles, residual_tiles = (), ()
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            mask = (pixel + first < size) & col_mask
            x_tiles = x_tiles + (load_tile(x_ptr + _pixel_offset(0, first, x_strides, ALIGN), mask, stat),)
            if residual_ptr is not None:
                residual = load_tile(residual_ptr + _pixel_offset(0, first, residual_strides, ALIGN), mask, stat)
                residual_tiles = residual_tiles + (residual,)
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            vector_mask = (pixel + first < size) & (vector * WIDTH < n_cols)
            mask = (pixel + first < size) & col_mask
            z = normalized(x_tiles[t], mean, rstd * w, b, EPS is not None)
            if residual_ptr is not None:
                z += residual_tiles[t]
            byte_ptr = mask_ptr + _pixel_offset(0, first, mask_strides, 1) if mask_ptr is not None else None
            y = activated(z, byte_ptr, vector_mask, mask, ACTIVATION, WIDTH, RAGGED)
            store_tile(y_ptr + _pixel_offset(0, first, y_strides, ALIGN), y, mask)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _pixels_sums_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr,
    dy_strides, mask_strides, x_strides, n_pixels, col_steps, n_blocks, chunk_pixels, unit_cols,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz · x̂ of each column in a chunk of the pixels, as partials.

    Grid: (samples times blocks of columns, chunks)."""
    stat = sums_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, chunk_pixels, VECTORS, PIXELS)
    col, n_cols = vector * WIDTH + tl.arange(0, WIDTH)[None, :], col_steps * ALIGN
    col_mask = col < n_cols
    dy_ptr += _pixel_offset(sample, start + pixel, dy_strides, ALIGN) + col
    x_ptr += _pixel_offset(sample, start + pixel, x_strides, ALIGN) + col
    if mask_ptr is not None:
        mask_ptr += _pixel_offset(sample, start + pixel, mask_strides, 1) + vector
    unit = _unit_of(sample, col, n_cols, unit_cols, GROUPED)
    mean, rstd = statistics(mean_ptr, rstd_ptr, unit, col_mask, stat, None)
    w, b = affine(weight_ptr, bias_ptr, col if GROUPED else unit, col_mask, stat)
    dz_sum = tl.zeros((VECTORS * PIXELS, WIDTH), stat)
    dz_x_hat_sum = dz_sum
    for done in range(0, size, DEPTH * PIXELS):
        x_tiles, dy_tiles, byte_tiles = (), (), ()
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            mask = (pixel + first < size) & col_mask
            x_tiles = x_tiles + (load_tile(x_ptr + _pixel_offset(0, first, x_strides, ALIGN), mask, stat),)
            dy_tiles = dy_tiles + (load_tile(dy_ptr + _pixel_offset(0, first, dy_strides, ALIGN), mask, stat),)
            if mask_ptr is not None:
                vector_mask = (pixel + first < size) & (vector * WIDTH < n_cols)
                byte_ptr = mask_ptr + _pixel_offset(0, first, mask_strides, 1)
                byte_tiles = byte_tiles + (load_mask(byte_ptr, vector_mask, ALIGN, WIDTH),)
        for t in tl.static_range(DEPTH):
            centered = x_tiles[t] - mean
            byte = byte_tiles[t] if mask_ptr is not None else None
            dz = activation_gradient(dy_tiles[t], centered, rstd * w, b, byte, ACTIVATION, WIDTH)
            dz_sum += dz
            dz_x_hat_sum = tl.fma(dz, centered, dz_x_hat_sum)
    shape: tl.constexpr = (PIXELS, VECTORS * WIDTH)
    # float32 is enough for the terms of a lane, which are few; the lanes' sums are added in float64, of 16-bit data in
    # float32, whose rounding is far below the data's
    wide: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else tl.float64
    dz_sum = tl.sum(tl.reshape(dz_sum.to(wide), shape), axis=0, keep_dims=True)
    dz_x_hat_sum = tl.sum(tl.reshape(dz_x_hat_sum.to(wide) * rstd.to(wide), shape), axis=0, keep_dims=True)
    block_col, parts = _block_cols(n_blocks, VECTORS * WIDTH), 1 if GROUPED else unit_cols
    _store_partials(sums_ptr, (dz_sum, dz_x_hat_sum), block_col, n_blocks, n_cols, parts)


@jit(do_not_specialize=_SIZES)  # the same code for every size
def _pixels_gradient_kernel(
    dy_ptr, mask_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr, dresidual_ptr,
    dy_strides, mask_strides, x_strides, dx_strides, n_pixels, col_steps, n_blocks, chunk_pixels, unit_cols,
    ACTIVATION: tl.constexpr, GROUPED: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, VECTORS: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dx = (w · dz − c2 − x̂ · c1) · rstd with c1 = mean(w · dz · x̂), c2 = mean(w · dz); dresidual = dz.

    means_ptr: (2, units), c2 and c1, of batch_norm without w, which is the same in the whole unit; None of batch_norm
    in evaluation, where dx = w · dz · rstd.

    Grid: (samples times blocks of columns, chunks)."""
    stat = rstd_ptr.dtype.element_ty
    sample, start, size, vector, pixel = _begin(n_pixels, n_blocks, chunk_pixels, VECTORS, PIXELS)
    col, n_cols = vector * WIDTH + tl.arange(0, WIDTH)[None, :], col_steps * ALIGN
    col_mask = col < n_cols
    dy_ptr += _pixel_offset(sample, start + pixel, dy_strides, ALIGN) + col
    dx_offset = _pixel_offset(sample, start + pixel, dx_strides, ALIGN) + col
    unit = _unit_of(sample, col, n_cols, unit_cols, GROUPED)
    mean, rstd = statistics(mean_ptr, rstd_ptr, unit, col_mask, stat, None)
    w, b = affine(weight_ptr, bias_ptr, col if GROUPED else unit, col_mask, stat)
    if mask_ptr is not None:
        mask_ptr += _pixel_offset(sample, start + pixel, mask_strides, 1) + vector
    if means_ptr is not None:
        x_ptr += _pixel_offset(sample, start + pixel, x_strides, ALIGN) + col
        n_units = (tl.num_programs(0) // n_blocks if GROUPED else 1) * (n_cols // unit_cols)
        c2 = load_tile(means_ptr + unit, col_mask, stat)
        c1_rstd = load_tile(means_ptr + n_units + unit, col_mask, stat) * rstd
    for done in range(0, size, DEPTH * PIXELS):
        x_tiles, dy_tiles, byte_tiles = (), (), ()
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            mask = (pixel + first < size) & col_mask
            if means_ptr is not None:
                x_tiles = x_tiles + (load_tile(x_ptr + _pixel_offset(0, first, x_strides, ALIGN), mask, stat),)
            dy_tiles = dy_tiles + (load_tile(dy_ptr + _pixel_offset(0, first, dy_strides, ALIGN), mask, stat),)
            if mask_ptr is not None:
                vector_mask = (pixel + first < size) & (vector * WIDTH < n_cols)
                byte_ptr = mask_ptr + _pixel_offset(0, first, mask_strides, 1)
                byte_tiles = byte_tiles + (load_mask(byte_ptr, vector_mask, ALIGN, WIDTH),)
        for t in tl.static_range(DEPTH):
            first = done + t * PIXELS
            mask = (pixel + first < size) & col_mask
            centered = x_tiles[t] - mean if means_ptr is not None else None
            byte = byte_tiles[t] if mask_ptr is not None else None
            dz = activation_gradient(dy_tiles[t], centered, rstd * w, b, byte, ACTIVATION, WIDTH)
            dx = dz * (rstd * w)
            if means_ptr is not None:
                dx = input_gradient(dz, centered, w, rstd, c2, c1_rstd, GROUPED)
            offset = dx_offset + _pixel_offset(0, first, dx_strides, ALIGN)
            store_tile(dx_ptr + offset, dx, mask)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr + offset, dz, mask)


class _Walk(NamedTuple):
    """How programs walk tensors (N, S, C), or (1, N, C · S): the kernels' sizes, grid and constants."""

    align: int
    sizes: tuple[int, ...]  # n_pixels, col_steps (columns / align), n_blocks, chunk_pixels, unit_cols
    grid: tuple[int, int]
    constants: dict[str, int]
    parts: int  # adjacent columns that make a channel
    ragged: bool

    def strides(self, t):
        """A tensor's strides of samples and pixels, in `align` elements; zero for a dimension of size one."""
        if t is None:
            return (0, 0)
        return tuple(0 if n == 1 else s // self.align for n, s in zip(t.shape[:2], t.stride()[:2], strict=True))

    def byte_strides(self, mask):
        """The strides of a ReLU's mask, in bytes: it is not aligned."""
        return self._replace(align=1).strides(mask)


def _walk(tensors, parts, groups, depth, mask=None, batch_invariant=False):
    """parts: adjacent columns that make a channel. mask: a ReLU's, with a byte for each vector. batch_invariant:
    vectors and chunks are chosen as for a single sample, wherever it lies, so that sums over a sample don't depend on
    the others."""
    shape = tensors[0].shape
    align, widest = channel_launch.vector_width(shape[2], tensors), channel_launch.widest_vector(shape[2], tensors)
    width = 8 if mask is not None else widest if batch_invariant else align
    return _walk_of(shape, align, width, parts, groups, depth, batch_invariant, launch.multiprocessors())


@launch.remembered
def _walk_of(shape, align, width, parts, groups, depth, batch_invariant, multiprocessors):
    samples, n_pixels, cols = shape
    if not batch_invariant:
        depth = max(1, depth * align // width)  # a vector of several narrow accesses takes registers for each
    vectors, pixels = channel_launch.channel_vectors(launch.ceil_div(cols, width), parts > 1)
    blocks = launch.ceil_div(cols, width * vectors)
    chunk, depth = channel_launch.channel_chunk(
        launch.ceil_div(n_pixels, pixels), depth, blocks if batch_invariant else samples * blocks, multiprocessors,
        2 if batch_invariant else 1,  # one sample's programs fill the card; of more samples, their ends take time
    )
    return _Walk(
        align, (n_pixels, cols // align, blocks, chunk * pixels, parts if groups is None else cols // groups),
        (samples * blocks, launch.ceil_div(n_pixels, chunk * pixels)),
        dict(ALIGN=align, WIDTH=width, VECTORS=vectors, PIXELS=pixels, DEPTH=depth),
        parts, cols % width > 0,
    )  # fmt: skip


def _partials(walk, fields, x):
    """Uninitialised memory for what the chunks leave of each column."""
    samples, n_pixels, cols = x.shape
    values = x.new_empty((fields, samples, walk.grid[1] * walk.parts, cols // walk.parts), dtype=stat_dtype(x))
    return Partials(values, walk.sizes[3], n_pixels, walk.parts)


def _parts(x, groups, statistics):
    """How many adjacent columns make a channel."""
    return 1 if groups is not None else x.shape[2] // statistics[0].numel()


def moments(x, groups=None, parts=1):
    """x: (N, S, C), or (1, N, C · parts). Partial moments of the columns of each sample."""
    walk = _walk([x], parts, groups, channel_launch.MOMENTS_DEPTH, batch_invariant=groups is not None)
    partials = _partials(walk, 3, x)
    # grid: (samples times blocks of columns, chunks)
    _pixels_moments_kernel[walk.grid](
        x, partials.values, walk.strides(x), *walk.sizes, GROUPED=groups is not None, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS, channel_launch.CHANNEL_PROGRAMS),
    )  # fmt: skip
    return partials


def normalize(x, residual, affine, statistics, y, mask, *, eps=None, groups=None, activation=None):
    """Fills y, and a ReLU's mask unless it is None. affine: weight and bias; statistics: mean and rstd, or with an eps
    mean and variance."""
    parts, tensors = _parts(x, groups, statistics), [t for t in (x, residual, y) if t is not None]
    walk = _walk(tensors, parts, groups, channel_launch.ELEMENTWISE_DEPTH, mask)
    # grid: (samples times blocks of columns, chunks)
    _pixels_normalize_kernel[walk.grid](
        x, residual, *affine, *statistics, y, mask, *map(walk.strides, (x, residual, y)), walk.byte_strides(mask),
        *walk.sizes, EPS=eps, ACTIVATION=activation, GROUPED=groups is not None,
        RAGGED=walk.ragged, **walk.constants, **launch.options(channel_launch.CHANNEL_WARPS),
    )  # fmt: skip


def sums(dy, mask, x, affine, statistics, *, groups=None, silu=False):
    """Partial Σ dz and Σ dz · x̂ of the columns of each sample."""
    parts = _parts(x, groups, statistics)
    walk = _walk([dy, x], parts, groups, channel_launch.ELEMENTWISE_DEPTH, mask, batch_invariant=groups is not None)
    partials = _partials(walk, 2, x)
    # grid: (samples times blocks of columns, chunks)
    _pixels_sums_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, partials.values,
        walk.strides(dy), walk.byte_strides(mask), walk.strides(x), *walk.sizes,
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS, channel_launch.CHANNEL_PROGRAMS),
    )  # fmt: skip
    return partials


def gradient(dy, mask, x, affine, statistics, means, dx, dresidual, *, groups=None, silu=False):
    """Fills dx, and dresidual unless it is None. means: (2, units), c2 and c1, of batch_norm without the weight; None
    where the statistics are constants."""
    parts, tensors = _parts(x, groups, statistics), [t for t in (dy, x, dx, dresidual) if t is not None]
    walk = _walk(tensors, parts, groups, channel_launch.ELEMENTWISE_DEPTH, mask)
    # grid: (samples times blocks of columns, chunks)
    _pixels_gradient_kernel[walk.grid](
        dy, mask, x, *affine, *statistics, means, dx, dresidual,
        walk.strides(dy), walk.byte_strides(mask), walk.strides(x), walk.strides(dx),
        *walk.sizes,
        ACTIVATION="silu" if silu else None, GROUPED=groups is not None, **walk.constants,
        **launch.options(channel_launch.CHANNEL_WARPS),
    )  # fmt: skip
