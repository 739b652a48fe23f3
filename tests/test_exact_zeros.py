"""Where x̂ is 0, in rows, groups and channels of one element or of one value, results are exact on every backend."""

from collections.abc import Iterator

import pytest
import torch

import fastnorm
from fastnorm import functional, reference
from helpers import channel_norms, norms
from helpers.backends import backend_parameters, on_backend
from helpers.environment import SIMULATED
from helpers.norms import DTYPES


@pytest.fixture(params=[*backend_parameters("reference", "native", "triton"), "reference-unseen"])
def exact_device(request, monkeypatch) -> Iterator[str]:
    """As `device`, and the reference once more as it is on a GPU, where it can't look at values without waiting."""
    name, *unseen = request.param.split("-")
    if unseen:
        monkeypatch.setattr(reference, "_are_at_hand", lambda values: False)
    yield from on_backend(name)


layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_rows_of_one_element(op, dtype, device):
    """x̂ is 0 and all of dy is its own mean: y is the bias, dweight 0 and dx nothing but dh, exactly."""
    for eps in (1e-5, 1e-12):
        case = norms.plain_case(op, (300, 1), dtype, eps=eps)
        leaves = {name: t.requires_grad_() for name, t in norms.inputs(case, device, mean=1000.0, std=100.0).items()}
        with torch.no_grad():
            leaves["weight"].fill_(123.0)
        y, h = norms.call(case, leaves)
        dy, dh = torch.randn(2, 300, 1).to(dtype).to(device)
        found = torch.autograd.grad([y, h] if case.adds else y, list(leaves.values()), [dy, dh] if case.adds else dy)
        found = dict(zip(leaves, found, strict=True))
        assert torch.equal(y, leaves["bias"].expand_as(y)) and not found["weight"].any()
        assert torch.equal(found["x"], dh if case.adds else torch.zeros_like(dh))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_groups_of_one_column_beside_a_gate(norm_before_gate, dtype, device):
    """x̂ is 0: y is the bias, behind the norm times its gate, and no gradient reaches x or the weight."""
    options = {"group_size": 1, "norm_before_gate": norm_before_gate, "activation": "sigmoid"}
    case = norms.plain_case("gated_layer_norm", (5, 8), dtype, options=options)
    leaves = {name: t.requires_grad_() for name, t in norms.inputs(case, device, mean=1000.0, std=100.0).items()}
    with torch.no_grad():
        leaves["weight"].fill_(123.0)
        leaves["gate"].zero_()  # of which the sigmoid is one half
    y, _ = norms.call(case, leaves)
    assert torch.equal(y, (leaves["bias"] * (0.5 if norm_before_gate else 1.0)).expand_as(y))
    y.backward(torch.randn(5, 8).to(dtype).to(device))
    assert not leaves["x"].grad.any() and not leaves["weight"].grad.any()
    assert leaves["gate"].grad.any() == norm_before_gate


def assert_without_the_mean(dx: torch.Tensor, along: torch.Tensor) -> None:
    """dx is `along` less its mean in each row, to two units of the largest."""
    assert ((along - along.mean(1, keepdim=True)) - dx).abs().max() <= 2 * torch.finfo(dx.dtype).eps * along.abs().max()


# of a row in registers, in several tiles, and read again; odd and even, for sums of one value fit into float32 or don't
CONSTANT_ROWS = [
    (dtype, cols)
    for dtype, widths in ((torch.float32, (7, 1000, 5000, 17000)), (torch.bfloat16, (7, 1000, 3000)),
                          (torch.float16, (7, 1000, 9001)), (torch.float64, (7, 1000, 8200)))
    for cols in widths[: 2 if SIMULATED else None]
]  # fmt: skip


# of a group in registers, in several tiles, and read again
@pytest.mark.parametrize("dtype, size", [(torch.float32, 7), (torch.float64, 17000), (torch.bfloat16, 1000),
                                         (torch.float16, 7)][: 1 if SIMULATED else None], ids=str)  # fmt: skip
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_constant_groups_beside_a_gate(norm_before_gate, dtype, size, exact_device):
    """A gate that is alike along a group leaves it constant; σ(0) = ½ loses no digit."""
    options = {"group_size": size, "norm_before_gate": norm_before_gate, "activation": "sigmoid"}
    case = norms.plain_case("gated_layer_norm", (2, 2 * size), dtype, options=options)
    leaves = norms.inputs(case, exact_device)
    values = torch.tensor([0.1, 1001.3, -6e4, 3.0 if dtype == torch.float16 else 1e20])
    leaves["x"].copy_(values.repeat_interleave(size).view(case.shape))
    leaves["gate"].zero_()
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    y, _ = norms.call(case, leaves)
    assert torch.equal(y, (leaves["bias"] * (0.5 if norm_before_gate else 1.0)).expand_as(y))
    y.backward((1e-3 * torch.randn(case.shape)).to(dtype).to(exact_device))
    assert not leaves["weight"].grad.any()


@pytest.mark.parametrize("dtype, cols", CONSTANT_ROWS, ids=lambda v: str(v).removeprefix("torch."))
def test_constant_rows_leave_the_bias(dtype, cols, exact_device):
    """Their mean is exact: what rounding it left would be divided by √eps. dweight is 0, then, as well, and of dx there
    is what is not along x̂."""
    values = torch.tensor([1001.3, 3.0 if dtype == torch.float16 else 1e20, 0.1, -6e4][: 4 if cols <= 1000 else 2])
    case = norms.plain_case("layer_norm", (len(values), cols), dtype)
    tensors = norms.inputs(case, exact_device)
    tensors["x"].copy_(values[:, None].expand(case.shape))
    tensors["weight"] *= 100
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    y, _ = norms.call(case, leaves)
    # dx is 1e5 times as large, and float16 ends at 65504
    dy = (1e-3 * torch.randn(case.shape)).to(dtype).to(exact_device)
    y.backward(dy)
    assert torch.equal(y, leaves["bias"].expand_as(y)) and not leaves["weight"].grad.any()
    assert_without_the_mean(leaves["x"].grad, dy.double() * leaves["weight"].detach().double() * case.eps**-0.5)


@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_constant_channels_leave_the_bias(op, dtype, channels_last, exact_device):
    """Their mean is exact: what rounding it left would be divided by √eps. dweight is 0, then, as well."""
    values = torch.tensor([0.1, -1001.3, 3.0 if dtype == torch.float16 else 1e20])
    for samples, span, size in ((2, 5, (5, 7)), (5, 1, (2, 1)))[: 1 if SIMULATED else None]:
        groups, shape = len(values), (samples, len(values) * span, *size)
        case = channel_norms.case_of(op, shape, dtype, groups=groups, channels_last=channels_last)
        leaves = channel_norms.inputs(case, exact_device)
        leaves["x"].copy_(values.repeat_interleave(span).view(1, -1, 1, 1).expand(shape))
        leaves["weight"] *= 100
        moved = {}
        if op == "batch_norm":
            means = leaves["x"][0, :, 0, 0].to(case.running)
            moved["running_mean"] = leaves["running_mean"].lerp(means, channel_norms.MOMENTUM)
            moved["running_var"] = (1 - channel_norms.MOMENTUM) * leaves["running_var"]
        leaves = {name: t if name in moved else t.requires_grad_() for name, t in leaves.items()}
        y = channel_norms.call(case, leaves)
        dy = (1e-3 * torch.randn(shape)).to(dtype).to(exact_device)
        y.backward(dy)
        expected = leaves["bias"].to(dtype).view(1, -1, 1, 1).expand(shape)
        assert torch.equal(y, expected) and not leaves["weight"].grad.any()
        for name, statistic in moved.items():
            torch.testing.assert_close(leaves[name], statistic)
        along = dy.double() * leaves["weight"].detach().double().view(1, -1, 1, 1)
        dx, along = (
            t.movedim(1, 0).flatten(1) if op == "batch_norm" else t.reshape(samples * groups, -1)
            for t in (leaves["x"].grad, along * case.eps**-0.5)
        )
        assert_without_the_mean(dx, along)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_groups_of_one_element(dtype, channels_last, device):
    """x̂ is 0 and all of dy is its own mean: y is the bias, dweight and dx are 0, exactly."""
    for eps, activation in ((1e-5, None), (1e-12, "silu")):
        case = channel_norms.case_of("group_norm", (5, 8, 1, 1), dtype, groups=8, channels_last=channels_last, eps=eps)
        case = case.alike(activation=activation)
        leaves = channel_norms.inputs(case, device, mean=1000.0, std=100.0)
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        with torch.no_grad():
            leaves["weight"].fill_(123.0)
        y = channel_norms.call(case, leaves)
        y.backward(torch.randn(case.shape).to(dtype).to(device))
        assert not leaves["x"].grad.any() and not leaves["weight"].grad.any()
        if activation is None:
            assert torch.equal(y, leaves["bias"].to(dtype).view(1, -1, 1, 1).expand_as(y))


def test_results_of_lone_elements_have_stocks_strides(device):
    x = torch.randn(4, 8, 5, 1, device=device).to(memory_format=torch.channels_last)
    assert functional.layer_norm(x, (1,)).stride() == torch.nn.functional.layer_norm(x, (1,)).stride()
    x = torch.randn(4, 3, device=device).t()
    assert functional.group_norm(x, 4).stride() == torch.nn.functional.group_norm(x, 4).stride()


def test_rows_that_only_begin_alike():
    """They are stock's, bit by bit, as are rows of zeros."""
    x = torch.randn(6, 300)
    x[0, :299], x[1, :5], x[2] = 3.0, 7.0, 0.0
    with fastnorm.use("reference"):
        assert torch.equal(functional.layer_norm(x, (300,)), torch.nn.functional.layer_norm(x, (300,)))
