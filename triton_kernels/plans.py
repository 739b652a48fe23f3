"""Launch plans: what an operator's launcher does on the device, recorded once and then repeated without the launcher.

To record, the launcher runs with its kernels compiled but not launched. The plan is what it allocates, copies and would
launch. Plans are cached by all that a launcher may look at: the operator, shapes, strides, dtypes, alignment, options,
driver and device. csrc/plans.cpp caches and repeats plans; without the extension `call` does.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver as drivers

from .jit import needs_jit, recorder
from .launch import INTERPRETED, backend

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_LIBRARIES = {
    "cuda": ("cuLaunchKernel", ("libcuda.so.1",)),
    "hip": ("hipModuleLaunchKernel", ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")),
}

# What launches in place of the GPU's driver; a virtual GPU sets it. It is the address of a C function with
# cuLaunchKernel's parameters, or a Python function launcher(function, grid, values, tensors), whose values hold
# addresses in memory of the tensors.
launcher: int | Callable[..., Any] | None = None

# Calls with a key that go through the launcher before a plan is recorded. To record one takes as long as five calls,
# which don't pay where each batch has another number of rows.
CALLS_BEFORE = 1


class Plan(NamedTuple):
    """Tensors are numbered: the call's arguments, its results that are not None, and temporaries.

    results, temporaries: (shape, strides, dtype) of each; None for a result that is None.
    returns_list: whether the launcher returns the results as a list, and not as a tuple or one tensor.
    steps: ("copy", to, from, offset, shape, strides) or ("launch", function, grid, threads, shared bytes, parameters);
        a parameter is (−1, number) or (tensor's number, bytes from its first element).
    launches: for each launch the compiled kernel, which keeps it loaded, and the parameters of Triton's own launcher,
        which takes constexprs as well, and tuples: (_TUPLE, its parameters).
    """

    results: list[tuple | None]
    returns_list: bool
    temporaries: list[tuple]
    steps: list[tuple]
    launches: list[tuple[Any, list[tuple[int, Any]]]]


_TUPLE = -2


class _NoPlan(Exception):
    """A plan can't repeat what the call does."""


class _Recording(TorchDispatchMode):
    """Records what a launcher allocates and copies; `note` records what it would launch.

    is_plain: the launcher has done nothing else but take views."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.steps: list[tuple] = []
        self.is_plain = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _EMPTY:
            self.made.append(result)
        elif function is torch.ops.aten.clone.default:
            self.made.append(result)
            self.steps.append((args[0], result))
        else:
            self.is_plain &= function.is_view or function is torch.ops.aten._unsafe_view.default
        return result

    def note(self, compiled: Any, grid: tuple[int, ...], arguments: tuple, constexprs: tuple) -> None:
        if not isinstance(compiled, triton.compiler.CompiledKernel):  # another thread is still compiling it
            raise _NoPlan
        self.steps.append((compiled, grid, arguments, constexprs))


def state(device_type: str) -> tuple | None:
    """(driver, device, stream, launcher, CALLS_BEFORE) for a launch by csrc/plans.cpp at this moment; None where
    launches must go through Triton's JIT."""
    if INTERPRETED:
        return None
    driver = drivers.active
    found = launcher if device_type == "cpu" or launcher is not None else _driver_launcher(driver)
    if found is None or needs_jit():
        return None
    device = driver.get_current_device()
    return driver, device, driver.get_current_stream(device), found, CALLS_BEFORE


@functools.lru_cache(maxsize=4)
def _driver_launcher(driver: Any) -> int | None:
    """The address of the launch function in the GPU's driver library, which Triton has loaded; None if it has not."""
    name, libraries = _LIBRARIES[driver.get_current_target().backend]
    for library in libraries:
        try:
            function = getattr(ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def launcher_of(name: str) -> Callable[..., Any]:
    """The operator's launcher."""
    from .. import triton_kernels

    return getattr(triton_kernels, name)


def record(name: str, arguments: tuple) -> Plan | None:
    """The plan of an operator's call, without launching anything; None where a plan can't repeat the call."""
    recording = _Recording()
    try:
        arguments = _without_aliases(arguments)
        recorder.note = recording.note
        with recording:
            results = launcher_of(name)(*arguments)
        return _plan(recording, _tensors(arguments), results)
    except _NoPlan:
        return None
    finally:
        recorder.note = None


def _tensors(arguments: Iterable) -> list[Tensor]:
    """The tensors among the arguments, and in lists of them, in order."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, list):
            found += _tensors(argument)
    return found


def _without_aliases(arguments: tuple) -> tuple:
    """The arguments, with uninitialised tensors for those that share memory: an address must belong to one argument."""
    storages = Counter(map(_storage, _tensors(arguments)))

    def alone(argument: Any) -> Any:
        if isinstance(argument, list):
            return list(map(alone, argument))
        return _like(argument) if isinstance(argument, Tensor) and storages[_storage(argument)] > 1 else argument

    return tuple(map(alone, arguments))


def _like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the same shape, strides and alignment."""
    if tensor.untyped_storage().nbytes() >= 2**31:
        raise _NoPlan  # AMD's kernels are specialised on storages that large
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    return tensor.new_empty(offset + extent).as_strided(tensor.shape, tensor.stride(), offset)


def _plan(recording: _Recording, inputs: list[Tensor], results: Any) -> Plan:
    """The plan of what was recorded, with tensors numbered in the order of `slots`."""
    returns_list = isinstance(results, list)
    results = results if isinstance(results, (tuple, list)) else (results,)
    outputs = [result for result in results if result is not None]
    made = {_storage(tensor): tensor for tensor in recording.made}
    for output in outputs:
        if made.pop(_storage(output), None) is None or output.nbytes != output.untyped_storage().nbytes():
            raise _NoPlan  # it is a view, an argument, or smaller than its storage
    slots = [*inputs, *outputs, *made.values()]
    place = {_storage(slot): i for i, slot in enumerate(slots)}
    if not recording.is_plain or len(place) < len(slots):
        raise _NoPlan
    steps, launches = [], []
    for step in recording.steps:
        if len(step) == 2:
            steps.append(_copy(place, slots, *step))
            continue
        compiled, grid, arguments, constexprs = step
        steps.append(_launch(place, slots, compiled, grid, arguments))
        launches.append((compiled, [_parameter(place, slots, a) for a in (*arguments, *constexprs)]))
    layouts = [None if result is None else _layout(result) for result in results]
    return Plan(layouts, returns_list, [_layout(temporary) for temporary in made.values()], steps, launches)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _copy(place: dict[int, int], slots: list[Tensor], source: Tensor, target: Tensor) -> tuple:
    origin = place[_storage(source)]
    offset = source.storage_offset() - slots[origin].storage_offset()
    return "copy", place[_storage(target)], origin, offset, tuple(source.shape), source.stride()


def _launch(place: dict[int, int], slots: list[Tensor], compiled: Any, grid: tuple, arguments: tuple) -> tuple:
    metadata = compiled.metadata
    takes_more = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if any(getattr(metadata, name, None) for name in takes_more) or getattr(metadata, "num_ctas", 1) != 1:
        raise _NoPlan
    compiled.run  # noqa: B018  loads the function
    parameters = [_parameter(place, slots, value) for value in _flat(arguments, compiled.src.signature.values())]
    grid = (*grid, 1, 1)[:3]
    threads = metadata.target.warp_size * metadata.num_warps
    return "launch", compiled.function, grid, threads, metadata.shared, parameters


def _flat(arguments: Iterable, types: Iterable) -> Iterable[Any]:
    """The arguments that the compiled kernel takes, out of their tuples, without those that it is specialised on."""
    for argument, kind in zip(arguments, types, strict=False):  # the types of constexprs follow those of the arguments
        if isinstance(kind, tuple):
            yield from _flat(argument, kind)
        elif kind != "constexpr":
            if not kind.startswith(("*", "i", "u")):
                raise _NoPlan  # a float's bits depend on the type
            yield argument


def _parameter(place: dict[int, int], slots: list[Tensor], value: Any) -> tuple[int, Any]:
    if isinstance(value, tuple):
        return _TUPLE, tuple(_parameter(place, slots, part) for part in value)
    if not isinstance(value, Tensor):
        return -1, value
    slot = place[_storage(value)]
    return slot, value.data_ptr() - slots[slot].data_ptr()


_known: dict[tuple, list] = {}  # by key: the number of calls, and the plan or None
_MOST_KEYS = 4096


def call(name: str, *arguments: Any) -> Any:
    """Calls an operator by its launch plan; csrc/plans.cpp does the same where there is the extension."""
    driver = drivers.active
    device = driver.get_current_device()
    tensors = _tensors(arguments)
    # meta tensors have no memory; and for tensors on another device the launcher makes that device current
    if needs_jit() or tensors[0].is_meta or tensors[0].device.index not in (None, device):
        return launcher_of(name)(*arguments)
    is_hip = backend() == "hip"
    key = name, driver, device, *(_trait(a, is_hip) for a in arguments)
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST_KEYS:
            _known.clear()
        known = _known[key] = [0, None]
    known[0] += 1
    if known[0] == CALLS_BEFORE + 1:
        known[1] = record(name, arguments)
    if known[1] is None:
        return launcher_of(name)(*arguments)
    return _run(known[1], tensors, driver.get_current_stream(device))


def _trait(argument: Any, is_hip: bool) -> Any:
    """What of an argument its launcher and Triton's specialisation look at."""
    if isinstance(argument, list):
        return tuple(_trait(part, is_hip) for part in argument)
    if not isinstance(argument, Tensor):
        return argument
    is_large = is_hip and argument.untyped_storage().nbytes() >= 2**31
    return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16, is_large


def _run(plan: Plan, slots: list[Tensor], stream: int) -> Any:
    """Repeats the plan with the call's tensors. Returns the operator's results."""
    device = slots[0].device
    made = [
        layout and torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=device)
        for layout in (*plan.results, *plan.temporaries)
    ]
    slots = [*slots, *(tensor for tensor in made if tensor is not None)]
    launches = iter(plan.launches)
    for kind, *step in plan.steps:
        if kind == "copy":
            to, origin, offset, shape, strides = step
            slots[to].copy_(slots[origin].as_strided(shape, strides, slots[origin].storage_offset() + offset))
            continue
        compiled, parameters = next(launches)
        values = [_value(slots, *parameter) for parameter in parameters]
        compiled.run(*step[1], stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
    results = made[: len(plan.results)]
    if plan.returns_list:
        return results
    return results[0] if len(results) == 1 else tuple(results)


def _value(slots: list[Tensor], slot: int, value: Any) -> Any:
    """What Triton's own launcher takes for a parameter."""
    if slot == _TUPLE:
        return tuple(_value(slots, *part) for part in value)
    return value if slot < 0 else _at(slots[slot], value)


def _at(tensor: Tensor, offset: int) -> Tensor:
    """A view whose address is `offset` bytes after the tensor's."""
    if offset == 0:
        return tensor
    return tensor.as_strided((), (), tensor.storage_offset() + offset // tensor.element_size())
