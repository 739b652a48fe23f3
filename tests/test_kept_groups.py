"""group_norm of groups that a program of Triton's keeps in registers: values, what decides on it, and what it moves."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnorm import backend
from fastnorm.views import suggested_format
from helpers.channel_norms import call, case_of, check, fused, in_format, inputs

channel_launch = pytest.importorskip("fastnorm.triton_kernels.channel_launch", reason="needs Triton")
launch = pytest.importorskip("fastnorm.triton_kernels.launch", reason="needs Triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
on_triton = pytest.mark.parametrize("device", ["triton"], indirect=True)

# (shape, groups, dtype) with: a row for each channel, and one beyond the last; several rows a channel; rows beyond the
# last in both; 16 bytes and 8 an access; columns without a channel, and none
KEPT = {
    False: [((2, 18, 16, 8), 2, F32), ((1, 6, 32, 32), 2, BF16), ((2, 60, 8, 8), 2, F16), ((3, 21, 8, 36), 3, F32)],
    True: [((2, 40, 9, 7), 2, F32), ((2, 64, 9, 7), 2, BF16), ((1, 36, 8, 8), 1, F16)],
}
kept_cases = pytest.mark.parametrize(
    "channels_last, shape, groups, dtype", [(last, *case) for last, cases in KEPT.items() for case in cases], ids=str
)


def make(shape, groups, dtype, channels_last, **changes):
    """A case with a SiLU of which both directions keep their groups, on its kernels."""
    length = shape[1] // groups, math.prod(shape[2:])
    assert all(channel_launch.group_tiles(*length, channels_last, dtype.itemsize, kept) for kept in (1, 2)), "not kept"
    return fused(case_of("group_norm", shape, dtype, groups=groups, channels_last=channels_last, **changes))


@pytest.mark.triton
@on_triton
@kept_cases
def test_values(channels_last, shape, groups, dtype, device):
    case = make(shape, groups, dtype, channels_last)
    for each in (case, case.alike(activation=None, weight=None), case.alike(bias=None, weight=BF16)):
        check(each, inputs(each, device))


@pytest.mark.triton
@on_triton
@layouts
@pytest.mark.parametrize("mean, std", [(1e4, 1.0), (-3e6, 10.0), (1e18, 1e18)], ids=str)
def test_mean_far_from_zero_and_huge_values(mean, std, channels_last, device):
    shape, groups, dtype = KEPT[channels_last][0]
    case = make(shape, groups, dtype, channels_last)
    check(case, inputs(case, device, mean=mean, std=std))


@pytest.mark.triton
@on_triton
@layouts
def test_a_constant_group_leaves_its_bias(channels_last, device):
    shape, groups, dtype = KEPT[channels_last][0]
    case = make(shape, groups, dtype, channels_last).alike(activation=None)
    tensors = inputs(case, device)
    with torch.no_grad():
        tensors["x"][:, : shape[1] // groups] = 0.1
    y = call(case, tensors)
    bias = tensors["bias"].view(1, -1, 1, 1).expand_as(y)
    assert torch.equal(y[:, : shape[1] // groups], bias[:, : shape[1] // groups])


def results(case, tensors, x, dy):
    x = x.detach().requires_grad_()
    trained = [x, tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()]
    y = call(case, tensors | {"x": x})
    return y.detach(), *torch.autograd.grad(y, trained, dy)


@pytest.mark.triton
@on_triton
@layouts
def test_a_sample_is_the_same_in_any_batch_and_anywhere(channels_last, device):
    """As one of many, alone, and where no access of 16 bytes can begin, as a slice and with strides."""
    shape, groups, dtype = KEPT[channels_last][1]
    shape = (4, *shape[1:])
    case = make(shape, groups, dtype, channels_last)
    tensors = inputs(case, device)
    x, dy = tensors["x"], in_format(torch.randn(shape).to(dtype), channels_last).to(device)
    whole = results(case, tensors, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(case, tensors, x, dy), strict=True)), "another run"
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    back = [order.index(d) for d in range(4)]
    sample = x[2:3].permute(order)
    wide = x.new_zeros((1, *sample.shape[1:3], sample.shape[3] + 3))
    for place in (x[2:3], torch.cat([x.new_zeros(1), sample.flatten()])[1:].view(sample.shape).permute(back),
                  wide[..., 2:-1].copy_(sample).permute(back)):  # fmt: skip
        y, dx, *_ = results(case, tensors, place, dy[2:3])
        assert suggested_format(place) == suggested_format(x)
        assert torch.equal(y, whole[0][2:3]) and torch.equal(dx, whole[1][2:3])


@given(
    channels=st.integers(1, 300), size=st.integers(1, 20000), channels_last=st.booleans(),
    itemsize=st.sampled_from([2, 4, 8]), kept=st.integers(1, 2),
)  # fmt: skip
def test_tiles_of_a_group(channels, size, channels_last, itemsize, kept):
    tiles = channel_launch.group_tiles(channels, size, channels_last, itemsize, kept)
    if tiles is None:
        return
    rows = size if channels_last else channels * tiles.pieces
    assert itemsize <= 4 and channels * size >= channel_launch.MIN_KEPT_GROUP
    assert (channels if channels_last else tiles.cols) * itemsize >= 64
    assert tiles.vector * itemsize in (8, 16) and tiles.cols % tiles.vector == 0
    assert tiles.pieces * tiles.cols == size or (channels_last and tiles.pieces == 1 and tiles.cols >= channels)
    assert (tiles.count - 1) * tiles.rows < rows <= tiles.count * tiles.rows <= rows * (1 + launch.MAX_PADDING)
    assert tiles.rows * tiles.cols == 32 * tiles.warps * tiles.vector  # an access of each thread
    assert tiles.count * tiles.vector * kept <= 96 and 2 <= tiles.warps <= 16


def test_rows_of_less_than_64_bytes_are_not_kept():
    assert channel_launch.group_tiles(40, 40, False, 2, 1) is channel_launch.group_tiles(16, 256, True, 2, 1) is None
    assert channel_launch.group_tiles(40, 96, False, 2, 1) and channel_launch.group_tiles(32, 256, True, 2, 1)


def test_groups_of_a_unet():
    """All contiguous ones but the longest in the backward; of channels_last the short ones."""
    images = ((10, 4096), (20, 1024), (40, 256), (40, 64))
    tiles = channel_launch.group_tiles
    found = [[bool(tiles(*each, last, 2, kept)) for each in images] for last in (0, 1) for kept in (1, 2)]
    assert found == [[True] * 4, [False, True, True, True], [False, False, True, True], [False, False, False, True]]


def test_the_choice_knows_nothing_of_the_batch():
    assert not {"samples", "batch"} & set(inspect.signature(channel_launch.group_tiles).parameters)


@pytest.mark.triton
@layouts
def test_what_is_moved(channels_last):
    """x once and y once; x and dy once and dx once; and the partial sums of each channel."""
    from helpers.traffic import virtual_gpu

    samples, channels, groups = 2, 64, 2
    shape = (samples, 256, channels) if channels_last else (samples, channels, 256)
    x, dy = torch.randn(2, *shape).to(BF16).unbind()
    if channels_last:
        x, dy = x.transpose(1, 2).unsqueeze(-1), dy.transpose(1, 2).unsqueeze(-1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight, bias = torch.randn(2, channels).unbind()
    with virtual_gpu() as gpu:
        _, *moments = backend._triton.group_norm_forward(x, groups, weight, bias, 1e-5, layout, True, BF16)
        backend._triton.group_norm_backward(dy, x, groups, weight, bias, *moments, layout, True, F32, F32)
    forward, backward, _ = gpu.launches
    for step, reads in ((forward, 1), (backward, 2)):
        assert reads <= step.unique_read / x.nbytes <= reads + 0.03
        assert 1 <= step.stores.bytes / x.nbytes <= 1.05
        assert step.loads.efficiency > 0.9 and step.local_bytes == 0
