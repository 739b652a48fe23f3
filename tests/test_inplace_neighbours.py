"""What comes after a norm may write into its output, as ReLU(inplace=True) and `x += y` do."""

from functools import partial

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import backend
from helpers.every_norm import assert_same, call, every_case, everything, make_inputs

MODULES = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(8), (2, 3, 8)),
    "RMSNorm": (lambda: fastnorm.RMSNorm((3, 8), rounding="llama"), (2, 2, 3, 8)),
    "AddLayerNorm": (lambda: fastnorm.AddLayerNorm((3, 8), residual_dtype=torch.float32), (2, 3, 8)),
    "AddRMSNorm": (lambda: fastnorm.AddRMSNorm(8, rounding="llama"), (2, 3, 8)),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(8), (6, 8)),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8), (2, 8, 3, 3)),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 8), (2, 8, 3, 3)),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(8), (2, 8, 3, 3)),
}


def run(module: nn.Module, x: torch.Tensor, inplace: bool) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf, 2 * leaf) if "Add" in type(module).__name__ else module(leaf)
    ys = y if isinstance(y, tuple) else (y,)
    ys = [z.mul_(3).relu_() if inplace else z.mul(3).relu() for z in ys[:1]] + list(ys[1:])
    dys = [torch.linspace(-1, 1, z.numel(), device=z.device).view(z.shape) for z in ys]
    return [*ys, *torch.autograd.grad(ys, [leaf, *module.parameters()], dys)]


CASES = [(name, layout) for name, (_, shape) in MODULES.items() for layout in (False, True)[: len(shape) // 2]]


@pytest.mark.parametrize("name, channels_last", CASES)
def test_the_next_operation_may_be_in_place(name, channels_last, device):
    make, shape = MODULES[name]
    x = torch.randn(shape).to(device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    module = make().to(device)
    for actual, expected in zip(run(module, x, True), run(module, x, False), strict=True):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def scaled(outputs: list[torch.Tensor], inplace: bool) -> list[torch.Tensor]:
    y, *h = outputs  # the backward needs h
    return [y.mul_(3).relu_() if inplace else y.mul(3).relu(), *h]


@every_case
def test_results_are_views_of_nothing(case, kernel_device, monkeypatch):
    """In-place operations on a view that a Function returns are refused, and on any other view they cost copies."""
    check_results(make_inputs([case], kernel_device))
    if backend._forced == "native":  # and by way of the operators
        monkeypatch.setattr(backend, "call_directly", lambda *arguments: NotImplemented)
        check_results(make_inputs([case], kernel_device))


def check_results(tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, given in tensors.items():
        for grad in (False, True):
            leaves = {n: t.clone().requires_grad_(grad and "running" not in n) for n, t in given.items()}
            for output in call(name, leaves):
                assert output.requires_grad == grad and not output._is_view() and output._base is None

    def block(leaves: dict, inplace: bool) -> dict:
        return {name: scaled(call(name, given), inplace) for name, given in leaves.items()}

    actual, expected = (everything(tensors, partial(block, inplace=inplace)) for inplace in (True, False))
    assert_same(actual, expected)
