"""What is compared with stock PyTorch: its modules with the same parameters, and its errors."""

import pytest
import torch
from torch import nn

import fastnorm

STOCK = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "AddLayerNorm": nn.LayerNorm, "AddRMSNorm": nn.RMSNorm}
modules = pytest.mark.parametrize("name", STOCK)


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """fastnorm's module and stock's with the same, random parameters."""
    ours, stock = getattr(fastnorm, name)(*args, **kwargs), STOCK[name](*args, **kwargs)
    for parameter in stock.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def y_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm's output alone, of the modules that add too."""
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def error_of(function, given: dict) -> Exception | None:
    try:
        function(**given)
    except Exception as error:  # noqa: BLE001, whatever it is, it is compared
        return error
    return None
