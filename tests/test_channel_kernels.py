"""What only the Triton kernels of batch_norm and group_norm promise: launch choices, chunks, 64-bit addresses."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
from fastnorm import backend
from helpers.channel_norms import as_image, format_of
from helpers.layouts import far_apart

channel_launch = pytest.importorskip("fastnorm.triton_kernels.channel_launch", reason="needs Triton")
launch = pytest.importorskip("fastnorm.triton_kernels.launch", reason="needs Triton")
kernels = backend._triton
F32, BF16 = torch.float32, torch.bfloat16

lengths = st.integers(1, 2**40) | st.integers(1, 5000)
multiprocessor_counts = st.integers(1, 304)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "pixels"])


depths = st.sampled_from([1, 2, 4, 8])


@given(tiles=lengths, depth=depths, blocks=st.integers(1, 10**6), count=multiprocessor_counts, steps=st.integers(1, 2))
def test_chunks_cover_the_tiles_and_fill_the_card_at_most_once(tiles, depth, blocks, count, steps):
    chunk, at_once = channel_launch.channel_chunk(tiles, depth, blocks, count, steps)
    chunks = -(-tiles // chunk)
    assert 1 <= at_once <= depth and at_once <= chunk
    assert -(-chunk // at_once) == -(-chunk // depth)  # as few steps as there can be
    assert chunks == 1 or (chunks * blocks <= channel_launch.CHANNEL_PROGRAMS * count and chunk >= steps * depth)
    assert chunks < 65536  # of a grid's second dimension


def test_steps_are_even():
    """10 tiles are two steps of 5, not one of 8 and one of 2."""
    assert channel_launch.channel_chunk(10, 8, 32, 132) == (10, 5)
    assert channel_launch.channel_chunk(98, 8, 256, 132) == (49, 7)


def test_64_channels_fill_a_card():
    tiling = channel_launch.unit_lanes(32 * 3136 // 8, 64, channel_launch.ELEMENTWISE_DEPTH, 132)
    tiles = -(-(32 * 3136 // 8) // tiling.lanes)
    chunks = -(-tiles // channel_launch.channel_chunk(tiles, channel_launch.ELEMENTWISE_DEPTH, 64, 132)[0])
    assert tiling.units == 1 and 64 * chunks >= 2 * 132


@given(vectors=lengths, units=st.integers(1, 10**6), depth=depths, count=multiprocessor_counts)
def test_units_that_share_a_program_are_walked_in_one_step(vectors, units, depth, count):
    tiling = channel_launch.unit_lanes(vectors, units, depth, count)
    assert tiling.units * tiling.lanes == channel_launch.TILE_VECTORS
    assert tiling.units == 1 or tiling.lanes * depth >= vectors
    assert tiling.lanes < 2 * vectors


@given(vectors=st.integers(1, 4096))
def test_tiles_of_pixels(vectors):
    tiling = channel_launch.channel_vectors(vectors)
    assert tiling.vectors * tiling.pixels == channel_launch.TILE_VECTORS
    assert tiling.vectors <= 4 or launch.padding(vectors, tiling.vectors) <= launch.MAX_PADDING


@given(items=lengths, units=lengths, programs=st.sampled_from([launch.SUMMING_PROGRAMS, launch.JOINING_PROGRAMS]))
def test_tiles_of_partials(items, units, programs):
    """Few units are spread over many programs, in the interpreter over a few; of many, programs read whole sectors."""
    rows, width = launch.join_tile(items, units, programs)
    assert rows * width <= launch.JOINED and rows & (rows - 1) == width & (width - 1) == 0
    assert width == 1 if units < 2 * programs else width >= min(32, units // programs)


@given(items=lengths, groups=st.integers(1, 4096))
def test_tiles_of_groups_partials(items, groups):
    """One step, where that is possible, of as many groups as it has room for, and no more than a sample has."""
    rows, width = launch.group_join_tile(items, groups)
    assert rows & (rows - 1) == width & (width - 1) == 0 and rows * width <= launch.JOINED
    assert rows >= min(items, launch.JOINED) and 1 <= width <= 32 and width < 2 * groups
    assert 2 * rows * width > launch.JOINED or width == 32 or width >= groups


@pytest.mark.parametrize("channels", [64, 128, 256, 320, 512, 640, 960, 1024, 1280, 1920, 2048, 2560])
def test_no_lane_is_idle_at_model_widths(channels):
    assert launch.padding(channels // 8, channel_launch.channel_vectors(channels // 8).vectors) == 0


def test_odd_planes_go_to_pixels():
    assert channel_launch.odd_planes(32, 2048, 49)
    assert not channel_launch.odd_planes(32, 1024, 196)  # has accesses of 8 bytes
    assert not channel_launch.odd_planes(32, 3, 49)  # nor do samples divide into vectors
    assert not channel_launch.odd_planes(8, 2048, 49)  # partials of each position would be much of what is moved
    assert channel_launch.channel_vectors(2048 * 49 // 8, True).vectors == channel_launch.POSITION_VECTORS


@pytest.mark.triton
def test_a_sample_is_the_same_among_few_and_many(triton_device):
    """In evaluation. Odd planes of few samples have other kernels than those of many."""
    x = torch.randn(24, 16, 7, 7, generator=torch.manual_seed(0)).to(triton_device, BF16)
    mean, var, weight, bias, dy = (torch.rand(16, device=triton_device) + 0.5 for _ in range(5))
    results = []
    for samples in (24, 8):
        part = x[:samples].clone().requires_grad_()
        y = fastnorm.functional.batch_norm(part, mean, var, weight, bias, activation="relu", residual=part.detach())
        (dx,) = torch.autograd.grad(y, part, dy.to(BF16)[:, None, None].expand_as(y))
        results.append((y[:8], dx[:8]))
    assert all(map(torch.equal, *results))


@pytest.mark.triton
def test_a_mask_is_read_right_by_the_formula_and_after_a_hook(triton_device):
    """Odd planes of 16 samples and more have a mask of another shape."""
    x, residual = torch.randn(2, 16, 8, 7, generator=torch.manual_seed(0), dtype=torch.float64).to(triton_device)
    x.requires_grad_(), residual.requires_grad_()

    def gradients(unpack, **options):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = fastnorm.functional.batch_norm(x, None, None, training=True, residual=residual, activation="relu")
            return torch.autograd.grad(y, (x, residual), x.detach().cos(), **options)

    expected = gradients(lambda t: t)
    strided = gradients(lambda t: t.mT.contiguous().mT if t.dim() > 2 else t)
    for found in (gradients(lambda t: t, create_graph=True), strided):
        assert all(torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(found, expected, strict=True))


@pytest.mark.triton
def test_fakes_know_the_shape_of_the_mask(triton_device):
    ones = torch.ones(8, device=triton_device)
    layout, namespace = torch.contiguous_format, torch.ops.fastnorm_triton
    for shape in (16, 8, 7), (15, 8, 7), (1, 8, 7), (16, 8, 1):
        x = torch.randn(shape).to(triton_device)
        for operator, *arguments in (
            (namespace.batch_norm_forward, None, ones, ones, None, None, None, 0.1, 1e-5, layout, True, F32),
            (namespace.batch_norm_normalize, None, ones, ones, ones, ones, layout, True, F32),
            (namespace.batch_norm_evaluation, None, ones, ones, ones, ones, 1e-5, layout, True, True, F32),
        ):
            torch.library.opcheck(operator.default, (x, *arguments), test_utils="test_faketensor")



def test_width_of_an_access():
    x = torch.empty(4, 6, 784, dtype=BF16)
    assert channel_launch.vector_width(784, [x]) == 8
    assert channel_launch.vector_width(784, [x, x.float()]) == 4  # 16 bytes of the larger one
    assert channel_launch.vector_width(784, [x, x.double()]) == 2
    assert channel_launch.vector_width(196, [torch.empty(4, 6, 196, dtype=BF16)]) == 4
    assert channel_launch.vector_width(49, [torch.empty(4, 6, 49, dtype=BF16)]) == 1
    wide = torch.empty(4, 6, 800, dtype=BF16)
    assert channel_launch.vector_width(784, [wide[..., :784]]) == 8
    assert channel_launch.vector_width(784, [wide[..., 8:792]]) == 8
    assert channel_launch.vector_width(784, [wide[..., 4:788]]) == 1  # begins between two accesses
    assert channel_launch.vector_width(784, [torch.empty(4, 6, 786, dtype=BF16)[..., :784]]) == 2
    one_row = torch.empty(1, 1, 785, dtype=BF16)[..., :784]
    assert channel_launch.vector_width(784, [one_row]) == 8  # a stride that leads nowhere


def test_the_tiling_of_a_group_knows_nothing_of_the_batch():
    tilings = channel_launch.unit_lanes, channel_launch.channel_vectors, channel_launch.channel_chunk
    for choose in (*tilings, launch.group_join_tile):
        assert not {"samples", "batch"} & set(inspect.signature(choose).parameters)


def formula(x: Tensor, dy: Tensor, residual: Tensor, w: Tensor) -> list[Tensor]:
    """y, mean, rstd and dx, dw, db of batch_norm with its residual and ReLU, in float64."""
    dims = (0, *range(2, x.dim()))
    x, dy, residual, w = (t.double() for t in (x, dy, residual, w))
    wide = lambda v: v.view(-1, *[1] * (x.dim() - 2))  # noqa: E731
    mean, rstd = x.mean(dims), (x.var(dims, unbiased=False) + 1e-5).rsqrt()
    x_hat = (x - wide(mean)) * wide(rstd)
    y = (x_hat * wide(w) + residual).relu()
    dz = dy * (y > 0)
    total, product, n = dz.sum(dims), (dz * x_hat).sum(dims), x.numel() // w.numel()
    return [y, mean, rstd, (dz - wide(total / n) - x_hat * wide(product / n)) * wide(rstd * w), product, total]


# few channels, so that each is cut into chunks, the last of which is short and ends within a tile
LONG_CHANNELS = {"planes": (2, 2, 9208), "pixels": (1, 9211, 2), "odd planes": (2099, 8, 3)}


@pytest.mark.triton
@pytest.mark.parametrize("layout", LONG_CHANNELS)
def test_chunks_of_long_channels(layout, triton_device):
    shape, channels_last = LONG_CHANNELS[layout], layout == "pixels"
    x, dy, residual = (as_image(torch.randn(shape, device=triton_device), channels_last) for _ in range(3))
    channels = x.shape[1]
    w, b = torch.randn(channels, device=triton_device), torch.zeros(channels, device=triton_device)
    running = torch.zeros(channels, device=triton_device), torch.ones(channels, device=triton_device)
    x += 100 * (1 + torch.arange(channels, device=triton_device) % 2).view(-1, *[1] * (x.dim() - 2))
    y, mask, mean, rstd = kernels.batch_norm_forward(
        x, residual, w, b, *running, None, 0.5, 1e-5, format_of(channels_last), True, F32
    )
    dx, dresidual, dw, db = kernels.batch_norm_backward(
        dy, mask, x, w, mean, rstd, True, format_of(channels_last), F32, F32, F32
    )
    expected = formula(x, dy, residual, w)
    n, largest = x.numel() // channels, (2e-5, 1e-5, 1e-6, 2e-5, 2e-3, 2e-3)
    found = y, mean, rstd, dx, dw, db
    for i, (actual, wanted, error) in enumerate(zip(found, expected, largest, strict=True)):
        assert (actual.double() - wanted).abs().max() < error, i
    assert torch.allclose(running[0], 0.5 * mean, rtol=1e-6)
    assert torch.allclose(running[1], 0.5 + 0.5 * (rstd.double() ** -2 - 1e-5).float() * n / (n - 1), rtol=1e-5)
    assert torch.equal(dresidual != 0, (y > 0) & (dy != 0))


def both_ways(*blocks, channels_last) -> list[Tensor | None]:
    """All that both operations compute from large tensors."""
    (x, dy, residual), layout = (as_image(t, channels_last) for t in blocks), format_of(channels_last)
    w = torch.linspace(-1, 1, x.shape[1], device=x.device)
    y, mask, mean, rstd = kernels.batch_norm_forward(
        x, residual, w, w, None, None, None, 0.1, 1e-5, layout, True, BF16
    )
    results = [y, mask, mean, rstd]
    results += kernels.batch_norm_backward(dy, mask, x, w, mean, rstd, True, layout, BF16, F32, F32)
    y, mean, rstd = kernels.group_norm_forward(x, 1, w, w, 1e-5, layout, True, BF16)
    results += [y, mean, rstd]
    return results + list(kernels.group_norm_backward(dy, x, 1, w, w, mean, rstd, layout, True, F32, F32))


@pytest.mark.triton
@layouts
@pytest.mark.parametrize("dimension", ["samples", "rows"])
def test_offsets_beyond_31_bits(dimension, channels_last, triton_device, card_memory):
    """The stride has 31 bits, no power of two in it, and the last sample, or the last row of one, is beyond them."""
    rows, cols = (3, 16) if dimension == "rows" else (3, 4 * 16)
    inputs = far_apart(3, rows, cols, 2**30 + 17, triton_device)
    together = inputs.new_empty((3, rows, cols + 1))[..., :cols].copy_(inputs)
    far, near = ([t[None] if dimension == "rows" else t.unflatten(1, (4, 16)) for t in each]
                 for each in (inputs, together))  # fmt: skip
    for a, b in zip(*(both_ways(*each, channels_last=channels_last) for each in (far, near)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(2, 3, 20), (1, 40, 3), (16, 8, 3)], ids=["planes", "pixels", "odd planes"])
@pytest.mark.parametrize("origin", [float("inf"), float("nan"), 1e30])
def test_what_one_element_spoils_stays_in_its_channel(origin, shape, triton_device):
    """x₀, which is taken off all elements, is the worst that one can be."""
    blocks, channels_last = torch.randn(shape, device=triton_device), shape[0] == 1
    blocks[0, 0, 0] = origin
    x = as_image(blocks, channels_last)
    moments = kernels.batch_norm_statistics(x, format_of(channels_last))
    others, dims = x[:, 1:], (0, *range(2, x.dim()))
    count = x.numel() // x.shape[1]
    assert torch.allclose(moments[0, 1:], others.mean(dims), atol=1e-6)
    assert torch.allclose(moments[1, 1:], count * others.var(dims, unbiased=False), rtol=1e-5)
    assert not (moments[1, 0] < 1e30)
