"""The launch choices: what these plain functions promise for every size, and that addresses have 64 bits."""

import inspect
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnorm import backend
from fastnorm.backend import ROW_NORMS
from fastnorm.views import row_levels
from helpers.layouts import far_apart
from helpers.norms import backward, forward

launch = pytest.importorskip("fastnorm.triton_kernels.launch", reason="needs Triton")
row_launch = pytest.importorskip("fastnorm.triton_kernels.row_launch", reason="needs Triton")
list_launch = pytest.importorskip("fastnorm.triton_kernels.list_launch", reason="needs Triton")
traits = pytest.importorskip("fastnorm.triton_kernels.jit").traits

HEAD_WIDTHS = (64, 80, 96, 128, 256)
MODEL_WIDTHS = (768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)
backward_tiles = row_launch.backward_tiles
CHOICES = {
    "forward": row_launch.row_tiles,
    "forward, adding": lambda cols, itemsize: row_launch.forward_tiles(cols, itemsize, False, False),
    "forward, alone": lambda cols, itemsize: row_launch.forward_tiles(cols, itemsize, False, itemsize == 2),
    "backward, one sum": lambda cols, itemsize: backward_tiles(cols, itemsize, 1, 0, itemsize)[0],
    "backward, two sums": lambda cols, itemsize: backward_tiles(cols, itemsize, 2, 0, itemsize)[0],
    "backward, two sums, adding": lambda cols, itemsize: backward_tiles(cols, itemsize, 2, 1, itemsize)[0],
    "backward, two sums, gate first": lambda cols, itemsize: backward_tiles(cols, itemsize, 2, 2, itemsize)[0],
}
FORWARD = [choose for kind, choose in CHOICES.items() if kind.startswith("forward")]
choices = pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
# nothing; dh, or a gate behind the norm; a gate before it, and x
beside = pytest.mark.parametrize("streams", [0, 1, 2], ids=["plain", "adds", "gate first"])
itemsizes = pytest.mark.parametrize("itemsize", [2, 4, 8])
columns = st.integers(1, 32768) | st.sampled_from(MODEL_WIDTHS)
rows_of_a_batch = st.integers(1, 2**40) | st.integers(1, 4096) | st.integers(4096, 8192)


def power_of_two(n: int) -> bool:
    return n.bit_count() == 1


@choices
@itemsizes
@given(cols=columns)
def test_tiles_cover_the_row_and_every_thread_has_work(choose, itemsize, cols):
    tiles = choose(cols, itemsize)
    parts = row_launch.column_chunks(cols, tiles)
    assert tiles.tile * tiles.count * (parts - 1) < cols <= tiles.tile * tiles.count * parts
    assert all(power_of_two(n) for n in (tiles.tile, tiles.rows, tiles.warps))
    assert tiles.warps <= (32 if choose in FORWARD else 16)
    assert tiles.tile * tiles.rows >= 32 * tiles.warps


@choices
@itemsizes
@given(cols=columns)
def test_a_thread_holds_a_bounded_part_of_the_row(choose, itemsize, cols):
    if not row_launch.is_long(cols, itemsize):
        assert choose(cols, itemsize).registers <= (160 if choose in FORWARD else 64)


@choices
@itemsizes
@pytest.mark.parametrize("cols", MODEL_WIDTHS)
def test_padding_at_model_widths(choose, itemsize, cols):
    tiles = choose(cols, itemsize)
    idle = tiles.tile * tiles.count * row_launch.column_chunks(cols, tiles) - cols
    assert launch.padding(cols, tiles.tile) == idle / cols
    assert idle <= (idle + cols if choose in FORWARD else cols) / 8  # of all lanes, or of those with work


@choices
@itemsizes
@given(cols=columns)
def test_padding_of_other_widths(choose, itemsize, cols):
    """Less than half of the row, or than what one warp takes at once."""
    tiles = choose(cols, itemsize)
    idle = tiles.tile * tiles.count * row_launch.column_chunks(cols, tiles) - cols
    assert idle < max(cols / 2, 32 * 16 // itemsize)


@choices
@itemsizes
@pytest.mark.parametrize("cols", HEAD_WIDTHS + MODEL_WIDTHS)
def test_a_thread_has_whole_16_byte_accesses(choose, itemsize, cols):
    """But for a backward in 16 bits, where a seventh and more of the lanes would idle: half, whole cache lines."""
    tiles = choose(cols, itemsize)
    halved = itemsize == 2 and choose not in FORWARD and cols in (1280, 2560, 5120, 7168)
    access = 8 if halved else 16
    assert tiles.tile * tiles.rows * itemsize % (access * 32 * tiles.warps) == 0


def test_the_tiling_knows_nothing_of_the_batch():
    tilings = row_launch.row_tiles, row_launch.forward_tiles, backward_tiles, row_launch.chunk_tiles
    for choose in (*tilings, row_launch.long_tile, row_launch.prefetches, row_launch.resident_rows, row_launch.touches):
        assert not {"rows", "n_rows", "multiprocessors"} & set(inspect.signature(choose).parameters)


@itemsizes
@beside
@given(
    cols=columns | st.integers(16385, 10**6), rows=rows_of_a_batch, multiprocessors=st.integers(1, 304),
    partials=st.integers(0, 2), spares=st.booleans(),
)  # fmt: skip
def test_backward_programs(itemsize, streams, cols, rows, multiprocessors, partials, spares):
    """All of them resident at once, each with a row, and few enough for their partial sums."""
    passes = 3 + streams
    tiles, _ = row_launch.backward_tiles(cols, itemsize, max(1, partials), streams, itemsize)
    parts = row_launch.column_chunks(cols, tiles)
    most = row_launch.backward_programs(rows, tiles, multiprocessors // parts, itemsize, partials, passes)
    programs = row_launch.backward_programs(rows, tiles, multiprocessors // parts, itemsize, partials, passes, spares)
    assert programs <= most
    assert 1 <= programs <= -(-rows // tiles.rows)
    assert programs * parts <= max(parts, tiles.resident * multiprocessors)
    assert tiles.resident * tiles.warps <= 16
    if rows >= 4096:
        assert partial_share(rows, programs, partials, itemsize, passes) <= 0.03


@itemsizes
@given(cols=columns, rows=st.integers(1, 10**5), multiprocessors=st.integers(1, 304), partials=st.integers(0, 3))
def test_programs_of_a_sample(itemsize, cols, rows, multiprocessors, partials):
    """At least one, no more than blocks of rows, and few enough for their partial sums, however short the sample is."""
    tiles, _ = row_launch.backward_tiles(cols, itemsize, 3, 2, itemsize)
    programs = row_launch.sample_programs(rows, tiles, multiprocessors, itemsize, partials, 6)
    assert 1 <= programs <= -(-rows // tiles.rows)
    assert programs == 1 or partial_share(rows, programs, partials, itemsize, 6) <= 0.03
    assert programs <= tiles.resident * multiprocessors


def partial_share(rows: int, programs: int, partials: int, itemsize: int, passes: int) -> float:
    """Partial sums that are written, as a part of x and dy, and dh, read and dx written; float64 data has float64
    sums."""
    return programs * partials * max(4, itemsize) / (passes * rows * itemsize)


def test_a_card_is_filled_by_a_training_batch():
    """As often as registers allow, and no program has to wait for another one's end."""
    tiles, _ = row_launch.backward_tiles(4096, 2, sums=1, streams=0, widest=2)
    assert row_launch.backward_programs(8192, tiles, 132, 2, 1, 3) == 132


@pytest.mark.parametrize("rows, even, fewer", [
    (4096, 132, 132), (512, 128, 86), (341, 114, 86), (256, 128, 86), (165, 83, 83), (164, 82, 82), (132, 132, 132),
])  # fmt: skip
def test_few_rows_have_no_more_programs_than_they_need(rows, even, fewer):
    """Each writes partial sums. All but the last take as many turns; those that are spared leave five eighths."""
    tiles = row_launch.backward_tiles(8192, 2, sums=2, streams=0, widest=2)[0]
    assert row_launch.backward_programs(rows, tiles, 132, 2, 1, 3) == even
    assert row_launch.backward_programs(rows, tiles, 132, 2, 1, 3, spares=True) == fewer
    assert row_launch.backward_programs(rows, tiles, 132, 2, 0, 3, spares=True) == min(rows, 132)
    assert row_launch.backward_programs(3168, tiles, 132, 2, 1, 3, spares=True) == 132, "they add 3 per cent"


@pytest.mark.parametrize("cols, is_spared", [
    (4096, False), (5120, False), (7168, True), (8192, True), (12288, True), (16384, False),
])  # fmt: skip
def test_programs_are_spared_where_each_keeps_a_row(cols, is_spared):
    """Rows of 16384 columns are read again, and short ones leave the memory idle."""
    with patch.object(row_launch, "is_blackwell", lambda: False):
        assert row_launch.spares_programs(*row_launch.backward_tiles(cols, 2, 2, 0, 2, True), 2) == is_spared
    with patch.object(row_launch, "is_blackwell", lambda: True):
        assert not row_launch.spares_programs(*row_launch.backward_tiles(cols, 2, 2, 0, 2, True), 2)


@pytest.mark.parametrize("cols, warps, alone, gated", [
    (768, 2, 2, 2), (6144, 8, 8, 8), (8192, 8, 8, 8), (12288, 16, 8, 16), (16384, 16, 16, 16), (32768, 32, 32, 16),
])  # fmt: skip
def test_the_forwards_warps_follow_from_what_registers_allow(cols, warps, alone, gated):
    """Three programs of 12288 columns are resident with 8 warps, and two with 16; rows of 32768 need 32."""
    traits = {(False, False): warps, (False, True): alone, (True, False): gated}
    for (has_gate, is_alone), expected in traits.items():
        tiles = row_launch.forward_tiles(cols, 2, has_gate, is_alone)
        assert tiles.warps == expected
        row = row_launch.row_tiles(cols, 2)
        assert (tiles == row) == (tiles.warps == row.warps) and tiles.tile * tiles.count == row.tile * row.count


@pytest.mark.parametrize("cols, itemsize, is_rms, is_alone, a100, h100, b200", [
    (4096, 2, True, False, 64, 64, 64), (4096, 2, False, False, 64, 64, 64), (16384, 2, False, False, 64, 64, 64),
    (4096, 4, False, False, None, None, 64), (1024, 4, False, False, None, None, None),
    (5120, 2, False, False, None, None, 80), (5121, 2, False, False, None, None, None),
    (2048, 8, False, False, None, None, None), (768, 2, True, False, 40, 40, 40), (768, 2, False, False, 40, 40, None),
    (769, 2, True, False, None, None, None), (6144, 2, True, False, None, None, None),
    (7168, 2, False, True, 80, 80, None), (7168, 2, True, True, None, None, None),
    (7168, 2, False, False, None, None, None), (7169, 2, False, True, None, None, None),
    (1024, 2, False, True, 48, 64, 64), (1024, 2, True, True, 64, 64, 64), (1024, 2, False, False, 64, 64, 64),
])  # fmt: skip
def test_a_norm_without_a_gate_has_as_many_programs_as_registers_allow(
    cols, itemsize, is_rms, is_alone, a100, h100, b200
):  # fmt: skip
    tiles = row_launch.forward_tiles(cols, itemsize, False, is_alone)
    for arch, expected in ((80, a100), (90, h100), (100, b200)):
        target = launch.GPUTarget("cuda", arch, 32)
        with patch.multiple(launch, INTERPRETED=False, backend=lambda: "cuda", _current_target=lambda t=target: t):
            resident = row_launch.resident_rows(cols, tiles, itemsize, is_rms, is_alone)
        assert (resident > 1 or tiles.warps == 32) == (expected is not None)
        if expected:
            assert launch._options(tiles.warps, resident, target)["maxnreg"] == expected
    with patch.multiple(row_launch, is_blackwell=lambda: True, is_sm_120=lambda: True):
        assert tiles.registers != 32 or row_launch.resident_rows(cols, tiles, itemsize, is_rms, is_alone) == 1


@pytest.mark.parametrize("cols, itemsize, rows, registers", [
    (128, 4, 8, 8), (127, 4, 8, 8), (1, 4, 1024, 8), (96, 4, 16, 12), (127, 2, 8, 8), (3, 2, 256, 8), (1024, 4, 1, 16),
    (768, 4, 1, 12), (128, 2, 32, 32), (512, 4, 2, 16), (1001, 4, 2, 32), (1001, 2, 2, 32), (63, 8, 32, 32),
])  # fmt: skip
def test_a_thread_has_few_elements_of_short_rows_that_take_many_registers(cols, itemsize, rows, registers):
    """In float32, or where it can't load 16 bytes at a time; else, and in rows with a gate, as many as of long rows."""
    tiles = row_launch.forward_tiles(cols, itemsize, False, False)
    assert (tiles.rows, tiles.registers) == (rows, registers)
    gated = row_launch.forward_tiles(cols, itemsize, True, False)
    assert gated == row_launch.row_tiles(cols, itemsize) and gated.registers >= registers


@pytest.mark.parametrize("cols, alone, other", [(128, False, False), (1024, True, False), (2048, True, True)])
def test_parameters_are_touched_where_a_program_has_one_row(cols, alone, other):
    """RMSNorm alone has registers for it where a program has two."""
    tiles = row_launch.forward_tiles(cols, 2, False, False)
    for is_sm_120 in (False, True):
        with patch.object(row_launch, "is_sm_120", lambda found=is_sm_120: found):
            assert row_launch.touches(tiles, True) == (alone and not is_sm_120)
            assert row_launch.touches(tiles, False) == (other and not is_sm_120)


@itemsizes
def test_rows_of_64_registers_a_thread_are_kept_and_longer_ones_are_not(itemsize):
    cols = 64 * 512 // max(1, itemsize // 4)  # of 16 warps' threads; float64 takes two registers, 16 bits take one
    assert not row_launch.is_long(cols, itemsize)
    assert row_launch.is_long(cols + 1, itemsize)
    for sums in (1, 2):
        assert not row_launch.backward_tiles(cols + 1, itemsize, sums, 0, itemsize)[1]


@itemsizes
@beside
@given(cols=st.integers(1, 10**5), sums=st.sampled_from([1, 2]), weight=st.sampled_from([2, 4, 8]))
def test_what_a_thread_holds_fits_its_registers(itemsize, streams, cols, sums, weight):
    """Of a multiprocessor's registers, the resident programs' threads get equal parts, and at most 255 each."""
    tiles, is_kept = row_launch.backward_tiles(cols, itemsize, sums, streams, max(itemsize, weight))
    kept = (2 + sums) * tiles.registers if is_kept else sums * tiles.registers
    assert kept < min(255, 65536 // (32 * tiles.warps * tiles.resident))


# by the number of sums, of tensors beside h and dy, and the size of the elements
READ_AGAIN = {(1, 1, 2): [16384], (1, 2, 2): [12288, 16384], (1, 0, 4): [16384]}
READ_AGAIN |= {(sums, 2, itemsize): [8192, 12288, 16384] for sums, itemsize in ((2, 2), (1, 4), (2, 4))}


@pytest.mark.parametrize("itemsize", [2, 4])
@beside
@pytest.mark.parametrize("sums", [1, 2], ids=["rms_norm", "layer_norm"])
def test_rows_of_models_are_read_once(sums, streams, itemsize):
    """But for those that registers have no room for."""
    kept = {cols: row_launch.backward_tiles(cols, itemsize, sums, streams, itemsize)[1] for cols in MODEL_WIDTHS}
    expected = READ_AGAIN.get((sums, streams, itemsize), [] if (sums, streams) == (1, 0) else [12288, 16384])
    assert [cols for cols in kept if not kept[cols]] == expected


@pytest.mark.parametrize("sums, streams", [(1, 0), (2, 0), (2, 1)])
@given(cols=st.integers(8193, 16384))
def test_rows_of_16_bits_that_stay_as_loaded(sums, streams, cols):
    """Up to 12,288 columns; an access has half of its 16 bytes, but where a row's tiles are replaced by the next one's.
    Not with a gate, nor beside a wider weight."""
    tiles, is_kept = row_launch.backward_tiles(cols, 2, sums, streams, 2, can_pack=True)
    assert tiles.packed == (cols <= 12288)
    if tiles.packed:
        replaces = row_launch.replaces(tiles, 2, sums)
        assert replaces == ((sums, streams) == (2, 0) and launch.padding(cols, 4096) <= launch.MAX_PADDING)
        access = 16 if replaces else 8
        assert is_kept and row_launch.column_chunks(cols, tiles) == 1 and tiles.tile * 2 == access * 32 * tiles.warps
        assert row_launch.prefetches(tiles, 2, sums) == (sums == 1)
    for widest, can_pack in ((4, True), (2, False)):
        assert not row_launch.backward_tiles(cols, 2, sums, streams, widest, can_pack)[0].packed


@pytest.mark.parametrize("sums", [2, 3])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@given(cols=st.integers(1, 16384), streams=st.sampled_from([1, 2]))
def test_rows_beside_an_x_gate_that_are_kept_with_few_registers(sums, itemsize, cols, streams):
    """Up to 16 registers of each of 16 warps; rows of other vendors' cards, and of float64, are read again."""
    tiles, is_kept = row_launch.backward_tiles(cols, itemsize, sums, streams, itemsize, can_spare=True)
    others, other_kept = row_launch.backward_tiles(cols, itemsize, sums, streams, itemsize)
    if tiles.sparing:
        assert is_kept and itemsize <= 4 and (tiles.warps, tiles.rows) == (16, 1)
        assert tiles.registers * (sums + 3) <= 96
        assert tiles.tile * itemsize == (16 if itemsize == 2 else 8) * 32 * tiles.warps
    else:
        assert (tiles, is_kept) == (others, other_kept)
    assert row_launch.backward_tiles(8192, itemsize, sums, 2, itemsize, can_spare=True)[0].sparing == (itemsize <= 4)


@pytest.mark.parametrize(
    "vendor, arch, holds", [("cuda", 90, False), ("cuda", 100, True), ("cuda", 120, True), ("hip", "gfx942", False)]
)
def test_the_weight_is_kept_where_a_card_is_new(vendor, arch, holds, monkeypatch):
    """Beside a next row in flight: not with elements of 32 bits, packed rows, or many short rows a program; nor where a
    thread's registers are full of a row and two sums."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_current_target", lambda: SimpleNamespace(backend=vendor, arch=arch))
    tiles, _ = row_launch.backward_tiles(4096, 2, 2, 0, 2)
    single, _ = row_launch.backward_tiles(8192, 2, 2, 0, 2)  # one row a program
    assert row_launch.holds_weight(tiles, 2, 2, 1, 0) == row_launch.holds_weight(tiles, 2, 2, 2, 1) == holds
    assert row_launch.holds_weight(tiles, 2, 4, 2, 0) == row_launch.holds_weight(single, 2, 2, 2, 0) == (arch == 100)
    for other, itemsize in ((tiles, 4), (tiles._replace(packed=True), 2), (tiles._replace(rows=16), 2)):
        assert not row_launch.holds_weight(other, itemsize, 2, 1, 0)
    assert not row_launch.holds_weight(single, 2, 4, 2, 0)


def test_tiles_are_loaded_ahead_and_chunks_are_long_where_a_card_is_new(monkeypatch):
    """Of dh as many as registers hold where one program has the row; beside an x_gate two of each tensor. A chunk has
    as many columns as registers hold, beside a single sum and no gate."""
    bf16, fp32 = (row_launch.chunk_tiles(16384, itemsize, 2, 1) for itemsize in (2, 4))
    cases = (bf16, 2, 2, 1, False), (fp32, 4, 1, 1, False), (fp32, 4, 2, 1, False), (bf16, 2, 2, 2, False)
    cases += (bf16, 2, 3, 2, True), (bf16, 8, 1, 1, False), (bf16._replace(count=1), 2, 3, 2, True)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for vendor, arch, expected in (
        ("cuda", 100, [4, 8, 2, 1, 2, 1, 1]),
        ("cuda", 90, [1] * 7),
        ("hip", "gfx942", [1] * 7),
    ):
        target = SimpleNamespace(backend=vendor, arch=arch)
        monkeypatch.setattr(launch, "_current_target", lambda target=target: target)
        assert [row_launch.tiles_ahead(*case) for case in cases] == expected
        assert row_launch.has_long_chunks(has_gate=False) == (arch == 100) and not row_launch.has_long_chunks(True)
    cases = (4, 1, 0), (4, 1, 1), (2, 1, 1), (4, 2, 1), (2, 2, 0), (8, 1, 0)  # itemsize, sums and streams
    for is_long, counts in ((True, [16, 16, 8, 8, 4, 8]), (False, [8, 8, 4, 8, 4, 8])):
        tilings = [row_launch.backward_tiles(32768, *case, case[0], long_chunks=is_long) for case in cases]
        assert [tiles.count for tiles, _ in tilings] == counts and not any(is_kept for _, is_kept in tilings)


def test_loads_are_pinned_where_one_program_has_the_row_and_sums_computed_at_once_where_it_fills_registers():
    assert row_launch.pins_loads(1, 2, 2, has_gate=False)
    others = (2, 2, 2, False), (1, 4, 2, False), (1, 2, 1, False), (1, 2, 2, True)
    assert not any(row_launch.pins_loads(*case) for case in others)
    full, shorter, several = (row_launch.backward_tiles(cols, 4, 2, 1, 4)[0] for cols in (8192, 6144, 4096))
    assert row_launch.sums_at_once(full, 4, 2, 1)
    others = (full, 2, 2, 1), (full, 4, 1, 1), (full, 4, 2, 2), (shorter, 4, 2, 1), (several, 4, 2, 1)
    assert not any(row_launch.sums_at_once(*case) for case in others)


def test_access_bytes_is_the_largest_element():
    narrow, wide = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.float32)
    assert launch.access_bytes((narrow, None)) == 2
    assert launch.access_bytes((narrow, wide, None)) == 4


@pytest.mark.triton
@pytest.mark.parametrize("cols", [96, 40000])
@pytest.mark.parametrize("op", ROW_NORMS)
def test_offsets_beyond_31_bits(op, cols, triton_device, card_memory):
    """The row stride has 31 bits, and the last row starts beyond them."""
    kernels = backend._triton
    inputs = far_apart(4, 3, cols, 2**30 + 16, triton_device)
    weight = torch.randn(cols, device=triton_device).bfloat16()
    gradient = torch.bfloat16 if cols < 1000 else None  # sums over the rows take Triton's interpreter seconds

    def both_directions(x, other, dy, dh):
        y, h, *moments = forward(kernels, op, x, other, weight, weight, 1e-6)
        # h, too, may be strided
        gradients = backward(kernels, op, dy, dh, x, weight, *moments, gradient, gradient, gate=other, bias=weight)
        return y, h, *moments, *gradients

    for far, near in zip(both_directions(*inputs), both_directions(*inputs.contiguous()), strict=True):
        assert far is near is None or torch.equal(far, near)


@itemsizes
@given(length=st.integers(1, 1 << 15))
def test_units_take_no_more_warps_than_a_card_has(itemsize, length):
    tiles = list_launch.unit_tiles(length, itemsize)
    assert tiles.warps <= 16
    # one unit a program, as the kernel that doesn't hold it takes them
    assert list_launch.keeps_powers(tiles) or tiles.rows == 1


@pytest.mark.parametrize("sums", [0, 1])
@itemsizes
def test_rotated_rows_have_few_tiles(itemsize, sums):
    """Where partners would be tiles of a few columns, the tiles are the norm's own: no thread has whole rows, and the
    kernel stays short."""
    for cols in (64, 72, 80, 96, 112, 128, 192, 256):
        alone = row_launch.many_row_tiles((cols,), itemsize, 0, sums)[0]
        for rotary in range(2, cols + 1, 2):
            tiles = row_launch.many_row_tiles((cols,), itemsize, rotary // 2, sums)[0]
            assert tiles.count <= max(alone.count, row_launch.MAX_PAIRED_TILES), (cols, rotary, tiles)
            assert tiles.tile * tiles.count >= cols


@pytest.mark.parametrize("cols", [64, 128, 256])
def test_rotated_rows_are_read_in_whole_accesses(cols):
    tiles = row_launch.many_row_tiles((cols,), 2, cols // 2, 1)[0]
    assert tiles.tile * tiles.rows * 2 >= launch.WARP * tiles.warps * launch.ACCESS_BYTES
    assert tiles.resident * tiles.warps * 170 * launch.WARP <= 65536, "130 to 156 registers a thread, none spilled"


@pytest.mark.parametrize("cols, is_capped", [
    (1024, False), (1536, True), (2048, True), (4096, True), (5120, False), (7001, False), (8192, True), (16384, True),
])  # fmt: skip
def test_products_have_as_many_programs_as_64_registers_allow(cols, is_capped):
    """Not where ptxas would spill: of rows of more than 32 elements a thread, with masks, or of two a program."""
    tiles = row_launch.row_tiles(cols, 2)
    assert row_launch.resident_products(cols, tiles, 2) == (32 // tiles.warps if is_capped else 1)
    assert row_launch.resident_products(cols, row_launch.row_tiles(cols, 4), 4) == 1


def test_every_batch_of_several_inputs_runs_the_same_code():
    """Triton makes constants of numbers in tuples that are 1, and other code for multiples of 16."""
    many = pytest.importorskip("fastnorm.triton_kernels.rms_norm_many")
    tiles = row_launch.many_row_tiles((64,), 2, 0)
    kinds = set()
    for rows in (1, 5, 16, 48, 4096):
        blocks, sizes = many._blocks_and_sizes([row_levels([torch.empty(rows, 64)], 1)], tiles)
        assert (sizes[0] >> 1, sizes[1] >> 1) == (rows, blocks[0])
        kinds.add(tuple(traits(sizes, False)))
    assert len(kinds) == 1
