"""Compile every shipped configuration of the Triton kernels without a GPU; read spills and access widths off the code.

    python -m bench.codegen --targets sm_90,gfx942 --widths 4096,8192 --dtypes bf16

The kernels are launched by their own launchers, on tensors without data and on a driver that compiles and then does
nothing: what is judged here is what would run.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from tabulate import tabulate
from torch import Tensor

from fastnorm import triton_kernels

from .machine_code import TARGETS, access_bytes, resources

MODEL_WIDTHS = (768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)
NARROW_WIDTHS = (64, 80, 96, 128, 256)  # one attention head
LONG_WIDTHS = (32768, 65536)
ODD_WIDTHS = (1793, 3585, 14337)  # take most registers, and 16-byte accesses are not to be had
DIRECTIONS = ("forward", "backward")
OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
# (N, C, S): ResNet-50's and a diffusion UNet's
IMAGES = {
    "batch_norm": ((32, 256, 3136), (32, 1024, 196), (32, 2048, 49)),  # larger ones are served by the same code
    "group_norm": ((2, 320, 4096), (2, 1280, 64)),
}
GROUPS = 32
ROWS = 8192
MULTIPROCESSORS = 132
ROW_POINTERS = ("x_ptr", "residual_ptr", "y_ptr", "h_ptr", "dy_ptr", "dh_ptr", "dx_ptr", "dresidual_ptr")


@dataclass(frozen=True)
class Types:
    """Of x, y and their gradients; of the residual stream; of the parameters and their gradients."""

    x: torch.dtype
    stream: torch.dtype
    parameters: torch.dtype


DTYPES = {
    "bf16": Types(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": Types(torch.float16, torch.float16, torch.float16),
    "fp32": Types(torch.float32, torch.float32, torch.float32),
    "fp64": Types(torch.float64, torch.float64, torch.float64),
    "mixed": Types(torch.bfloat16, torch.float32, torch.float32),  # bf16 activations on a float32 residual stream
}


@dataclass(frozen=True)
class Problem:
    """One call of a launcher."""

    target: str
    operation: str
    direction: str
    dtype: str
    cols: int | None
    image: tuple[int, int, int] | None = None  # of batch_norm and group_norm: (N, C, S)
    channels_last: bool = False


@dataclass(frozen=True)
class Kernel:
    """What became of one kernel. Bytes, but for the counts of registers (of a thread) and warps."""

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


class CompilingDriver:
    """Stands in for Triton's driver: kernels are specialised and compiled as for the device, and never run."""

    def __init__(self, target: str):
        self.target, self.name = TARGETS[target][0], target
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**20, "multiprocessor_count": MULTIPROCESSORS},
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.name  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device) -> int:
        return 0

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: None


def compile_problem(problem: Problem) -> list[Kernel]:
    """The kernels of one call; without those that this process has compiled before."""
    kernels: list[Kernel] = []

    def note(*, key, fn, compile, **_) -> None:
        compiled = fn.jit_function.device_caches[compile["device"]][0][key]
        constants = dict(zip(fn.jit_function.arg_names, _by_position(compile["constants"], fn), strict=True))
        kernels.append(_describe(problem, fn.name, compiled, compile["signature"], constants.get("N_COLS")))

    triton.knobs.runtime.jit_post_compile_hook = note
    triton.runtime.driver.set_active(CompilingDriver(problem.target))
    _call(problem)
    return kernels


def _by_position(constants: dict[tuple[int], object], fn) -> list[object]:
    return [constants.get((i,)) for i in range(len(fn.jit_function.arg_names))]


def _describe(problem: Problem, name: str, compiled, signature: dict[str, str], cols: int | None) -> Kernel:
    used, metadata = resources(compiled), compiled.metadata
    widths = access_bytes(compiled, signature)
    stores_rows = not signature.keys().isdisjoint(("y_ptr", "dx_ptr"))
    rows = [widths[name] for name in (*ROW_POINTERS, "load", *["store"] * stores_rows) if name in widths]
    return Kernel(
        target=problem.target,
        operation=problem.operation,
        kernel=name.strip("_").removesuffix("_kernel"),
        dtype=problem.dtype,
        cols=cols,
        warps=metadata.num_warps,
        registers=used.registers,
        spilled=used.spilled,
        shared=metadata.shared,
        resident_warps=TARGETS[problem.target][1].resident_warps(metadata.num_warps, used.registers, metadata.shared),
        access=min(rows or widths.values()),
        short_products=len(re.findall(r"arith\.muli .*i32", compiled.asm["ttir"])),
        hash=metadata.hash,
    )


def _call(problem: Problem) -> None:
    """Call the launcher as fastnorm does, for a training step with weight and bias."""
    if problem.image is not None:
        return _call_with_image(problem)
    types = DTYPES[problem.dtype]
    adds, centers = problem.operation.startswith("add_"), problem.operation.endswith("layer_norm")

    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(ROWS, problem.cols, dtype=dtype, device="meta")

    parameter = torch.empty(problem.cols, dtype=types.parameters, device="meta")
    statistic = torch.empty(ROWS, dtype=torch.promote_types(types.x, torch.float32), device="meta")
    zero_centered, cast, eps = [False], [] if centers else [None], [1e-6]
    if problem.direction == "forward":
        stream = [rows(types.stream)] if adds else []
        affine = [parameter, parameter] if centers else [parameter]
        dtypes = [types.x, types.stream] if adds else [types.x]
        arguments = [rows(types.x), *stream, *affine, *eps, *zero_centered, *cast, *dtypes]
    else:
        h = [rows(types.stream), rows(types.stream)] if adds else [rows(types.x)]
        statistics = [statistic, statistic] if centers else [statistic]
        dtypes = [types.x, types.stream] if adds else []
        dtypes += [types.parameters, types.parameters] if centers else [types.parameters]
        arguments = [rows(types.x), *h, parameter, *statistics, *zero_centered, *cast, *dtypes]
    getattr(triton_kernels, f"{problem.operation}_{problem.direction}")(*arguments)


def _call_with_image(problem: Problem) -> None:
    """batch_norm and group_norm, plain and with all that is fused into them, and batch_norm's evaluation."""
    types, (samples, channels, cols), last = DTYPES[problem.dtype], problem.image, problem.channels_last
    shape = (samples, cols, channels) if last else (samples, channels, cols)
    if last and problem.operation == "batch_norm":
        shape = (1, samples * cols, channels)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    stat = torch.promote_types(types.x, torch.float32)
    x, residual, w = empty(types.x, *shape), empty(types.stream, *shape), empty(types.parameters, channels)
    grads = types.parameters, types.parameters
    launchers = [getattr(triton_kernels, f"{problem.operation}_{name}") for name in DIRECTIONS]
    for is_fused in (False, True):
        if problem.operation == "group_norm":
            statistic, options = empty(stat, samples, GROUPS), (last, is_fused)
            arguments = (x, GROUPS, w, w, 1e-5, *options, types.x), (x, x, GROUPS, w, w, statistic, statistic, *options)
        else:
            statistic, mask = empty(stat, channels), empty(torch.uint8, *shape[:-1], triton.cdiv(shape[-1], 8))
            added, dresidual = (residual, types.stream) if is_fused else (None, None)
            running = w, w, w, w, None, 0.1, 1e-5
            arguments = (x, added, *running, last, is_fused, types.x), (
                x, mask if is_fused else None, x, w, statistic, statistic, True, last, dresidual,
            )  # fmt: skip
            triton_kernels.batch_norm_evaluate(x, added, w, w, w, w, 1e-5, last, is_fused, False, types.x)
        given = arguments[DIRECTIONS.index(problem.direction)]
        launchers[DIRECTIONS.index(problem.direction)](*given, *(grads if problem.direction == "backward" else ()))


def problems_of(targets: tuple, operations: tuple, dtypes: tuple, widths: tuple) -> list[Problem]:
    """Those of the row norms at all widths, and of the channel norms at all images in both layouts."""
    rows = itertools.product(targets, [op for op in operations if op in OPERATIONS], DIRECTIONS, dtypes, widths)
    images = [(op, image) for op in operations for image in IMAGES.get(op, ())]
    channels = itertools.product(targets, images, DIRECTIONS, dtypes, (False, True))
    return [Problem(*each) for each in rows] + [
        Problem(target, op, direction, dtype, None, image, last)
        for target, (op, image), direction, dtype, last in channels
    ]


def compile_all(problems: Iterable[Problem], jobs: int = 1) -> Iterator[Kernel]:
    """Every distinct kernel of the problems, in their order, compiled by `jobs` processes."""
    seen = set()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for kernel in itertools.chain.from_iterable(pool.imap(compile_problem, problems)):
            if (kernel.target, kernel.hash) not in seen:
                seen.add((kernel.target, kernel.hash))
                yield kernel


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; 1 if a kernel spills, else 0."""
    options = _parser().parse_args(arguments)
    if triton_kernels.INTERPRETED:
        sys.exit("python -m bench.codegen compiles the kernels, and TRITON_INTERPRET=1 interprets them: unset it")
    problems = problems_of(options.targets, options.operations, options.dtypes, options.widths)
    kernels = list(compile_all(problems, options.jobs))
    for target in options.targets:
        print(f"\n{target}\n{_table(kernel for kernel in kernels if kernel.target == target)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    spilling = [kernel for kernel in kernels if kernel.spilled]
    print(f"\n{len(kernels)} kernels from {len(problems)} calls, {len(spilling)} of them spill")
    for kernel in spilling:
        print(f"  {kernel.target} {kernel.kernel} {kernel.dtype} {kernel.cols or 'any'}: {kernel.spilled} bytes")
    return int(bool(spilling))


HEADERS = {
    "operation": "operation",
    "kernel": "kernel",
    "dtype": "dtype",
    "cols": "width",
    "warps": "warps",
    "registers": "registers",
    "spilled": "spilled",
    "shared": "shared",
    "resident_warps": "resident warps",
    "access": "access",
}


def _table(kernels: Iterable[Kernel]) -> str:
    lines = [[getattr(kernel, field) for field in HEADERS] for kernel in kernels]
    return tabulate(lines, HEADERS.values(), missingval="any")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.partition("\n")[0])
    widths = (*NARROW_WIDTHS, *MODEL_WIDTHS, *LONG_WIDTHS, *ODD_WIDTHS)

    def add(flag: str, parse: Callable, default: tuple, text: str) -> None:
        known = ",".join(map(str, default))
        parser.add_argument(flag, type=parse, default=default, metavar="LIST", help=f"{text} (default: {known})")

    add("--targets", functools.partial(_names, TARGETS), tuple(TARGETS), "GPU architectures")
    operations = (*OPERATIONS, *IMAGES)
    add("--operations", functools.partial(_names, operations), operations, "operations, forward and backward")
    add("--dtypes", functools.partial(_names, DTYPES), ("bf16", "fp32", "mixed"), f"of {','.join(DTYPES)}")
    add("--widths", _integers, widths, "columns of a row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    return parser


def _names(known: Iterable[str], text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return names


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
