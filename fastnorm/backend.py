"""The only place where a backend is chosen.

The backends are imported once, here. An absent one is recorded with its reason, which `explain` and
`python -m fastnorm` show. A named backend never falls back silently.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from . import operators, reference
from .dtensors import arrived, is_dtensor, rows_of, why_not_by_rows
from .obstacles import PLAIN, observer, why_unreadable


@dataclass(frozen=True)
class Operation:
    """One operation. names: further names that `explain` knows it by, of public functions and modules."""

    family: str  # "row norm", "modulated norm", "several row norms", "channel norm" or "clip"
    names: tuple[str, ...] = ()
    has_formula: bool = True  # False: fastnorm.reference has a backend's functions instead of one formula


OPERATIONS = {
    "layer_norm": Operation("row norm", ("LayerNorm",)),
    "rms_norm": Operation("row norm", ("RMSNorm",)),
    "add_layer_norm": Operation("row norm", ("AddLayerNorm",)),
    "add_rms_norm": Operation("row norm", ("AddRMSNorm",)),
    "gated_layer_norm": Operation("row norm", ("GatedLayerNorm",)),
    "gated_rms_norm": Operation("row norm", ("GatedRMSNorm",)),
    "modulated_layer_norm": Operation("modulated norm", ("AdaLayerNorm",)),
    "modulated_rms_norm": Operation("modulated norm"),
    "rms_norm_many": Operation("several row norms", ("RMSNormMany",)),
    "batch_norm": Operation("channel norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")),
    "batch_norm_evaluation": Operation("channel norm"),
    "sync_batch_norm": Operation("channel norm", ("SyncBatchNorm",), has_formula=False),
    "group_norm": Operation("channel norm", ("GroupNorm",)),
    "clip_grad_norm": Operation(
        "clip",
        ("clip_grad_norm_", "clip_grad_value_", "clip_grad_groups_", "clip_grads_with_norm_",
         "clip_grad_norm_in_optimizer", "get_total_norm", "gradient_health"),
        has_formula=False,
    ),
    "adaptive_clip_grad": Operation("clip", ("adaptive_clip_grad_",), has_formula=False),
}  # fmt: skip


ROW_NORMS, CHANNEL_NORMS, CLIPS = (
    tuple(name for name, operation in OPERATIONS.items() if operation.family == family)
    for family in ("row norm", "channel norm", "clip")
)
Backend = Literal["triton", "native", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REMEDIES = {
    "triton": "pip install triton  (Linux; comes with torch's CUDA and ROCm wheels)",
    "native": "python -m fastnorm build  (needs a C++20 compiler: gcc 10 or newer, or clang)",
}


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used in this process. detail: where it runs, or why not. remedy: how to get it."""

    name: str
    available: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes, and why.

    Attributes:
        op: the name that `explain` was given.
        backend: "triton", "native" or "reference"; "none" where a named backend can't serve the call.
        reason: why, in words.
    """

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


def _import(name: str, module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module, __package__)
    except ImportError as error:
        _absent[name] = str(error)
        return None


def _with_plans() -> SimpleNamespace:
    """Triton's operators, called through their launch plans. The clips', on lists of any length, have no plans."""
    call = _triton.plans.call if _native is None else _native.call_operator
    plans = {name: partial(call, name) for name in operators.OPERATORS}
    lists = {name: getattr(_triton, name) for name in plans if name.startswith("multi_tensor")}
    if _native is not None:
        _triton.tables.list_key = _native.list_key
    return SimpleNamespace(**{**plans, **lists})


_absent: dict[str, str] = {}  # backend -> why it can't be imported
_triton: Any = _import("triton", ".triton_kernels")
_native: Any = _import("native", ".native")
# The dispatcher is asked once, here: torch.compile can't trace it.
_native_devices = () if _native is None else tuple(device for device in ("cpu", "cuda") if _native.serves(device))
_native_clip_devices = (
    () if _native is None else tuple(d for d in ("cpu", "cuda") if _native.serves(d, "multi_tensor_norm"))
)
_driver = None if _triton is None else _triton.driver
_planned = None if _triton is None else _with_plans()
_library = None if _triton is None else operators.register("fastnorm_triton", _triton)


class _Setting:
    """The backends that `use` named, for the process or within one open block. The last entry holds."""

    def __init__(self, backend: str | None) -> None:
        # Entries of plain calls, each with a weak reference to its `use`: while that lives, `with` may still enter it.
        self.named: list[_Entry] = [(backend, lambda: None)]

    def name(self, maker: use) -> _Entry:
        plain = [entry for entry in self.named if entry[1]() is None]
        for superseded in plain[:-1]:
            self.named.remove(superseded)
        self.named.append((maker.backend, weakref.ref(maker)))
        return self.named[-1]


class use:
    """Names the backend of all calls that follow, or of the calls in a `with` block.

    The setting is the process's: it also holds in other threads, such as autograd's. A block holds until its end. Of
    several open blocks, in any threads or tasks, the newest holds; blocks may overlap. A plain call changes the
    setting of the newest open block, or without one that of the process. Code that torch.compile traces may use only
    blocks.

    Args:
        backend: "triton", "native", "reference", or None for automatic choice. A call that a named backend can't serve
            raises RuntimeError; it never falls back silently.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that is not available.
    """

    def __init__(self, backend: Backend | None) -> None:
        global _forced
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but got {backend!r}")
        if backend in _absent:
            raise RuntimeError(f"the {backend} backend is not available: {_absent[backend]}; see python -m fastnorm")
        self.backend: Backend | None = backend
        self.open: list[_Setting] = []
        if torch.compiler.is_compiling():  # torch.compile traces a global, but no lists
            self.before, _forced = _forced, backend
            return
        self.changed = _settings[-1]
        self.entry = self.changed.name(self)
        _put_in_force()

    def __enter__(self) -> use:
        global _forced
        if torch.compiler.is_compiling():
            _forced = self.backend
            return self
        if self.entry in self.changed.named:  # the constructor's call was no plain call, but began this block
            self.changed.named.remove(self.entry)
        block = _Setting(self.backend)
        _settings.append(block)
        self.open.append(block)
        _put_in_force()
        return self

    def __exit__(self, *exception: object) -> None:
        global _forced
        if torch.compiler.is_compiling():
            _forced = self.before
            return
        if not self.open:
            raise RuntimeError("fastnorm.use: a block ends that was not entered; write `with fastnorm.use(...):`")
        _settings.remove(self.open.pop())
        _put_in_force()


_Entry = tuple[str | None, Callable[[], use | None]]
_settings = [_Setting(None)]  # the process's, then those of the open blocks, the newest last
_forced: str | None = None  # the backend that holds: calls look at nothing else


def _put_in_force() -> None:
    """Sets `_forced`, again if it changed meanwhile. A lock could be held during a fork or a garbage collection."""
    global _forced
    while _forced != (newest := _settings[-1].named[-1][0]):
        _forced = newest


# Who serves which device: bits of `Served` in csrc/arguments.h.
_NATIVE_ON_CPU, _TRITON_ON_CPU, _TRITON_ON_GPU, _NATIVE_NAMED = 1, 2, 4, 8
# native.calls with these bits bound, cached for a setting and a Triton driver: (setting, driver, functions).
_served: tuple[str | None, object, dict[str, Callable[..., Any]]] | None = None


def call_directly(op: str, *arguments: Any) -> Any:
    """The whole call of a norm by one C++ function (csrc/calls.h); NotImplemented where it must go through Python.

    C++ checks the arguments: in Python that would take longer than the kernel of a short call.
    """
    global _served
    if is_compiling() or _native is None:
        return NotImplemented
    served, driver = _served, None if _driver is None else _driver._active
    if served is None or served[0] is not _forced or served[1] is not driver:
        served = _served = _forced, driver, _calls(_who_serves(driver))
    return served[2][op](*arguments)


def _calls(served: int) -> dict[str, Callable[..., Any]]:
    return {op: partial(call, served) if served else lambda *_: NotImplemented for op, call in _native.calls.items()}


def _who_serves(driver: object) -> int:
    """Bits for the devices that C++ starts kernels on. Triton counts once it has a driver, which `pick` makes."""
    if _triton is not None and _triton.INTERPRETED and _forced != "native":
        return 0
    by_triton = _forced in (None, "triton") and driver is not None
    on = {
        _TRITON_ON_CPU: by_triton and _triton.serves("cpu"),
        _TRITON_ON_GPU: by_triton and _triton.serves("cuda"),
        _NATIVE_ON_CPU: _forced in (None, "native") and "cpu" in _native_devices,
        _NATIVE_NAMED: _forced == "native",
    }
    return sum(bit for bit, serves in on.items() if serves)


def needs_formula(op: str, x: Any, *others: Any) -> bool:
    """Whether only PyTorch's own operations can take these tensors. Reads no sizes: nested tensors have none.

    Raises RuntimeError if they can and a backend is named. An argument that is no tensor is left to later checks.
    """
    obstacle = _obstacle(x, *others)
    if obstacle is None:
        return False
    refuse_formula(op, obstacle)
    return True


def backward_needs_formula(*gradients: torch.Tensor | None) -> bool:
    """Whether the running backward must use PyTorch's own operations.

    It must if it is to be differentiable itself (create_graph=True, forward mode), or if no kernel can read a gradient.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return any(g is not None and why_unreadable(g) is not None for g in gradients)


def pick(op: str, x: torch.Tensor) -> Any | None:
    """The functions of the backend that serves `op` for `x`, after `needs_formula` has returned False.

    None means the formula in fastnorm.reference; for an operation without one, returns that module.
    """
    name, _ = _choose(op, x)
    if name == "reference":
        return None if OPERATIONS[op].has_formula else reference
    if name == "native":
        return _native
    # Compiled graphs and dispatch modes need operators that the dispatcher knows.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is FakeTensor:
        return torch.ops.fastnorm_triton
    return _triton if _triton.INTERPRETED else _planned


def refuse_formula(op: str, reason: str) -> None:
    """Raises RuntimeError if a backend is named: for this reason, only PyTorch's operations can serve."""
    if _forced not in (None, "reference"):
        raise _cannot_serve(op, _forced, reason)


def _cannot_serve(op: str, name: str, obstacle: str) -> RuntimeError:
    return RuntimeError(f"{op}: fastnorm.use({name!r}) names a backend that can't serve this call: {obstacle}")


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether none of the tensors is a subclass but torch.nn.Parameter."""
    if _native is not None and not torch.compiler.is_compiling():
        return _native.are_plain(tensors)
    return set(map(type, tensors)) <= PLAIN


def all_readable(tensors: Sequence[torch.Tensor], shapes: int | None = None) -> bool:
    """Whether these are plain tensors that kernels can read in place, all on one device, and whose shape_key is
    `shapes` unless that is None; False where that is not known of all at once."""
    return _native is not None and not torch._C._len_torch_dispatch_stack() and _native.all_readable(tensors, shapes)


def gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of the parameters that have one."""
    if _native is not None and not torch.compiler.is_compiling() and not torch._C._len_torch_function_stack():
        return _native.gradients(parameters)
    # Each .grad is read once, because that takes longer than all the rest; dynamo can't trace a walrus here.
    return [grad for grad in [parameter.grad for parameter in parameters] if grad is not None]


def shape_key(tensors: Sequence[torch.Tensor]) -> int | None:
    """A hash of the tensors' shapes, of 64 bits; None where they must be compared one by one."""
    return None if _native is None or torch.compiler.is_compiling() else _native.shape_key(tensors)


def _choose(op: str, x: torch.Tensor) -> tuple[str, str]:
    forced = _forced
    if forced == "reference":
        return forced, "named by fastnorm.use"
    compiling = torch.compiler.is_compiling()
    obstacle = None if compiling or x.dtype in DTYPES else f"no kernel for {x.dtype}"
    if forced is not None:
        obstacle = obstacle or _refusal(op, forced, x)
        if obstacle is not None:
            raise _cannot_serve(op, forced, obstacle)
        return forced, "named by fastnorm.use"
    if compiling:
        return "reference", "torch.compile fuses the formula with its neighbours"
    if obstacle is not None:
        return "reference", obstacle
    reasons = []
    # A clip takes a whole list in one call, for which only Triton needs a table of pointers on the device.
    for name in ("native", "triton") if op in CLIPS else ("triton", "native"):
        refusal = _refusal(op, name, x)
        if refusal is None:
            return name, f"the first backend that serves {x.device.type} tensors"
        reasons.append(f"{name}: {refusal}")
    return "reference", "; ".join(reasons)


def _obstacle(x: Any, *others: Any) -> str | None:
    """Why no kernel of any backend can take these tensors, whatever their sizes; None where an argument is no tensor.

    While torch.compile traces, little is asked: the graph gets the formula, or operators, which the dispatcher calls
    with plain tensors.
    """
    compiling = torch.compiler.is_compiling()
    obstacle = None if compiling else observer()
    for tensor in (x, *others):
        if isinstance(tensor, torch.Tensor):
            obstacle = obstacle or why_unreadable(tensor, compiling)
        elif tensor is not None or x is None:
            return None
    return obstacle


def _refusal(op: str, name: str, x: torch.Tensor) -> str | None:
    """Why the backend can't take a tensor on this device."""
    if name in _absent:
        return _absent[name]
    if name == "native":
        if op == "batch_norm_evaluation" and x.device.type == "cpu" and _forced is None:
            return "PyTorch's own CPU kernel for evaluation without activation and residual is as fast as a copy"
        devices = _native_clip_devices if op in CLIPS else _native_devices
        if x.device.type == "cuda" and "cuda" in devices and not _native.covers(x.device.index):
            archs = ", ".join(_native.build_info()["cuda_archs"])
            return f"built for {archs}, which {x.device} is not: run python -m fastnorm build --force"
        return None if x.device.type in devices else f"not built for {x.device.type}"
    return None if _triton.serves(x.device.type) else f"Triton doesn't run on {x.device.type} here"


def statuses() -> dict[str, Status]:
    """Every backend's status in this process."""
    result = {name: Status(name, False, reason, _REMEDIES[name]) for name, reason in _absent.items()}
    if _triton is not None:
        device = _triton.device_type()
        detail = f"runs on {device}" if device else "installed, but it finds no device to run on"
        result["triton"] = Status("triton", device is not None, detail, "" if device else "run on a machine with a GPU")
    if _native is not None:
        built = f"built for {', '.join(_native_devices) or 'no device'}"
        if "cuda" in _native_clip_devices:
            built += f"; the clips also for CUDA ({', '.join(_native.build_info()['cuda_archs'])})"
        result["native"] = Status("native", bool(_native_devices), built)
    result["reference"] = Status("reference", True, "PyTorch's own operations, on every device")
    return {name: result[name] for name in BACKENDS}


def explain(x: torch.Tensor | None = None, op: str = "rms_norm") -> Explanation:
    """Tells which backend `op` takes for the input `x`, and why. Runs nothing.

    Args:
        x: a tensor with the type, dtype and device of the input, or of the gradients of a clip; None stands for a
            float32 CPU tensor. Of a DTensor the placements count as well, for norms over its last dimension.
        op: the name of a function or module of fastnorm, such as "layer_norm", "GroupNorm" or "clip_grad_norm_"; or
            "batch_norm_evaluation", which is batch_norm in evaluation without activation and residual.

    Returns:
        The choice, to be printed. Where `fastnorm.use` names a backend that can't serve, its `backend` is "none".

    Raises:
        ValueError: for an unknown `op`.
    """
    known = {name: name for name in OPERATIONS}
    known |= {alias: name for name, operation in OPERATIONS.items() for alias in operation.names}
    if op not in known:
        raise ValueError(f"op must be one of {', '.join(known)}, but got {op!r}")
    x = torch.empty(0) if x is None else x
    name, where = known[op], ""
    try:
        if name in ROW_NORMS:
            x = arrived(x)
            if is_dtensor(x):
                obstacle = why_not_by_rows(x, 1, (x,))
                if obstacle is not None:
                    refuse_formula(name, obstacle)
                    return Explanation(op, "reference", obstacle)
                x, where = rows_of(x), "each rank its own rows; "
        if needs_formula(name, x):
            return Explanation(op, "reference", where + str(_obstacle(x)))
        backend, reason = _choose(name, x)
        return Explanation(op, backend, where + reason)
    except RuntimeError as error:
        return Explanation(op, "none", str(error))
