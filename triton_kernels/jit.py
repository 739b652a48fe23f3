"""Kernels that are launched again and again: what the host does for each launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton

from . import launch


class _Recorder(threading.local):
    """Who is told of this thread's launches, note(compiled, grid, arguments, constexprs), in the device's place."""

    note: Callable[[Any, tuple[int, ...], tuple, tuple], None] | None = None


recorder = _Recorder()


class Kernel(triton.JITFunction):
    """A kernel whose repeated launches cost the host less than Triton's JIT takes for each.

    The JIT compiles and launches it the first time; the compiled kernel is cached by the specialisation key, and later
    launches with that key call it directly. Triton's check for changed globals is the JIT's alone. So are launches with
    a profiler's hook, in debug mode, and with a grid to be computed.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.plans: dict[tuple, tuple[Any, tuple]] = {}

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        """kernel[grid](*arguments, **constants): constants are all constexprs, by name, and the launch options."""
        if recorder.note is not None:
            compiled = super().run(*arguments, grid=grid, warmup=True, **constants)
            recorder.note(compiled, grid, arguments, self._constexprs(arguments, constants))
            return compiled
        if warmup or self.pre_run_hooks or grid.__class__ is not tuple or needs_jit():
            return super().run(*arguments, grid=grid, warmup=warmup, **constants)
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (driver, device, *constants, *constants.values(), *traits(arguments, launch.backend() == "hip"))
        plan = self.plans.get(key)
        if plan is None:
            compiled = super().run(*arguments, grid=grid, warmup=False, **constants)
            if isinstance(compiled, triton.compiler.CompiledKernel):  # and not one that other threads still compile
                self.plans[key] = compiled, self._constexprs(arguments, constants)
            return compiled
        compiled, constexprs = plan
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constexprs
        )
        return compiled

    def _constexprs(self, arguments: tuple, constants: dict[str, Any]) -> tuple:
        """What a compiled kernel is given for its constexprs, which follow the arguments."""
        return tuple(constants[name] for name in self.arg_names[len(arguments) :])


def needs_jit() -> bool:
    """Whether somebody watches launches or changes how kernels are compiled, as profilers and debuggers do."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(before, "calls", before)
        or getattr(after, "calls", after)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def traits(arguments: tuple, is_hip: bool) -> list:
    """What Triton specialises a kernel on: of a tensor its dtype, whether its address is a multiple of 16 and, on AMD's
    cards, whether its storage ends below 2 GiB; of an integer its width, whether it is 1, and whether a multiple of 16.
    """
    found: list = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument.dtype)
            found.append(argument.data_ptr() % 16 == 0)
            if is_hip:
                found.append(argument.untyped_storage().size() < 2**31)
        elif argument.__class__ is int:
            kind = "1" if argument == 1 else "i" if argument % 16 else "i16"
            if not -(2**31) <= argument < 2**31:
                kind += " wide" if argument < 2**63 else " unsigned"
            found.append(kind)
        elif argument.__class__ is tuple:
            found.append(len(argument))
            found += traits(argument, is_hip)
        else:  # None and dtypes; and no True for 1.0
            found.append((argument.__class__, argument))
    return found


def jit(function: Callable | None = None, **options: Any) -> Any:
    """triton.jit, for the kernels that are launched."""
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if launch.INTERPRETED else Kernel(function, **options)
