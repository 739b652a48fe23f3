"""The compiled backend: the functions that every backend has, here the operators of torch.ops.fastnorm.

PyTorch's dispatcher picks the kernel for the tensors' device. Importing this module raises ImportError, with the
reason, where no built extension fits. y, h and dx of a row don't depend on the other rows, and no result depends on the
number of threads. The CPU's instruction set may change the last bits.
"""

from functools import cache, partial
from typing import Any

import torch

from . import build, operators

_C: Any = build.load()
_library = torch.library.Library("fastnorm", "FRAGMENT")  # after _C: a mismatched schema would abort while that loads


def serves(device_type: str, function: str = "row_norm_forward") -> bool:
    """Whether the function's kernel was built for a device type, such as "cpu"."""
    key = device_type.upper()
    return key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnorm::{function}", key)


def _define(operator: operators.Operator) -> torch._ops.OpOverload:
    """Defines the operator over its C++ functions, and returns its overload, which calls need not look up again.

    The dispatcher compares the schema with the signatures in C++; raises ImportError where they differ.
    """
    try:
        operator.define(_library)
    except RuntimeError as error:
        raise _older_build(f"with another signature of {operator.name}") from error
    if not serves("cpu", operator.name):
        raise _older_build(f"without {operator.name}")
    return getattr(torch.ops.fastnorm, operator.name).default


def _older_build(difference: str) -> ImportError:
    reason = f"{_C.__file__} is an older build, {difference}"
    return ImportError(f"{reason}: build it again as it was built, or delete it and run: {build.COMMAND}")


def _function(name: str) -> Any:
    """What the extension has by this name beside the operators."""
    if not hasattr(_C, name):
        raise _older_build(f"without {name}")
    return getattr(_C, name)


globals().update({name: _define(operator) for name, operator in operators.OPERATORS.items()})
# Checks of lists of tensors: whether kernels can read them, and keys of their shapes, and of their addresses and sizes
# (csrc/lists.h).
are_plain, all_readable, gradients = map(_function, ("are_plain", "all_readable", "gradients"))
shape_key, list_key = map(_function, ("shape_key", "list_key"))

# Whole calls with autograd (csrc/calls.h); they return NotImplemented for wrong or unusual arguments.
_row_norms = enumerate(
    f"{kind}{norm}" for kind in ("", "add_", "gated_", "modulated_") for norm in ("layer_norm", "rms_norm")
)
calls = {name: partial(_function("row_norm"), number) for number, name in _row_norms}
calls |= {name: _function(name) for name in ("batch_norm", "group_norm", "rms_norm_many")}
# call_operator(name, *arguments) runs an operator of the Triton backend by its launch plan; plan_count() counts them.
call_operator, plan_count = map(_function, ("call_operator", "plan_count"))
# Statistics of the norms' inputs, as they are computed (csrc/statistics.h).
listen, heard = map(_function, ("listen", "heard"))
# The address of a C function with the parameters of cuLaunchKernel that does nothing, to measure the host's time.
LAUNCH_NOTHING = _function("LAUNCH_NOTHING")


def build_info() -> dict[str, object]:
    """How the extension was compiled: compiler, flags, openmp, torch, cuda (None without CUDA), cuda_archs."""
    return _C.build_info()


def new_pages() -> str:
    """How memory of large new outputs is obtained on this machine, in words; measured where the system doesn't tell."""
    return _C.new_pages()


@cache
def covers(cuda_device: int) -> bool:
    """Whether the CUDA kernels run on the card with this index: as its machine code, or as PTX of an older one."""
    return _C.cuda_covers(cuda_device)
