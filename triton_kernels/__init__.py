"""Triton kernels: the functions of fastnorm.operators, with the arguments of their schemas."""

from collections import ChainMap

import torch
from triton.runtime import driver as driver

from ..operators import OPERATORS
from . import agc, batch_norm, group_norm, multi_tensor, row_norm
from . import plans as plans
from . import tables as tables
from .launch import INTERPRETED as INTERPRETED

# every operator's function, whichever of these modules has it
_functions = ChainMap(*map(vars, (agc, batch_norm, group_norm, multi_tensor, row_norm)))
globals().update({name: _functions[name] for name in OPERATORS})


def device_type() -> str | None:
    """The type of the device that Triton's kernels run on: "cpu" in its interpreter, None where it finds no device."""
    if INTERPRETED:
        return "cpu"
    if driver._active is None and not torch.accelerator.is_available():
        return None
    return driver.active.get_active_torch_device().type


def serves(device: str) -> bool:
    """Whether tensors of this device type can be given to the kernels."""
    if device == "cpu" and not INTERPRETED and driver._active is None:
        return False  # a driver that runs on the CPU is set by hand; creating the card's only to ask it takes seconds
    return device_type() == device
