"""What the kernels move and execute, counted on a virtual GPU: bytes in passes over x, and instructions each element.

It has one multiprocessor: 128 rows then keep a program as long in its loop as 8192 rows do on a card with 132.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm.triton_kernels import plans, row_launch
from helpers.traffic import kernels, virtual_gpu

pytestmark = pytest.mark.triton

GATED = ("gated_rms_norm", "gated_layer_norm", "gated_rms_norm, gate first")
OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", *GATED)
# reads and writes of forward and backward, in passes over x; the forward reads x or h again where a row is longer
PASSES = {"plain": ((1, 1), (2, 1)), "add": ((2, 2), (3, 1)), "gated": ((2, 1), (3, 2))}
# Thread instructions an element in bf16, forward and backward: what they take, rounded up. They are PTX's, which has
# one for a division, where machine code has eight: a sigmoid by the reciprocal counts one more, and takes eight fewer.
INSTRUCTIONS = {
    "rms_norm": (13.1, 16.5),
    "layer_norm": (17.4, 20.7),
    "add_rms_norm": (12.6, 19.6),
    "add_layer_norm": (19.1, 24.5),
    "gated_rms_norm": (19.0, 32.3),
    "gated_layer_norm": (25.3, 40.7),
    "gated_rms_norm, gate first": (19.0, 32.3),
}
# Of modulated norms, with and without a mean to subtract. They have a bias and a gate more than add_rms_norm.
MODULATED_INSTRUCTIONS = {True: (28.2, 32.7), False: (25.0, 28.7)}
# Of RMSNorms with a rotation by halves, of adjacent columns, and without one.
MANY_INSTRUCTIONS = {False: (24.8, 33.4), True: (29.3, 32.5), None: (15.5, 20.5)}


@dataclass
class Run:
    """The launches of a forward and a backward, what they were given, and what they were to fill."""

    op: str
    x: Tensor
    weight: Tensor
    parameters: int  # weight, and bias where there is one
    groups: int
    statistics: int  # of a row: rstd, and the mean where there is one, of each group
    forward: Any
    backward: list[Any]
    sums: Any
    filled: dict[str, list[Tensor]]

    @property
    def passes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return PASSES["add" if self.op.startswith("add_") else "gated" if self.op in GATED else "plain"]

    @property
    def backward_parameters(self) -> int:
        """What the backward reads: the weight, and the bias where it computes what the gate multiplied."""
        return 2 if self.op == "gated_layer_norm" else 1

    @property
    def touched(self) -> int:
        """Elements of the parameters that the forward loads ahead for a row, one of each sector."""
        return 0 if self.op in GATED else self.parameters * -(-self.weight.nbytes // 32)

    @property
    def tiles(self) -> row_launch.RowTiles:
        """Of the backward."""
        itemsize = self.x.element_size()
        streams = self.op.startswith("add_") + (self.op in GATED) + self.op.endswith("gate first")
        cols, can_pack = self.x.shape[-1] // self.groups, self.op not in GATED
        return row_launch.backward_tiles(cols, itemsize, self.parameters, streams, itemsize, can_pack)[0]


@functools.cache
def run(
    op: str, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True, groups: int = 1,
    make: Callable[..., Tensor] = torch.randn,
) -> Run:  # fmt: skip
    """Forward and backward by the launchers, on random tensors, which `make` may lay out in its way. A gated norm's
    RMSNorm has no bias, as in models."""
    name, _, order = op.partition(", ")
    adds, gated, centers = name.startswith("add_"), op in GATED, name.endswith("layer_norm")
    x, other, dy, dh = (make(rows, cols, dtype=dtype) for _ in range(4))
    weight, bias = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype) if bias and centers else None
    residual, gate, wanted = other if adds else None, other if gated else None, (dtype, None if bias is None else dtype)
    row, gating, stream = (gate, None, 1, groups, 1), (True, not order), dtype if adds else None
    with virtual_gpu() as gpu:
        y, h, mean, rstd = kernels.row_norm_forward(
            x, residual, *row, weight, bias, 1e-6, centers, False, *gating, None, dtype, stream
        )
        dx, _, dgate, _, *others = kernels.row_norm_backward(
            dy, dh if adds else None, h if adds else x, None, *row, weight, bias, mean, rstd, False, *gating, None,
            dtype, stream, *wanted,
        )  # fmt: skip
    forward, *backward, sums = gpu.launches
    filled = {"forward": (y, h, mean, rstd), "backward": (dx, dgate), "sums": others}
    filled = {name: [t for t in tensors if t is not None] for name, tensors in filled.items()}
    statistics = groups * (1 + centers)
    return Run(op, x, weight, 2 - (bias is None), groups, statistics, forward, backward, sums, filled)


# widths of which no program holds a row in bf16 beside its sums
READ_AGAIN = [(op, 16384) for op in ("layer_norm", "add_layer_norm")]
READ_AGAIN += [("rms_norm", 32768), ("add_rms_norm", 16384), ("add_rms_norm", 32768)]
READ_AGAIN += [(op, cols) for op in GATED for cols in (12288, 16384) if (op, cols) != ("gated_rms_norm", 12288)]
operations = pytest.mark.parametrize("op", OPERATIONS)
widths = pytest.mark.parametrize("cols", (2560, 4096))
dtypes = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)


@operations
@widths
@dtypes
def test_bytes(op, cols, dtype):
    """Exactly: passes over x; parameters and statistics, which come from the cache; and the partial parameter sums."""
    rows = 128
    seen = run(op, rows, cols, dtype)
    (reads, writes), (backward_reads, backward_writes) = seen.passes
    size, weight = seen.x.nbytes, seen.weight.nbytes
    statistics, touched = 4 * seen.statistics * rows, seen.touched * dtype.itemsize * rows
    assert seen.forward.loads.bytes == reads * size + seen.parameters * weight * rows + touched
    assert seen.forward.unique_read == reads * size + seen.parameters * weight
    assert seen.forward.stores.bytes == writes * size + statistics

    (backward,) = seen.backward
    tiles = seen.tiles
    threads = 32 * tiles.warps // tiles.rows  # of a row, each of which reads its statistics, and its weight
    weight *= seen.backward_parameters
    assert backward.unique_read == backward_reads * size + weight + statistics
    assert backward.loads.bytes == backward_reads * size + rows * weight + threads * statistics
    assert backward.stores.bytes == backward_writes * size + 4 * seen.parameters * cols * backward.blocks


@operations
@widths
@dtypes
def test_every_output_is_written_and_no_sector_wasted(op, cols, dtype):
    seen = run(op, 128, cols, dtype)
    (backward,) = seen.backward
    for name, counters in {"forward": seen.forward, "backward": backward, "sums": seen.sums}.items():
        assert all(counters.fully_written(t) for t in seen.filled[name]), name
        touched = 128 * seen.touched if name == "forward" else 0  # each alone in its sector
        useful = counters.loads.bytes - touched * dtype.itemsize
        assert useful >= 32 * (counters.loads.sectors - touched), counters.hotspots(3)
        # a program of one row stores its two statistics alone in their sectors
        assert counters.stores.efficiency >= 0.985, counters.hotspots(3)
        assert counters.local_bytes == 0


@pytest.mark.parametrize("op", GATED)
def test_groups_read_and_write_what_rows_do(op):
    """But for statistics of their own."""
    seen, rows = run(op, 128, 4096, groups=4), 128
    (reads, writes), (backward_reads, backward_writes) = seen.passes
    size, weight, statistics = seen.x.nbytes, seen.weight.nbytes, 4 * seen.statistics * rows
    (backward,) = seen.backward
    assert seen.forward.unique_read == reads * size + seen.parameters * weight
    assert seen.forward.stores.bytes == writes * size + statistics
    assert backward.unique_read == backward_reads * size + seen.backward_parameters * weight + statistics
    assert backward.stores.bytes == backward_writes * size + 4 * seen.parameters * 1024 * backward.blocks
    assert all(counters.local_bytes == 0 for counters in (seen.forward, backward))
    assert all(backward.fully_written(t) for t in seen.filled["backward"])


@operations
@widths
def test_instructions(op, cols):
    seen = run(op, 128, cols)
    assert_instructions(seen, *INSTRUCTIONS[op])


@widths
def test_instructions_without_a_bias(cols):
    assert_instructions(run("layer_norm", 128, cols, bias=False), 14.0, 20.7)


def test_narrow_rows():
    """One attention head each."""
    seen = run("rms_norm", 256, 128)
    assert_instructions(seen, 14.0, 20.0)
    (backward,) = seen.backward
    for counters, (reads, writes) in zip((seen.forward, backward), PASSES["plain"], strict=True):
        assert reads <= counters.unique_read / seen.x.nbytes < reads + 0.05
        assert counters.stores.bytes < 1.05 * writes * seen.x.nbytes
        assert counters.stores.efficiency >= 0.95


@pytest.mark.parametrize("samples", (2, 128))
@pytest.mark.parametrize("subtract_mean", (True, False))
def test_modulated_norms(samples, subtract_mean):
    """Scale, shift and gate of a sample, chunks of one tensor, are read once; there is no copy, and no pass over rows
    but the compulsory ones: x, residual → y, h, and dy, dh, h, x → dx, dresidual."""
    rows, cols, dtype = 128, 1536, torch.bfloat16
    x, residual, dy, dh = (torch.randn(rows, cols, dtype=dtype) for _ in range(4))
    scale, shift, gate = torch.randn(samples, 3 * cols, dtype=dtype).chunk(3, 1)
    with virtual_gpu() as gpu:
        y, h, mean, rstd = kernels.row_norm_forward(
            x, residual, None, gate, 1, 1, samples, scale, shift, 1e-6, subtract_mean, True, True, True, None, dtype,
            dtype,
        )  # fmt: skip
        backward_outputs = kernels.row_norm_backward(
            dy, dh, h, x, None, gate, 1, 1, samples, scale, shift, mean, rstd, True, True, True, None, *[dtype] * 4
        )
    forward, backward = gpu.launches  # a sample's sums need no further launch where one program takes it
    size, parameter, statistics = x.nbytes, scale.nbytes, 4 * (1 + subtract_mean) * rows
    assert forward.unique_read == 2 * size + 3 * parameter
    assert forward.stores.bytes == 2 * size + statistics
    assert backward.unique_read == 4 * size + 2 * parameter + statistics
    assert backward.stores.bytes == 2 * size + 3 * parameter
    for counters, outputs in ((forward, (y, h)), (backward, backward_outputs)):
        assert all(counters.fully_written(t) for t in outputs if t is not None)
        assert counters.local_bytes == 0
        assert counters.loads.efficiency >= 1
        most = MODULATED_INSTRUCTIONS[subtract_mean][counters is backward]
        assert counters.thread_instructions <= most * x.numel()


@pytest.mark.parametrize("interleaved", (False, True, None))
def test_rms_norm_many(interleaved):
    """Queries and keys of a packed projection, as they lie in it, in one launch a direction. cos and sin come from
    memory once, for all heads of all inputs. None: without a rotation."""
    positions, heads, cols, dtype = 64, (4, 2), 128, torch.bfloat16
    q, k, _ = torch.randn(2, positions, 8, cols, dtype=dtype).split((*heads, 2), 2)
    dys = [torch.randn(2, positions, n, cols, dtype=dtype) for n in heads]
    weights = [torch.randn(cols, dtype=dtype) for _ in heads]
    tables = [torch.randn(positions, cols, dtype=dtype) for _ in range(2 if interleaved is not None else 0)]
    rotary = [[t[None, :, None].expand(x.shape) for x in (q, k)] for t in tables] or [[], []]
    options = bool(interleaved), False, None
    with virtual_gpu() as gpu:
        *ys, first, second = kernels.rms_norm_many_forward(
            [q, k], weights, *rotary, options[0], 1e-6, *options[1:], dtype
        )
        results = kernels.rms_norm_many_backward(dys, [q, k], weights, [first, second], *rotary, *options, [True, True])
    forward, backward, sums = gpu.launches
    size, parameters, statistics = q.nbytes + k.nbytes, 2 * weights[0].nbytes, 4 * 2 * positions * sum(heads)
    parameters += sum(t.nbytes for t in tables)
    assert forward.unique_read == size + parameters
    assert forward.stores.bytes == size + statistics
    assert backward.unique_read == 2 * size + parameters + statistics
    assert backward.stores.bytes == size + 2 * 4 * cols * backward.blocks
    for counters, outputs in ((forward, (*ys, first, second)), (backward, results[:2]), (sums, results[2:])):
        assert all(counters.fully_written(t) for t in outputs)
        assert counters.local_bytes == 0
    most = MANY_INSTRUCTIONS[interleaved]
    for counters, instructions in zip((forward, backward), most, strict=True):
        assert counters.thread_instructions <= instructions * (q.numel() + k.numel())


def packed(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Four heads of k, (2, S, 4, cols), in a packed projection."""
    return torch.randn(2, rows // 8, 3, 4, cols, dtype=dtype)[:, :, 1]


def transposed(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Four heads, (2, 4, S, cols), of memory (2, S, 4, cols)."""
    return torch.randn(2, rows // 8, 4, cols, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize("make", (packed, transposed), ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", ("rms_norm", "layer_norm", "add_rms_norm", "gated_rms_norm"))
def test_heads_are_read_as_contiguous_rows_are(op, make):
    """By the same accesses; a row's number is divided once, not once an element."""
    seen, plain = run(op, 256, 128, make=make), run(op, 256, 128)
    for ours, theirs in zip((seen.forward, *seen.backward), (plain.forward, *plain.backward), strict=True):
        assert (ours.loads.bytes, ours.unique_read) == (theirs.loads.bytes, theirs.unique_read)
        assert (ours.stores.bytes, ours.local_bytes) == (theirs.stores.bytes, 0)
        assert ours.loads.efficiency == theirs.loads.efficiency
    most = 1.25 if op == "add_rms_norm" else 1.2  # dh is read with offsets of its own
    assert_instructions(seen, *(most * found for found in instructions(plain)))


@pytest.mark.parametrize("make", (packed, transposed), ids=lambda f: f.__name__)
def test_launch_plans_of_heads_copy_nothing(make):
    """And one kernel serves every length of sequence."""
    compiled = []
    for rows in (256, 280, 344):
        x = make(rows, 128, torch.bfloat16)
        options = None, None, None, 1, 1, 1, None, None, 1e-6, False, False, True, True, None, x.dtype, None
        with virtual_gpu():
            plan = plans.record("row_norm_forward", (x, *options))
        assert [step[0] for step in plan.steps] == ["launch"] and not plan.temporaries
        compiled.append(plan.launches[0][0])
    assert compiled[0] is compiled[1] is compiled[2]


def instructions(seen: Run) -> tuple[float, float]:
    """Thread instructions an element, forward and backward."""
    elements = seen.x.numel()
    backward = sum(counters.thread_instructions for counters in seen.backward)
    return seen.forward.thread_instructions / elements, backward / elements


def assert_instructions(seen: Run, forward: float, backward: float) -> None:
    found = instructions(seen)
    assert found[0] <= forward
    assert found[1] <= backward


WIDE = [(op, cols) for op in OPERATIONS for cols in (7168, 12288, 16384) if (op, cols) not in READ_AGAIN]


@pytest.mark.parametrize(("op", "cols"), WIDE)
def test_wide_rows_are_read_once(op, cols):
    seen = run(op, 4, cols)
    tiles, (backward,) = seen.tiles, seen.backward
    _, (reads, writes) = seen.passes
    statistics = 4 * 4 * seen.statistics * (32 * tiles.warps // tiles.rows)  # read by every thread
    parameters = 4 * seen.backward_parameters * seen.weight.nbytes
    if tiles.packed:  # the weight once more for dx, but for the tile that comes first there, too
        parameters += 4 * seen.weight.nbytes * (tiles.count - 1) // tiles.count
    assert backward.loads.bytes == reads * seen.x.nbytes + parameters + statistics
    assert backward.stores.bytes == writes * seen.x.nbytes + 4 * seen.parameters * cols * backward.blocks
    assert backward.local_bytes == 0


@pytest.mark.parametrize(("op", "cols"), READ_AGAIN)
def test_wider_rows_are_read_again_from_the_cache_only(op, cols):
    """Registers go to the parameter sums of a part; its program reads the row, and then the part again."""
    seen = run(op, 4, cols)
    (reads, _), _ = seen.passes
    parameters = 4 * seen.parameters * seen.weight.nbytes + 4 * seen.touched * seen.x.element_size()
    assert seen.forward.loads.bytes == reads * seen.x.nbytes + parameters
    assert_read_once_from_memory(seen, 4)
    assert seen.backward[0].local_bytes == 0


@operations
def test_long_rows(op):
    """Over 32,768 columns: the forward reads x twice, and a gate before the norm."""
    seen = run(op, 3, 40000)
    size, weight = seen.x.nbytes, seen.weight.nbytes
    (reads, writes), _ = seen.passes
    again = 2 if op.endswith("gate first") else 1
    assert seen.forward.loads.bytes == (reads + again) * size + 3 * seen.parameters * weight
    assert seen.forward.stores.bytes == writes * size + 3 * 4 * seen.statistics
    assert_read_once_from_memory(seen, 3)
    assert all(seen.forward.fully_written(t) for t in seen.filled["forward"])
    assert all(seen.backward[-1].fully_written(t) for t in seen.filled["backward"])
    assert all(seen.sums.fully_written(t) for t in seen.filled["sums"])


def assert_read_once_from_memory(seen: Run, rows: int) -> None:
    """By the backward of rows that are not held: each part's program reads h, dy and the gate of the whole row, all
    else once."""
    (backward,) = seen.backward
    _, (reads, writes) = seen.passes
    size, weight, cols = seen.x.nbytes, seen.weight.nbytes, seen.x.shape[1]
    parts = row_launch.column_chunks(cols, seen.tiles)
    assert backward.unique_read == reads * size + seen.backward_parameters * weight + 4 * seen.statistics * rows
    statistics = 4 * seen.statistics * rows * parts * backward.threads_per_block  # read by every thread
    whole = 3 if seen.op in GATED else 2
    parameters = (seen.backward_parameters + parts) * rows * weight
    assert backward.loads.bytes == (reads + whole * parts) * size + parameters + statistics
    assert backward.stores.bytes == writes * size + 4 * seen.parameters * cols * backward.grid[1]
