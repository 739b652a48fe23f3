"""Triton kernels compiled without a GPU: launched by their own launchers, on a driver that compiles and then does
nothing. What is judged here is what would run."""

import itertools
import multiprocessing
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton

from . import machine_code, shipped
from .problem import LIGER, OURS, Problem
from .providers import one_line

MULTIPROCESSORS = 132
ROW_POINTERS = ("x_ptr", "residual_ptr", "y_ptr", "h_ptr", "dy_ptr", "dh_ptr", "dx_ptr", "dresidual_ptr")
LIGER_ROW_POINTERS = ("r_ptr", "s_ptr", "ds_out_ptr", "upstream_ptr")
STORED_ROW_POINTERS = ("y_ptr", "dx_ptr")


@dataclass(frozen=True)
class Kernel:
    """What became of one kernel. Bytes, but for the counts of registers (of a thread) and warps."""

    provider: str
    target: str
    operation: str
    kernel: str
    dtype: str
    cols: int | None  # None where the compiled code serves rows of any length
    warps: int
    registers: int
    spilled: int
    shared: int
    resident_warps: int  # on a multiprocessor
    access: int  # the narrowest through a pointer to rows; where pointers are not told apart, the widest
    short_products: int  # 32-bit multiplications, which no address of a row may have
    hash: str


@dataclass(frozen=True)
class Failure:
    """What another library's call raised."""

    problem: Problem
    reason: str


class CompilingDriver:
    """Stands in for Triton's driver: kernels are specialised and compiled as for the device, and never run."""

    def __init__(self, target: str):
        self.target, self.name = machine_code.TARGETS[target][0], target
        self.handles = itertools.count(1)  # what Triton takes for the driver's function pointers
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20, "multiprocessor_count": MULTIPROCESSORS},
            load_binary=lambda name, binary, shared, device: (object(), next(self.handles), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.name  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")  # so that calls with CPU tensors can be timed to their launches

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: None


def compile_problem(problem: Problem) -> list[Kernel]:
    """The kernels of one call; of ours, without those that this process has compiled before."""
    kernels: list[Kernel] = []

    def note(*, key, fn, compile, **_) -> None:
        cache = fn.jit_function.device_caches[compile["device"]][0]
        kernels.append(_describe(problem, fn.name, cache[key], compile["signature"], _constants(compile, fn)))
        if problem.provider != OURS:
            cache.pop(key)  # another width has the same code, and more or fewer idle lanes

    triton.knobs.runtime.jit_post_compile_hook = note
    triton.runtime.driver.set_active(CompilingDriver(problem.target))
    if problem.provider == LIGER:
        from . import liger_launches  # the library is optional

        liger_launches.call(problem)
    else:
        shipped.call(problem)
    return kernels


def _constants(compile: dict[str, Any], fn: Any) -> dict[str, Any]:
    names = fn.jit_function.arg_names
    return {names[place[0]]: value for place, value in compile["constants"].items() if len(place) == 1}


def _describe(
    problem: Problem, name: str, compiled: Any, signature: dict[str, str], constants: dict[str, Any]
) -> Kernel:
    (registers, spilled), metadata = machine_code.resources(compiled), compiled.metadata
    multiprocessor = machine_code.TARGETS[problem.target][1]
    cols = constants["TILES"][0][0] if "TILES" in constants else constants.get("N_COLS")
    name = name.strip("_").removesuffix("_kernel")
    kind = constants.get("KIND", "squares")  # of norm
    name = name if kind == "squares" else f"{name}_{kind}"
    return Kernel(
        provider=problem.provider, target=problem.target, operation=problem.operation, kernel=name,
        dtype=problem.dtype, cols=problem.cols if problem.provider == LIGER else cols,
        warps=metadata.num_warps, registers=registers, spilled=spilled, shared=metadata.shared,
        resident_warps=multiprocessor.resident_warps(metadata.num_warps, registers, metadata.shared),
        access=_row_access(machine_code.access_bytes(compiled, signature), signature),
        short_products=len(re.findall(r"arith\.muli .*i32", compiled.asm["ttir"])), hash=metadata.hash,
    )


def _row_access(widths: dict[str, int], signature: dict[str, str]) -> int:
    """The narrowest access to what a kernel walks over, and not to a statistic or a table."""
    widths = {name.lower(): width for name, width in widths.items()}
    names = {name.lower() for name in signature}
    stores = not names.isdisjoint(STORED_ROW_POINTERS) or ("addresses_ptr" in names and "partials_ptr" not in names)
    row_pointers = (*ROW_POINTERS, *LIGER_ROW_POINTERS, "load", *["store"] * stores)
    return min([widths[name] for name in row_pointers if name in widths] or widths.values())


def compile_all(problems: Iterable[Problem], jobs: int = 1) -> Iterator[Kernel | Failure]:
    """Every distinct kernel of the problems, in their order, compiled by `jobs` processes."""
    seen = set()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        calls = pool.imap(_attempt, problems)
        for found in itertools.chain.from_iterable(calls):
            if (key := _identity(found)) not in seen:
                seen.add(key)
                yield found


def _identity(found: Kernel | Failure) -> Hashable:
    if isinstance(found, Failure):
        return found
    shape = () if found.provider == OURS else (found.operation, found.cols)
    return found.target, found.hash, *shape


def _attempt(problem: Problem) -> list[Kernel | Failure]:
    try:
        return compile_problem(problem)
    except Exception as error:  # whatever a foreign library raises is shown; of ours it is an error
        if problem.provider == OURS:
            raise
        return [Failure(problem, one_line(error))]
