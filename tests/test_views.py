"""How kernels see tensors: C++ and Python agree, on any strides, and what can be read in place is not copied."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastnorm import backend, operators, reference, use
from fastnorm.functional import batch_norm, gated_rms_norm, group_norm, layer_norm, rms_norm
from fastnorm.views import ChannelView, batch_norm_format, row_levels, suggested_format
from helpers.channel_norms import format_of
from helpers.drawing import examples
from helpers.environment import SIMULATED

native = pytest.mark.skipif(backend._native is None, reason="looks into the compiled operators")
f32 = torch.float32
ROWS = {
    "contiguous": (torch.randn(4, 6, 8), 1),
    "two dimensions": (torch.randn(4, 6, 8), 2),
    "part of each row": (torch.randn(4, 6, 16)[..., 3:11], 1),
    "every other row": (torch.randn(4, 12, 8)[:, ::2], 1),
    "part of each matrix": (torch.randn(4, 12, 8)[:, 2:8], 2),
    "one row": (torch.randn(8), 1),
    "heads before positions": (torch.randn(4, 6, 3, 8).transpose(1, 2), 1),
    "part of a projection": (torch.randn(4, 6, 3, 2, 8)[:, :, 1], 1),
}
IMAGES = {
    "contiguous": (torch.randn(8, 6, 4, 5), False),
    "channels_last": (torch.randn(8, 4, 5, 6).movedim(-1, 1), True),
    "part of the batch": (torch.randn(8, 6, 4, 5)[2:6], False),
    "part of the batch, channels_last": (torch.randn(8, 4, 5, 6)[2:6].movedim(-1, 1), True),
    "part of the channels": (torch.randn(8, 6, 4, 5)[:, 1:5], False),
    "part of the channels, channels_last": (torch.randn(8, 4, 5, 16)[..., 1:9].movedim(-1, 1), True),
    "one image, channels_last": (torch.randn(4, 5, 6).movedim(-1, 0)[None], True),
    "a matrix": (torch.randn(8, 6), False),
}


def copies(function, x: torch.Tensor) -> set[str]:
    """The operations that copy in the forward and backward of a function of x, whose gradient has the same strides."""
    leaf = torch.empty_strided(x.shape, x.stride()).copy_(x).requires_grad_()
    dy = torch.empty_strided(x.shape, x.stride()).normal_()
    with use("native"), torch.profiler.profile() as profile:
        torch.autograd.grad(function(leaf), leaf, dy)
    return {event.key for event in profile.key_averages()} & {"aten::clone", "aten::copy_"}


@native
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_read_in_place(name):
    x, dims = ROWS[name]
    assert row_levels([x], dims).tensors[0] is x
    for norm in (layer_norm, rms_norm):
        assert not copies(lambda x, norm=norm: norm(x, x.shape[-dims:]), x)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_a_gate_that_is_read_in_place(norm_before_gate, dtype):
    """Half of the columns of a wider projection, as Mamba's models have it; x is the other half."""
    projection = torch.randn(4, 6, 48).to(dtype)
    x, gate, dy = projection[..., :16], projection[..., 24:40], torch.randn(4, 6, 16).to(dtype)
    leaves = [t.detach().requires_grad_() for t in (x, gate)]
    with use("native"), torch.profiler.profile() as profile:
        y = gated_rms_norm(*leaves, (16,), norm_before_gate=norm_before_gate, group_size=8)
        torch.autograd.grad(y, leaves, dy)
    assert not {event.key for event in profile.key_averages()} & {"aten::clone", "aten::copy_", "aten::contiguous"}


@native
@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_read_in_place(name):
    x, channels_last = IMAGES[name]
    layout = batch_norm_format(x)
    assert layout == format_of(channels_last)
    assert all(ChannelView(x, layout, across).blocks(x).data_ptr() == x.data_ptr() for across in (False, True))
    assert not copies(lambda x: batch_norm(x, None, None, training=True, activation="relu"), x)
    if suggested_format(x) == layout:  # stock's group_norm takes the one image for an ugly contiguous one
        assert not copies(lambda x: group_norm(x, 2, activation="silu"), x)


@native
def test_a_copy_is_seen():
    assert copies(lambda x: rms_norm(x, (8,)), torch.randn(4, 6, 16)[..., ::2])
    assert copies(lambda x: group_norm(x, 2), torch.randn(2, 6, 4, 10)[..., ::2])


@st.composite
def ugly_tensors(draw, count: int, least_dims: int) -> list[torch.Tensor]:
    """Of one shape, each with its own order of dimensions, gaps, and dimensions of stride zero."""
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3, 9]), min_size=least_dims, max_size=5))
    tensors = []
    for _ in range(count):
        order = draw(st.permutations(range(len(shape))))
        gaps = draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)))
        expanded = draw(st.sets(st.integers(0, 2 * len(shape)), max_size=2))
        t = torch.randn([1 if d in expanded else shape[d] + gaps[d] for d in order])
        t = t.permute([order.index(d) for d in range(len(shape))])
        tensors.append(t[tuple(slice(0, n) for n in shape)].expand(shape))
    return tensors


if not SIMULATED:  # hypothesis draws shapes at will, and each would be compiled
    @given(tensors=ugly_tensors(2, 1), data=st.data())
    @examples(40)
    def test_rows_of_any_strides(tensors, data, kernel_device):
        """h = x + residual is exact: each element is where it belongs."""
        x, residual = (t.to(kernel_device) for t in tensors)
        dims = data.draw(st.integers(1, x.dim()))
        kernels = getattr(backend, f"_{backend._forced}")
        options = None, None, dims, 1, 1, None, None, 1e-5, False, False, True, True, None, f32, f32
        results = kernels.row_norm_forward(x, residual, *options)
        y, h, *_ = results
        assert torch.equal(h, x + residual)
        assert torch.allclose(y, F.rms_norm(h, h.shape[-dims:], None, 1e-5), rtol=1e-5, atol=1e-6)
        for actual, expected in zip(results, operators.row_norm_forward(x, residual, *options), strict=True):
            assert actual is expected is None or (
                actual.shape == expected.shape and actual.stride() == expected.stride()
            )

    @given(tensors=ugly_tensors(3, 1), data=st.data())
    @examples(40)
    def test_gates_of_any_strides(tensors, data, kernel_device):
        x, gate, dy = (t.to(kernel_device) for t in tensors)
        dims = data.draw(st.integers(1, x.dim()))
        kernels = getattr(backend, f"_{backend._forced}")
        forward = x, None, gate, None, dims, 1, 1, None, None, 1e-5, False, False, True, True, None, f32, None
        y, _, _, rstd = results = kernels.row_norm_forward(*forward)
        options = None, None, None, rstd, False, True, True, None, f32, None, None, None
        backward = dy, None, x, None, gate, None, dims, 1, 1, *options
        gradients = kernels.row_norm_backward(*backward)
        leaves = [t.detach().clone().requires_grad_() for t in (x, gate)]
        expected = F.rms_norm(leaves[0], x.shape[-dims:], None, 1e-5) * F.silu(leaves[1])
        dx, dgate = torch.autograd.grad(expected, leaves, dy)
        for actual, right in zip((y, gradients[0], gradients[2]), (expected, dx, dgate), strict=True):
            assert torch.allclose(actual, right, rtol=1e-4, atol=1e-4 * max(1.0, rstd.max().item()))
        fakes = *operators.row_norm_forward(*forward), *operators.row_norm_backward(*backward)
        for actual, fake in zip((*results, *gradients), fakes, strict=True):
            assert actual is fake is None or (actual.shape, actual.stride()) == (fake.shape, fake.stride())

    @given(tensors=ugly_tensors(2, 2))
    @examples(40)
    def test_images_of_any_strides(tensors, kernel_device):
        """With mean 0 and rstd 1 results are exact, the mask's bits included; their format is stock's."""
        x, dy = (t.to(kernel_device) for t in tensors)
        kernels, layout = getattr(backend, f"_{backend._forced}"), batch_norm_format(x)
        zeros, ones = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        forward = x, None, None, None, zeros, ones, layout, True, f32
        y, mask = kernels.batch_norm_normalize(*forward)
        backward = dy, mask, x, None, zeros, ones, torch.stack((zeros, zeros)), layout, f32
        actual = y, mask, *kernels.batch_norm_backward_apply(*backward)
        dz = torch.where(x > 0, dy, 0)
        assert torch.equal(y, x.relu()) and torch.equal(actual[2], dz) and torch.equal(actual[3], dz)
        assert y.stride() == F.batch_norm(x, zeros, ones).stride()
        if x[0].numel() > 1:
            assert group_norm(x, 1).stride() == F.group_norm(x, 1).stride()
        expected = *reference.batch_norm_normalize(*forward), *reference.batch_norm_backward_apply(*backward)
        fakes = *operators.batch_norm_normalize(*forward), *operators.batch_norm_backward_apply(*backward)
        assert torch.equal(mask, expected[1])
        for ours, theirs, fake in zip(actual, expected, fakes, strict=True):
            assert ours.shape == theirs.shape == fake.shape and ours.stride() == theirs.stride() == fake.stride()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_at_any_distance(training, device):
    """Kernels read and write them where they lie next to each other; those that don't are updated all the same."""
    x = torch.randn(4, 6, 5, device=device)
    statistics = [[torch.linspace(0.5, 2, 12, device=device)[::2] for _ in range(2)] for _ in range(2)]
    y, expected = (
        norm(x, *pair, training=training)
        for norm, pair in zip((batch_norm, F.batch_norm), statistics, strict=True)
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*statistics)
    torch.testing.assert_close(statistics[0][0]._base[1::2], torch.linspace(0.5, 2, 12, device=device)[1::2])
