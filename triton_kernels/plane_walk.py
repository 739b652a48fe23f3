"""How the programs of planes.py walk along the units of tensors (N, C, S).

A unit is what shares its statistics: a channel of all samples (batch_norm), or a group of a sample (group_norm). It is
made of planes: the channel's in each sample, or those of the group's channels. A vector is WIDTH adjacent elements of a
plane, which a thread loads at once. Lanes walk along a unit's vectors, through all of its planes as if they were one,
so that no lane is idle where a plane is short. With 4 lanes and 6 vectors a plane:

    plane     0 0 0 0 0 0  1 1 1 1 1 1  2 …
    vector    0 1 2 3 4 5  0 1 2 3 4 5  0 …
    lane      0 1 2 3 0 1  2 3 0 1 2 3  0 …
    tile      0 0 0 0 1 1  1 1 2 2 2 2  3 …

A program takes UNITS units with LANES lanes each, and loads DEPTH tiles before it uses one. A tile is (UNITS · LANES,
WIDTH), a row for each lane. A long unit is cut into chunks of vectors, one for each program of the grid's second
dimension; moments.py joins what they leave. Strides and offsets are multiples of ALIGN elements.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import channel_launch, launch
from .moments import Partials
from .types import stat_dtype


@triton.jit
def begin(n_units, n_vectors, plane_vectors, chunk_vectors, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Where the lanes of this program's chunk begin: unit, lane, plane, and vector in the plane, (UNITS · LANES, 1)
    each, but the unit a scalar where UNITS is 1; the vectors of the chunk, and those for each lane, 0 beyond the last
    unit."""
    row = tl.arange(0, UNITS * LANES)[:, None]
    start = tl.program_id(1).to(tl.int64) * chunk_vectors
    size = tl.minimum(n_vectors - start, chunk_vectors).to(tl.int32)
    if UNITS == 1:
        unit, lane, lane_size = tl.program_id(0), row, size
    else:
        unit, lane = tl.program_id(0) * UNITS + row // LANES, row % LANES
        lane_size = tl.where(unit < n_units, size, 0)
        unit = tl.minimum(unit, n_units - 1)
    plane = start // plane_vectors
    vector = (start - plane * plane_vectors).to(plane_vectors.dtype) + lane
    return unit, lane, plane + vector // plane_vectors, vector % plane_vectors, size, lane_size


@triton.jit
def advance(plane, vector, plane_vectors, LANES: tl.constexpr):
    """Each lane's plane and vector LANES vectors further along the unit."""
    vector += LANES % plane_vectors
    wraps = vector >= plane_vectors
    return plane + LANES // plane_vectors + wraps.to(tl.int64), tl.where(wraps, vector - plane_vectors, vector)


@triton.jit
def unit_offset(unit, n_inner, strides, ALIGN: tl.constexpr):
    """The offset of a unit's first element. strides: of samples, units of a sample, and planes of a unit, in ALIGN
    elements, so that the compiler knows what offsets are multiples of, whatever the sizes."""
    outer, inner = unit // n_inner, unit % n_inner
    return (tl.cast(outer, tl.int64) * strides[0] + tl.cast(inner, tl.int64) * strides[1]) * ALIGN


@triton.jit
def vector_offset(plane, vector, strides, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """The offset of a vector from its unit's first element."""
    return plane * strides[2] * ALIGN + vector.to(tl.int64) * WIDTH


@triton.jit
def element_mask(vector_mask, vector, cols, n_cols, RAGGED: tl.constexpr):
    """The vectors' mask, where planes are RAGGED without the elements beyond a plane's end."""
    if RAGGED:
        return vector_mask & (vector * cols.shape[1] + cols < n_cols)
    else:
        return vector_mask


class Walk(NamedTuple):
    """How programs walk the units of tensors (N, C, S): the kernels' sizes, constants and grid."""

    groups: int | None
    align: int
    sizes: tuple[int, ...]  # n_units, n_inner, n_vectors, plane_vectors, plane_steps (S / align), chunk_vectors
    outer: int
    chunks: int
    constants: dict[str, int]
    ragged: bool

    @property
    def grid(self) -> tuple[int, int]:
        return launch.ceil_div(self.sizes[0], self.constants["UNITS"]), self.chunks

    def strides(self, t):
        """A tensor's strides of samples, units and planes, in `align` elements; zero for a dimension of size one."""
        if t is None:
            return (0, 0, 0)
        sample, channel = (0 if n == 1 else s // self.align for n, s in zip(t.shape[:2], t.stride()[:2], strict=True))
        if self.groups is None:
            return (0, channel, sample)
        return (sample, t.shape[1] // self.groups * channel, channel)

    def byte_strides(self, mask):
        """The strides of a ReLU's mask, in bytes: it is not aligned."""
        return self._replace(align=1).strides(mask)

    def partials(self, fields, x):
        """Uninitialised memory for what the chunks leave."""
        _, inner, vectors, _, _, chunk_vectors = self.sizes
        values = x.new_empty((fields, self.outer, self.chunks, inner), dtype=stat_dtype(x))
        width = self.constants["WIDTH"]
        return Partials(values, chunk_vectors * width, vectors * width)


def walk_units(tensors, groups, depth, mask=None, batch_invariant=False):
    """The walk of units that are channels of all samples, or `groups` groups in each sample.

    mask: a ReLU's, with a byte for each vector. batch_invariant: vectors and chunks are chosen as for a single sample,
    wherever it lies, so that sums over a sample don't depend on the others."""
    shape = tensors[0].shape
    align, widest = channel_launch.vector_width(shape[2], tensors), channel_launch.widest_vector(shape[2], tensors)
    width = 8 if mask is not None else widest if batch_invariant else align
    return _walk_of(shape, align, width, groups, depth, batch_invariant, launch.multiprocessors())


@launch.remembered
def _walk_of(shape, align, width, groups, depth, batch_invariant, multiprocessors):
    samples, channels, cols = shape
    inner, planes = (channels, samples) if groups is None else (groups, channels // groups)
    outer = 1 if groups is None else samples
    if not batch_invariant:
        depth = max(1, depth * align // width)  # a vector of several narrow accesses takes registers for each
    plane_vectors = launch.ceil_div(cols, width)
    vectors = planes * plane_vectors
    n_units = inner if batch_invariant else outer * inner
    units, lanes = channel_launch.unit_lanes(vectors, n_units, depth, multiprocessors)
    blocks = launch.ceil_div(n_units, units)
    chunk, depth = channel_launch.channel_chunk(launch.ceil_div(vectors, lanes), depth, blocks, multiprocessors)
    return Walk(
        groups, align,
        (outer * inner, inner, vectors, plane_vectors, cols // align, chunk * lanes),
        outer, launch.ceil_div(vectors, chunk * lanes),
        dict(ALIGN=align, WIDTH=width, UNITS=units, LANES=lanes, DEPTH=depth),
        cols % width > 0,
    )  # fmt: skip
