"""The compiled backend: the names that every backend has, over torch.ops.fastnorm.

PyTorch's dispatcher takes the kernel for the tensors' device. Importing this module raises ImportError, with the
reason, where the extension isn't built. y, h and dx of a row do not depend on the other rows, and no result depends on
the number of threads; between instruction sets results may differ in their last bits.
"""

from functools import cache

import torch

from . import build, operators

_C = build.load()

if missing := [name for name in operators.names() if not hasattr(torch.ops.fastnorm, name)]:
    reason = f"{_C.__file__} is an older build, without {missing[0]}"
    raise ImportError(f"{reason}: build it again as it was built, or delete it and run: {build.COMMAND}")
operators.register_fakes("fastnorm")

# Overloads, because a call through the packet would look the overload up each time.
_ops = torch.ops.fastnorm
rms_norm_forward = _ops.rms_norm_forward.default
rms_norm_backward = _ops.rms_norm_backward.default
add_rms_norm_forward = _ops.add_rms_norm_forward.default
add_rms_norm_backward = _ops.add_rms_norm_backward.default
layer_norm_forward = _ops.layer_norm_forward.default
layer_norm_backward = _ops.layer_norm_backward.default
add_layer_norm_forward = _ops.add_layer_norm_forward.default
add_layer_norm_backward = _ops.add_layer_norm_backward.default
batch_norm_forward = _ops.batch_norm_forward.default
batch_norm_backward = _ops.batch_norm_backward.default
batch_norm_evaluation = _ops.batch_norm_evaluation.default
batch_norm_statistics = _ops.batch_norm_statistics.default
batch_norm_normalize = _ops.batch_norm_normalize.default
batch_norm_backward_sums = _ops.batch_norm_backward_sums.default
batch_norm_backward_apply = _ops.batch_norm_backward_apply.default
group_norm_forward = _ops.group_norm_forward.default
group_norm_backward = _ops.group_norm_backward.default
multi_tensor_norm = _ops.multi_tensor_norm.default
multi_tensor_scale_ = _ops.multi_tensor_scale_.default
multi_tensor_clamp_ = _ops.multi_tensor_clamp_.default
multi_tensor_agc_ = _ops.multi_tensor_agc_.default
# whether kernels can read all tensors of a list as they lie, and all on one device
all_readable = _ops.all_readable.default

# Whole calls on plain CPU tensors, autograd included; they return NotImplemented for what is wrong or not plain.
direct = {name: getattr(_C, name) for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")}


def build_info() -> dict[str, object]:
    """What the extension was compiled with: compiler, flags, openmp, torch, cuda (None without), cuda_archs."""
    return _C.build_info()


def serves(device_type: str, function: str = "rms_norm_forward") -> bool:
    """Whether a kernel of this function was built for the device type, such as "cpu"."""
    key = device_type.upper()
    return key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnorm::{function}", key)


@cache
def covers(cuda_device: int) -> bool:
    """Whether the CUDA kernels were built for the card with this index: its machine code, or PTX of an older one."""
    return _C.cuda_covers(cuda_device)
