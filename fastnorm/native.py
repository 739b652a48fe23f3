"""The compiled backend: the names that every backend has, over torch.ops.fastnorm.

PyTorch's dispatcher takes the kernel for the tensors' device. Importing this module raises ImportError, with the
reason, where the extension isn't built. y, h and dx of a row do not depend on the other rows, and no result depends on
the number of threads; between instruction sets results may differ in their last bits.
"""

from functools import cache, partial

import torch

from . import build, operators

_C = build.load()
_library = torch.library.Library("fastnorm", "FRAGMENT")  # after _C: a mismatch found while that loads would abort


def serves(device_type: str, function: str = "row_norm_forward") -> bool:
    """Whether a kernel of this function was built for the device type, such as "cpu"."""
    key = device_type.upper()
    return key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnorm::{function}", key)


def _define(operator: operators.Operator) -> torch._ops.OpOverload:
    """Defines it over C++ functions, with whose signatures the dispatcher compares the schema; returns the overload,
    because a call through the packet looks it up each time."""
    try:
        operator.define(_library)
    except RuntimeError as error:
        raise _misfit(f"with another signature of {operator.name}") from error
    if not serves("cpu", operator.name):
        raise _misfit(f"without {operator.name}")
    return getattr(torch.ops.fastnorm, operator.name).default


def _misfit(difference: str) -> ImportError:
    reason = f"{_C.__file__} is an older build, {difference}"
    return ImportError(f"{reason}: build it again as it was built, or delete it and run: {build.COMMAND}")


globals().update({name: _define(operator) for name, operator in operators.OPERATORS.items()})
all_readable, list_key = _C.all_readable, _C.list_key  # of lists of tensors: see csrc/lists.h

# Whole calls, autograd included, as csrc/calls.h has them; NotImplemented for what is wrong or not plain.
_row_norms = enumerate(("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"))
calls = {name: partial(_C.row_norm, number) for number, name in _row_norms}
calls |= {"batch_norm": _C.batch_norm, "group_norm": _C.group_norm}
# an operator of the Triton backend by its launch plan, call_operator(name, *arguments), and how many plans there are
call_operator, plan_count = _C.call_operator, _C.plan_count
# the address of a C function with the parameters of cuLaunchKernel, for measuring the host's time
LAUNCH_NOTHING = _C.LAUNCH_NOTHING


def build_info() -> dict[str, object]:
    """What the extension was compiled with: compiler, flags, openmp, torch, cuda (None without), cuda_archs."""
    return _C.build_info()


def new_pages() -> str:
    """How the memory of large new outputs is made on this machine, in words; tried out where nothing says it."""
    return _C.new_pages()


@cache
def covers(cuda_device: int) -> bool:
    """Whether the CUDA kernels were built for the card with this index: its machine code, or PTX of an older one."""
    return _C.cuda_covers(cuda_device)
