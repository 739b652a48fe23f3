"""The Triton backend: a launcher for each operator of fastnorm.operators, with its name and its schema's arguments.

Each operation's file has its kernels and then their launchers: row_norm.py, row_gradients.py, rms_norm_many.py,
batch_norm.py, group_norm.py, multi_tensor.py, clip_policy.py and agc.py (clips). launch.py, row_launch.py,
channel_launch.py and list_launch.py choose tiles and programs; jit.py and plans.py make launches cheap.
"""

from collections import ChainMap

import torch
from triton.runtime import driver as driver

from ..operators import OPERATORS
from . import agc, batch_norm, clip_policy, group_norm, multi_tensor, rms_norm_many, row_gradients, row_norm
from . import plans as plans
from . import tables as tables
from .launch import INTERPRETED as INTERPRETED

# each operator's launcher, from whichever of these modules has it
_modules = agc, batch_norm, clip_policy, group_norm, multi_tensor, rms_norm_many, row_gradients, row_norm
_functions = ChainMap(*map(vars, _modules))
globals().update({name: _functions[name] for name in OPERATORS})


def device_type() -> str | None:
    """The type of the device that Triton's kernels run on: "cpu" in the interpreter, None where there is no device."""
    if INTERPRETED:
        return "cpu"
    if driver._active is None and not torch.accelerator.is_available():
        return None
    return driver.active.get_active_torch_device().type


def serves(device: str) -> bool:
    """Whether the kernels take tensors of this device type."""
    if device == "cpu" and not INTERPRETED and driver._active is None:
        return False  # a driver for the CPU is only ever set by hand, and to create a card's takes seconds
    return device_type() == device
