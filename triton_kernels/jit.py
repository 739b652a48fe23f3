"""The decorator of kernels that are launched: repeated launches cost the host less than through triton.jit alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton

from . import launch


class _Recorder(threading.local):
    """Records this thread's launches for plans.py: while `note` is set, launches are not done, but reported to
    note(compiled, grid, arguments, constexprs)."""

    note: Callable[[Any, tuple[int, ...], tuple, tuple], None] | None = None


recorder = _Recorder()


class Kernel(triton.JITFunction):
    """A JITFunction that caches compiled kernels by what Triton specialises on.

    The first launch with a key goes through Triton's JIT, which compiles; later ones call the compiled kernel directly.
    They skip Triton's check for changed globals. Launches with a profiler's hook, in debug mode, or with a grid that is
    a function always go through the JIT.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.plans: dict[tuple, tuple[Any, tuple]] = {}

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        """kernel[grid](*arguments, **constants); constants: constexprs that are not arguments, and launch options."""
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
            if isinstance(compiled, triton.compiler.CompiledKernel):  # not while another thread still compiles it
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
        """The values of the constexprs, which follow the arguments in a compiled kernel's parameters."""
        return tuple(constants[name] for name in self.arg_names[len(arguments) :])


def needs_jit() -> bool:
    """Whether launches must go through Triton's JIT: a profiler or debugger watches them or changes the compilation."""
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(before, "calls", before)
        or getattr(after, "calls", after)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def traits(arguments: tuple, is_hip: bool) -> list:
    """What Triton specialises a kernel on, for all arguments.

    Of a tensor: its dtype, whether its address is a multiple of 16, and on AMD's cards whether its storage has less
    than 2 GiB. Of an integer: its width, whether it is 1, and whether it is a multiple of 16.
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
        else:  # None and dtypes; with the class, as True == 1.0
            found.append((argument.__class__, argument))
    return found


def jit(function: Callable | None = None, **options: Any) -> Any:
    """triton.jit for kernels that are launched; functions that kernels call are decorated with triton.jit itself."""
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if launch.INTERPRETED else Kernel(function, **options)
