"""Triton kernels. Every function here has its namesake, with the same signature, in fastnorm.native."""

import torch
import triton

from .agc import multi_tensor_agc_
from .batch_norm import (
    batch_norm_backward,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_evaluation,
    batch_norm_forward,
    batch_norm_normalize,
    batch_norm_statistics,
)
from .group_norm import group_norm_backward, group_norm_forward
from .launch import INTERPRETED
from .multi_tensor import multi_tensor_clamp_, multi_tensor_norm, multi_tensor_scale_
from .row_norm import row_norm_backward, row_norm_forward

__all__ = [
    "INTERPRETED",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_evaluation",
    "batch_norm_forward",
    "batch_norm_normalize",
    "batch_norm_statistics",
    "device_type",
    "group_norm_backward",
    "group_norm_forward",
    "multi_tensor_agc_",
    "multi_tensor_clamp_",
    "multi_tensor_norm",
    "multi_tensor_scale_",
    "row_norm_backward",
    "row_norm_forward",
    "serves",
]


def device_type() -> str | None:
    """The type of the device that Triton's kernels run on: "cpu" in its interpreter, None where it finds no device."""
    if INTERPRETED:
        return "cpu"
    if triton.runtime.driver._active is None and not torch.accelerator.is_available():
        return None
    return triton.runtime.driver.active.get_active_torch_device().type


def serves(device: str) -> bool:
    """Whether tensors of this device type can be given to the kernels."""
    if device == "cpu" and not INTERPRETED and triton.runtime.driver._active is None:
        return False  # a driver that runs on the CPU is set by hand; creating the card's only to ask it takes seconds
    return device_type() == device
