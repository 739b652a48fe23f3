"""What comes after a norm may write into its output, as ReLU(inplace=True) and `x += y` do."""

import pytest
import torch
from torch import nn

import fastnorm

MODULES = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(8), (2, 3, 8)),
    "RMSNorm": (lambda: fastnorm.RMSNorm(8, rounding="llama"), (2, 3, 8)),
    "AddLayerNorm": (lambda: fastnorm.AddLayerNorm(8, residual_dtype=torch.float32), (2, 3, 8)),
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
