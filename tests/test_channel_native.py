"""What only the compiled channel norms promise: threads, forks, instruction sets, word tails, dtypes of their own."""


import pytest
import torch
import torch.nn.functional as F

from fastnorm.views import ChannelView
from helpers.channel_norms import as_image, format_of
from helpers.norms import DTYPES

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "pixels"])


def random(*shape, dtype=f32):
    return torch.randn(shape, dtype=f64).to(dtype)


def random_image(*blocks, channels_last, dtype=f32):
    return as_image(random(*blocks, dtype=dtype), channels_last)


def batch_norm(x, residual, weight, bias, dy, channels_last):
    """[y, mask, mean, rstd, dx, dresidual, dweight, dbias, running_mean, running_var] with a ReLU."""
    running = [torch.zeros_like(weight), torch.ones_like(weight)]
    options = (*running, None, 0.1, 1e-5, format_of(channels_last), True)
    forward = native.batch_norm_forward(x, residual, weight, bias, *options, x.dtype)
    _, mask, mean, rstd = forward
    dtypes = (residual.dtype, weight.dtype, bias.dtype)
    backward = native.batch_norm_backward(dy, mask, x, weight, mean, rstd, True, format_of(channels_last), *dtypes)
    return [*forward, *backward, *running]


def group_norm(x, weight, bias, dy, groups, channels_last):
    """[y, mean, rstd, dx, dweight, dbias] with SiLU."""
    layout = format_of(channels_last)
    forward = native.group_norm_forward(x, groups, weight, bias, 1e-5, layout, True, x.dtype)
    _, *moments = forward
    dtypes = (weight.dtype, bias.dtype)
    return [*forward, *native.group_norm_backward(dy, x, groups, weight, bias, *moments, layout, True, *dtypes)]


def everything(shape, channels_last, dtype=f32):
    """All results of both norms on inputs that depend on the seed alone."""
    torch.manual_seed(1)
    x, residual, dy = (random_image(*shape, channels_last=channels_last, dtype=dtype) for _ in range(3))
    channels = x.shape[1]
    weight, bias = random(channels), random(channels)
    groups = 4 if channels % 4 == 0 else 1
    return [
        *batch_norm(x, residual, weight, bias, dy, channels_last),
        *group_norm(x, weight, bias, dy, groups, channels_last),
    ]


@pytest.mark.parametrize(
    "shape, channels_last",
    [
        ((16, 64, 400), False),  # a thread takes whole channels
        ((6, 3, 70001), False),  # channels are shared, and rows divided
        ((700, 5, 49), False),
        ((5, 60, 25), False),  # a thread takes several groups
        ((1, 9000, 40), True),
        ((3, 1000, 67), True),
        ((40, 64, 256), True),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(shape, channels_last, threads):
    threads(1)
    expected = everything(shape, channels_last)
    for count in (2, 3, 7):
        threads(count)
        assert all(map(torch.equal, everything(shape, channels_last), expected))


def oracle(x, residual, weight, bias, dy, mask):
    """y, dx, dresidual, dweight, dbias in float64; the mask says what the ReLU lets through."""
    leaves = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    z = F.batch_norm(leaves[0], None, None, *leaves[2:], True, 0.1, 1e-5) + leaves[1]
    return [z.detach().relu(), *torch.autograd.grad(z, leaves, dy.double() * mask)]


def bits(mask, n):
    """The mask's bits of n elements a row; those behind them must be zero."""
    unpacked = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2).bool()
    assert not unpacked[..., n:].any()
    return unpacked[..., :n]


TOLERANCES = {f32: 3e-6, bf16: 9e-3, f16: 1.1e-3, f64: 1e-13}


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 11, 15, 17, 31, 33, 49, 63, 64, 65, 130])
def test_every_word_tail(n, dtype, channels_last):
    x, residual, dy = (random_image(19, 37, n, channels_last=channels_last, dtype=dtype) for _ in range(3))
    channels = x.shape[1]
    parameter = f64 if dtype == f64 else f32
    weight, bias = random(channels, dtype=parameter), random(channels, dtype=parameter)
    y, mask, _, rstd, dx, dresidual, dweight, dbias, *_ = batch_norm(x, residual, weight, bias, dy, channels_last)
    view = ChannelView(x, format_of(channels_last), across_samples=True)
    assert torch.equal(bits(mask, view.shape[-1]), view.blocks(y > 0))
    expected = oracle(x, residual, weight, bias, dy, y > 0)
    for actual, value in zip((y, dx, dresidual, dweight, dbias), expected, strict=True):
        tolerance = TOLERANCES[dtype if actual.shape == x.shape else parameter]
        scale = max(1.0, rstd.max().item()) * max(1.0, value.abs().max().item())
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=tolerance * scale)


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("n", [49, 300, 5000])
def test_dtypes_that_differ_give_what_equal_ones_give(n, channels_last):
    """Each tensor in a dtype of its own: as if all were float32 and were rounded at the end."""
    shape = (3, n, 40) if channels_last else (3, 40, n)
    x, residual, dy = (random_image(*shape, channels_last=channels_last, dtype=dtype) for dtype in (bf16, f16, f32))
    weight, bias = random(40, dtype=f64), random(40, dtype=bf16)
    options = (None, None, None, 0.1, 1e-5, format_of(channels_last), True)
    y, mask, mean, rstd = native.batch_norm_forward(x, residual, weight, bias, *options, f16)
    wide = [t.float() for t in (x, residual, weight, bias)]
    expected_y, expected_mask, expected_mean, expected_rstd = native.batch_norm_forward(*wide, *options, f32)
    assert torch.equal(mask, expected_mask) and torch.equal(y, expected_y.to(f16))
    torch.testing.assert_close((mean, rstd), (expected_mean, expected_rstd), rtol=1e-6, atol=1e-7)
    backward = (mean, rstd, True, format_of(channels_last))
    dx, dresidual, dweight, dbias = native.batch_norm_backward(dy, mask, x, weight, *backward, bf16, f16, f64)
    expected = native.batch_norm_backward(dy, mask, wide[0], wide[2], *backward, f32, f32, f32)
    for actual, value in zip((dx, dresidual, dweight, dbias), expected, strict=True):
        torch.testing.assert_close(actual.double(), value.to(actual.dtype).double(), rtol=1e-5, atol=1e-5)
    assert [t.dtype for t in (dx, dresidual, dweight, dbias)] == [bf16, bf16, f16, f64]


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("size", [1e18, 1e30])
def test_values_whose_squares_overflow(size, dtype, channels_last):
    x = (random_image(2, 70, 70, channels_last=channels_last) * size).to(dtype)
    y, *_ = native.batch_norm_forward(x, *[None] * 6, 0.1, 1e-5, format_of(channels_last), False, f32)
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_constant_channels_whose_sums_overflow(dtype, channels_last):
    x = (torch.tensor([3e38, -1e38]) if channels_last else torch.tensor([[3e38], [-1e38]])).to(dtype)
    x = as_image(x.expand((3, 77, 2) if channels_last else (3, 2, 77)).contiguous(), channels_last)
    options = 0.1, 1e-5, format_of(channels_last), False, f32
    y, _, mean, _ = native.batch_norm_forward(x, *[None] * 6, *options)
    assert torch.equal(mean, torch.tensor([3e38, -1e38]).to(dtype).float()) and not y.any()


@pytest.mark.instruction_sets
@layouts
def test_blocks_about_different_means(channels_last):
    """The first block of a channel says nothing about the others; neither does a dead one."""
    x = random(4, 1, 9000) + torch.tensor([1e4, 0, -30, 1e3]).view(4, 1, 1)
    x[0, :, :5000] = 0
    x = as_image(x.transpose(1, 2).repeat(1, 1, 2), True) if channels_last else x  # one channel alone is a plane
    mean, square_sum = (t[:1] for t in native.batch_norm_statistics(x, format_of(channels_last)))
    x = x[:, :1]
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean().view(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(square_sum.double() / x.numel(), exact.var(unbiased=False).view(1), rtol=1e-6, atol=0)


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("level", [3.0, 1e4])
def test_means_far_from_the_first_elements(level, channels_last):
    """Statistics are taken about the mean of the first few, until that is seen to be too far off."""
    n, few = (64, 4) if channels_last else (8000, 16)
    x = random(1, 40, n) + level
    x[:, :, :few] = 0
    x[:, 7] = level
    x[:, 9, 1:] = 0
    exact = x.double()
    x = as_image(x.transpose(1, 2), True) if channels_last else x
    mean, square_sum = native.batch_norm_statistics(x, format_of(channels_last))
    torch.testing.assert_close(mean.double(), exact.mean((0, 2)), rtol=3e-7, atol=0)
    torch.testing.assert_close(square_sum.double() / n, exact.var((0, 2), unbiased=False), rtol=4e-7, atol=0)
    assert square_sum[7] == 0


def of_two_groups(first, second, channels):
    return torch.tensor([first, second]).repeat_interleave(channels // 2).view(1, channels, 1)


def groups_far_from_the_first_elements():
    x = random(2, 260, 64) + 1e4
    x.unflatten(1, (2, 130))[:, :, :4, :16] = 0
    return x


HARD_GROUPS = {
    "far from the first elements": groups_far_from_the_first_elements,
    "several blocks, mean above std": lambda: random(2, 12, 9000) + 1e4,
    "squares that overflow": lambda: random(2, 140, 70) * 1e30,
    "one group whose squares overflow": lambda: random(2, 140, 70) * of_two_groups(1e30, 1.0, 140),
    "constant, with sums that overflow": lambda: of_two_groups(3e38, -1e38, 12).expand(2, 12, 77),
}


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("make", HARD_GROUPS.values(), ids=HARD_GROUPS)
def test_moments_of_hard_groups(make, channels_last):
    """As the tests of channels above, for two groups."""
    x = make().contiguous()
    exact = x.double().unflatten(1, (2, -1)).flatten(2)
    image = as_image(x.transpose(1, 2).contiguous(), True) if channels_last else as_image(x, False)
    y, mean, rstd = native.group_norm_forward(image, 2, None, None, 1e-5, format_of(channels_last), False, f32)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=3e-7, atol=1e-7 * exact.std(2).max().item())
    expected = (exact.var(2, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=3e-7, atol=0)
    assert y.isfinite().all()


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_all_sizes(dtype, channels_last):
    """Where several rows, and groups, are worked on at once, all that may be left over; and groups of several blocks
    and chunks."""
    shapes = ((6, 1, 2), (6, 3, 7), (40, 8, 25), (72, 4, 64), (30, 10, 65), (17, 1, 196), (60, 60, 9))
    shapes += ((12, 2, 3000), (5, 1, 20000), (2, 1, 70001))
    for channels, groups, n in shapes:
        x, dy = (random_image(3, channels, n, channels_last=False, dtype=dtype) for _ in range(2))
        if channels_last:
            x, dy = (as_image(t.transpose(1, 2).contiguous(), True) for t in (x, dy))
        parameter = f64 if dtype == f64 else f32
        weight, bias = random(channels, dtype=parameter), random(channels, dtype=parameter)
        y, _, rstd, dx, dweight, dbias = group_norm(x, weight, bias, dy, groups, channels_last)
        leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
        expected_y = F.silu(F.group_norm(leaves[0], groups, *leaves[1:], 1e-5))
        expected = (expected_y.detach(), *torch.autograd.grad(expected_y, leaves, dy.double()))
        for actual, value in zip((y, dx, dweight, dbias), expected, strict=True):
            tolerance = TOLERANCES[dtype if actual.shape == x.shape else parameter]
            scale = max(1.0, rstd.max().item()) * max(1.0, value.abs().max().item())
            torch.testing.assert_close(actual.double(), value, rtol=0, atol=tolerance * scale)


@layouts
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_outputs_that_are_written_past_the_caches(dtype, channels_last):
    # pixels are cut into chunks of 4096, and the last bits of dx depend on where
    n, channels, times = 16 * (512 if channels_last else 577), 32, 8 * 4 // dtype.itemsize
    shape = (2, n, channels) if channels_last else (2, channels, n)
    small = [random(*shape, dtype=dtype) for _ in range(3)]
    weight, mean, rstd, means = random(channels), random(channels), random(channels).abs() + 0.1, random(2, channels)

    def results(x, residual, dy):
        x, residual, dy = (as_image(t, channels_last) for t in (x, residual, dy))
        layout = format_of(channels_last)
        view = ChannelView(x, layout, across_samples=True)
        y, mask = native.batch_norm_normalize(x, residual, weight, None, mean, rstd, layout, True, dtype)
        gradients = native.batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, layout, dtype)
        return [t.flatten(0, 1) for t in (mask, *map(view.blocks, (y, *gradients)))]

    expected = results(*small)
    large = [t.repeat(times, 1, 1) for t in small]
    for _ in range(3):  # where the memory is new, the caches have it: the second call gets that of the first
        found = results(*large)
        assert found[1].nbytes >= 16 * 2**20
        assert all(torch.equal(t, each.repeat(times, 1)) for t, each in zip(found, expected, strict=True))
        del found


@pytest.mark.instruction_sets
def test_silu_over_the_whole_range():
    """One channel with weight 1 and bias z, so that x̂ vanishes: y is silu of every z."""
    z = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([-1e30, -800.0, 800.0, 1e30])])
    for dtype, tolerance in ((f32, 3e-7), (f64, 6e-16)):  # three roundings; exp has one more where there is no fma
        x = torch.zeros(1, z.numel(), 2, dtype=dtype)
        y, *_ = native.group_norm_forward(x, 1, None, z.to(dtype), 1e-5, torch.contiguous_format, True, dtype)
        expected = F.silu(z.double())
        torch.testing.assert_close(y[0, :, 0].double(), expected, rtol=tolerance, atol=5e-37)  # exp's end in float32


class Normalised(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.arange(64 * 1024.0).view(4, 16, 1024) * (index + 1)
        return native.batch_norm_forward(x, *[None] * 6, 0.1, 0.0, torch.contiguous_format, False, f32)[0].std()


@pytest.mark.slow
def test_forked_workers(threads):
    threads(2)
    everything((16, 64, 400), False)  # threads that a fork would not take along
    loader = torch.utils.data.DataLoader(Normalised(), num_workers=2, multiprocessing_context="fork", timeout=60)
    torch.testing.assert_close(torch.stack(list(loader)), torch.ones(4, 1), rtol=1e-4, atol=0)


def test_wrong_arguments_raise():
    x, w = random(2, 8, 5), random(8)
    forward, contiguous = (None, None, None, None, None, None, 0.1, 1e-5), torch.contiguous_format
    with pytest.raises(RuntimeError, match="weight of shape"):
        native.batch_norm_forward(x, None, w[:7], *forward[2:], contiguous, False, f32)
    with pytest.raises(RuntimeError, match="x of shape"):
        native.batch_norm_forward(x[0, 0], *forward, contiguous, False, f32)
    with pytest.raises(RuntimeError, match="rank 4"):
        native.batch_norm_forward(x, *forward, torch.channels_last, False, f32)
    with pytest.raises(RuntimeError, match="running_mean without gaps"):
        native.batch_norm_evaluation(x, None, w, w, random(16)[::2], w, 1e-5, contiguous, False, False, f32)
    with pytest.raises(TypeError, match="float32, bfloat16"):
        native.batch_norm_forward(x.int(), *forward, contiguous, False, f32)
    with pytest.raises(RuntimeError, match="factor in float32"):
        native.batch_norm_forward(
            x, *forward[:5], torch.tensor(0.1, dtype=f64), *forward[6:], contiguous, False, f32
        )
    with pytest.raises(RuntimeError, match="mask in uint8"):
        native.batch_norm_backward(x, x > 0, x, w, w, w, True, contiguous, None, f32, f32)
    with pytest.raises(RuntimeError, match="mean in Double"):
        native.batch_norm_backward(x, None, x.double(), w, w, w, True, contiguous, None, f32, f32)
    with pytest.raises(RuntimeError, match="divisible by 3"):
        native.group_norm_forward(x, 3, w, w, 1e-5, contiguous, False, f32)
    moments = torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="dy of shape"):
        native.group_norm_backward(x[:1], x, 2, w, w, *moments, contiguous, False, f32, f32)
