"""The only place where a backend is chosen.

The backends are imported once, here. One that is absent is recorded with its reason, which `explain` and
`python -m fastnorm` show; nothing falls back without saying so there.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack

from . import operators, reference
from .views import peculiarity


@dataclass(frozen=True)
class Operation:
    """What is known of an operation here: `names` are the public functions and modules that take it, beside its own."""

    family: str  # "row norm", "channel norm" or "clip"
    names: tuple[str, ...] = ()
    has_formula: bool = True  # in steps, or on lists, it has none: fastnorm.reference has a backend's functions


OPERATIONS = {
    "layer_norm": Operation("row norm", ("LayerNorm",)),
    "rms_norm": Operation("row norm", ("RMSNorm",)),
    "add_layer_norm": Operation("row norm", ("AddLayerNorm",)),
    "add_rms_norm": Operation("row norm", ("AddRMSNorm",)),
    "batch_norm": Operation("channel norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")),
    "batch_norm_evaluation": Operation("channel norm"),
    "sync_batch_norm": Operation("channel norm", ("SyncBatchNorm",), has_formula=False),
    "group_norm": Operation("channel norm", ("GroupNorm",)),
    "clip_grad_norm": Operation(
        "clip",
        ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "clip_grad_norm_in_optimizer",
         "get_total_norm", "gradient_health"),
        has_formula=False,
    ),
    "adaptive_clip_grad": Operation("clip", ("adaptive_clip_grad_",), has_formula=False),
}  # fmt: skip


def _family(family: str) -> tuple[str, ...]:
    return tuple(name for name, operation in OPERATIONS.items() if operation.family == family)


ROW_NORMS, CHANNEL_NORMS, CLIPS = map(_family, ("row norm", "channel norm", "clip"))
BACKENDS = ("triton", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of torch.set_default_device, which minds factories alone, and of make_fx, which records operators
_MODES_WITHOUT_INTEREST = ("torch.utils._device", "torch.fx.experimental.proxy_tensor")
_REMEDIES = {
    "triton": "pip install triton  (Linux; comes with torch's CUDA and ROCm wheels)",
    "native": "python -m fastnorm build  (needs a C++20 compiler: gcc 10 or newer, or clang)",
}


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used in this process: `detail` says where or why not, `remedy` how to get it."""

    name: str
    available: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes, and why."""

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


def _by_plans() -> SimpleNamespace:
    """Triton's operators by their launch plans, which lists of tensors don't have."""
    call = _triton.plans.call if _native is None else _native.call_operator
    plans = {name: partial(call, name) for name in operators.OPERATORS}
    lists = {name: getattr(_triton, name) for name in plans if name.startswith("multi_tensor")}
    if _native is not None:
        _triton.tables.list_key = _native.list_key
    return SimpleNamespace(**{**plans, **lists})


_absent: dict[str, str] = {}
_triton = _import("triton", ".triton_kernels")
_native = _import("native", ".native")
# asked once, because torch.compile can't trace a question to the dispatcher
_native_devices = () if _native is None else tuple(device for device in ("cpu", "cuda") if _native.serves(device))
_native_clip_devices = (
    () if _native is None else tuple(d for d in ("cpu", "cuda") if _native.serves(d, "multi_tensor_norm"))
)
_driver = None if _triton is None else _triton.driver
_planned = None if _triton is None else _by_plans()
_library = None if _triton is None else operators.register("fastnorm_triton", _triton)


class _Setting:
    """What is named: for the process, or for an open block."""

    def __init__(self, backend: str | None) -> None:
        # by plain calls, the newest last, each with its object while that may still turn out to begin a block
        self.named: list[tuple[str | None, Callable[[], use | None]]] = [(backend, lambda: None)]

    def name(self, maker: use) -> tuple[str | None, Callable[[], use | None]]:
        plain = [entry for entry in self.named if entry[1]() is None]
        for superseded in plain[:-1]:
            self.named.remove(superseded)
        self.named.append((maker.backend, weakref.ref(maker)))
        return self.named[-1]


class use:
    """Names the backend of every call that follows, or of the calls in a `with` block.

    `use("triton")`, `use("native")`, `use("reference")` or `use(None)`, which is automatic. Under a named backend, a
    call that it can't serve raises a RuntimeError; nothing falls back silently.

    The setting is the process's: it also holds in the threads of a pool, and in autograd's, where checkpoints are
    computed again and hooks may clip. A block holds until its end; of several that are open, in any threads or tasks,
    the newest. Blocks that overlap leave nothing behind. A plain call changes the setting of the newest open block;
    where none is open, that of the process. In code that torch.compile traces, only blocks may be used.

    Raises ValueError for an unknown name, RuntimeError for a backend that isn't there.
    """

    def __init__(self, backend: str | None) -> None:
        global _forced
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but got {backend!r}")
        if backend in _absent:
            raise RuntimeError(f"the {backend} backend is not available: {_absent[backend]}")
        self.backend, self.open = backend, []
        if torch.compiler.is_compiling():  # torch.compile traces a plain global, and no lists
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
        if self.entry in self.changed.named:  # what seemed to be a plain call was the beginning of a block
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
            raise RuntimeError("fastnorm.use: the end of a block that was not entered")
        _settings.remove(self.open.pop())
        _put_in_force()


_settings = [_Setting(None)]  # the process's, and those of the open blocks, the newest last
_forced: str | None = None  # the newest one's backend: all that a call looks at


def _put_in_force() -> None:
    """Without a lock, which a fork or the garbage collector could find taken: the last change is what stays."""
    global _forced
    while _forced != (newest := _settings[-1].named[-1][0]):
        _forced = newest


# who serves which device: Served in csrc/arguments.h
_NATIVE_ON_CPU, _TRITON_ON_CPU, _TRITON_ON_GPU, _NATIVE_NAMED = 1, 2, 4, 8
# the functions of native.calls for those that serve, with the setting and the driver that they hold for
_served: tuple[str | None, object, dict[str, Callable[..., Any]]] | None = None


def call_directly(op: str, *arguments: Any) -> Any:
    """A norm in one step: one of csrc/calls.h's functions. NotImplemented where `pick` must look.

    What the arguments are is checked behind this, in C++: a short call costs more in Python than in its kernel.
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
    """Bits for the devices that C++ starts kernels on. Before Triton has a driver, it is left to `pick` to make one."""
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
    """Whether only PyTorch's own operations can take these tensors, which need not even have sizes that can be read.

    Raises where a backend is named, which then can't serve. What is no tensor is left to the checks of arguments.
    """
    obstacle = _obstacle(x, *others)
    if obstacle is None:
        return False
    refuse_formula(op, obstacle)
    return True


def backward_needs_formula(*gradients: torch.Tensor | None) -> bool:
    """Whether the backward that is running must be PyTorch's own operations: because it must be differentiable itself
    (create_graph=True, forward-mode), or because no kernel can read the gradients that have come."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return any(g is not None and peculiarity(g) is not None for g in gradients)


def pick(op: str, x: torch.Tensor) -> Any | None:
    """What serves `op` on `x`, and on others like it, which `needs_formula` has let pass: the backend's functions.

    None stands for the formula; for what has none, fastnorm.reference has a backend's functions.
    """
    name, _ = _choose(op, x)
    if name == "reference":
        return None if OPERATIONS[op].has_formula else reference
    if name == "native":
        return _native
    # a compiled graph, or a dispatch mode that looks on, needs operators that the dispatcher knows
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is FakeTensor:
        return torch.ops.fastnorm_triton
    return _triton if _triton.INTERPRETED else _planned


def refuse_formula(op: str, reason: str) -> None:
    """Raises where a backend is named though only PyTorch's operations can serve, for the reason given."""
    if _forced not in (None, "reference"):
        raise _cannot_serve(op, _forced, reason)


def _cannot_serve(op: str, name: str, obstacle: str) -> RuntimeError:
    return RuntimeError(f"{op}: fastnorm.use({name!r}) names a backend that can't serve this call: {obstacle}")


def all_readable(tensors: Sequence[torch.Tensor]) -> bool | None:
    """Whether kernels can read plain tensors as they lie, all on one device; None where only looking at each tells."""
    if _native is None or torch._C._len_torch_dispatch_stack():
        return None
    return _native.all_readable(tensors)


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
    # a clip is one call for a whole list, where the compiled kernels need no table of pointers on the device
    for name in ("native", "triton") if op in CLIPS else ("triton", "native"):
        refusal = _refusal(op, name, x)
        if refusal is None:
            return name, f"the first backend that serves {x.device.type} tensors"
        reasons.append(f"{name}: {refusal}")
    return "reference", "; ".join(reasons)


def _obstacle(x: Any, *others: Any) -> str | None:
    """Why no kernel can take these tensors, whatever the backend and their sizes. None where one of them is no tensor.

    What torch.compile traces becomes the formula, or operators, to which the dispatcher brings plain tensors.
    """
    compiling = torch.compiler.is_compiling()
    obstacle = None if compiling else onlooker()
    for tensor in (x, *others):
        if isinstance(tensor, torch.Tensor):
            obstacle = obstacle or peculiarity(tensor, compiling)
        elif tensor is not None or x is None:
            return None
    return obstacle


def onlooker() -> str | None:
    """Who must see PyTorch's own operations at this moment, so that no kernel can run."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need differentiable operations"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation needs differentiable operations"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch operations only"
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if type(mode).__module__ not in _MODES_WITHOUT_INTEREST:
                return f"{type(mode).__name__} is a mode that sees PyTorch's functions"
    return None


def _refusal(op: str, name: str, x: torch.Tensor) -> str | None:
    """Why the backend can't take a tensor on this device."""
    if name in _absent:
        return _absent[name]
    if name == "native":
        if op == "batch_norm_evaluation" and x.device.type == "cpu" and _forced is None:
            return "evaluation without activation and residual is a copy's work in PyTorch's own CPU kernel"
        devices = _native_clip_devices if op in CLIPS else _native_devices
        if x.device.type == "cuda" and "cuda" in devices and not _native.covers(x.device.index):
            archs = ", ".join(_native.build_info()["cuda_archs"])
            return f"built for {archs}, which {x.device} is not; build for it: python -m fastnorm build --force"
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
    """Which backend `op` takes for the input `x`, and why.

    x: a tensor like the one to be normalised, or a gradient; without one, a float32 CPU tensor is meant.
    op: the name of a function or module of fastnorm that computes something, such as "layer_norm", "GroupNorm" or
        "clip_grad_norm_"; or batch_norm_evaluation, which is batch_norm in evaluation without activation and residual.

    Raises ValueError for another name.
    """
    known = {name: name for name in OPERATIONS}
    known |= {alias: name for name, operation in OPERATIONS.items() for alias in operation.names}
    if op not in known:
        raise ValueError(f"op must be one of {', '.join(known)}, but got {op!r}")
    x = torch.empty(0) if x is None else x
    try:
        if needs_formula(known[op], x):
            return Explanation(op, "reference", str(_obstacle(x)))
        return Explanation(op, *_choose(known[op], x))
    except RuntimeError as error:
        return Explanation(op, "none", str(error))
