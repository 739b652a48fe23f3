"""Compiles the clip's Triton kernels for every architecture without a GPU, and prints what became of them as JSON.

A process of its own: in a test's Triton's decorators may have made interpreted functions.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator

import torch
import triton
from fastnorm.triton_kernels import agc, launch, multi_tensor, tables

from bench.codegen import CompilingDriver
from bench.machine_code import TARGETS, resources

META = torch.device("meta")
UNITS = (64, 4096, 20000)  # several units a program, one, and one that does not fit on chip


def calls(everything: bool) -> None:
    """Every kernel for 16- and 32-bit elements; on request for all dtypes and norms."""
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16, torch.float64) if everything else ())):
        table = tables.Table([tables.Entry(1 << 20, 1 << 20, dtype)], META)
        multi_tensor.norms_of(table, 2.0, torch.float32)
        multi_tensor.change(table, torch.empty((), device=META))
        multi_tensor.change(table, None, 1.0)
        for length in UNITS:
            pair = agc.Pair(tables.Entry(1 << 20, 64 * length, dtype), tables.Entry(1 << 30, 64 * length, dtype), 64)
            for group in agc.parts((pair,), META)[0][0]:
                agc.launch_group(group, 0.01, 1e-3, 2.0)
    table = tables.Table([tables.Entry(1 << 20, 1 << 20, torch.float32)], META)
    for p in (1.0, float("inf"), 3.0) if everything else ():
        multi_tensor.norms_of(table, p, torch.float32)
    norms, sums = multi_tensor.norms_of(table, 2.0, torch.float32)
    multi_tensor.clip_results(norms, sums, 2.0, 1.0)


def compiled(target: str) -> Iterator[dict]:
    found = []

    def note(*, key, fn, compile, **_) -> None:
        found.append((fn.name, fn.jit_function.device_caches[compile["device"]][0][key]))

    triton.knobs.runtime.jit_post_compile_hook = note
    triton.runtime.driver.set_active(CompilingDriver(target))
    calls(everything=target == "sm_90")
    for name, kernel in found:
        yield {
            "target": target, "kernel": name.strip("_"), "shared": kernel.metadata.shared,
            "widest": widest(kernel.asm), **dataclasses.asdict(resources(kernel)),
        }  # fmt: skip


def widest(asm: dict[str, str]) -> dict[str, int]:
    """Bytes of the widest load and the widest store of a thread."""
    if "ptx" in asm:
        found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\s", asm["ptx"])
        sizes = [(kind, int(vector or 1) * int(bits) // 8) for kind, vector, bits in found]
    else:
        found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", asm["amdgcn"])
        sizes = [(kind, 16 if what in ("dwordx4", "b128") else 8) for kind, what in found]
    return {kind: max((size for k, size in sizes if k[0] == kind[0]), default=0) for kind in ("load", "store")}


if __name__ == "__main__":
    launch.on_device = lambda tensor: contextlib.nullcontext()
    tables.upload = lambda values, dtype, device: torch.empty(len(values), dtype=dtype, device=device)
    json.dump([kernel for target in TARGETS for kernel in compiled(target)], sys.stdout)
