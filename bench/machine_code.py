"""What compiled code tells without a GPU: registers, spills, access widths, warps that fit on a multiprocessor."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Multiprocessor:
    """What bounds the warps that are resident at once. A multiprocessor is what the driver counts: on RDNA, a pair of
    compute units."""

    warps: int  # of each of its four schedulers
    registers: int  # of each lane of a scheduler
    granule: int  # registers are handed out in multiples of it
    programs: int
    shared: int  # bytes

    def resident_warps(self, warps: int, registers: int, shared: int) -> int:
        """Warps that are resident when every program has `warps` of them and `shared` bytes."""
        taken = triton.cdiv(max(registers, 1), self.granule) * self.granule
        slots = 4 * min(self.warps, self.registers // taken)
        reserved = shared + 1024  # CUDA keeps that much of every block for itself
        return warps * min(slots // warps, self.programs, self.shared // reserved)


KIB = 1024
# CUDA C++ programming guide, "Technical specifications per compute capability"; AMD's CDNA 3 and RDNA 3 ISA guides
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Multiprocessor(16, 512, 8, 32, 164 * KIB)),
    "sm_90": (GPUTarget("cuda", 90, 32), Multiprocessor(16, 512, 8, 32, 228 * KIB)),
    "sm_100": (GPUTarget("cuda", 100, 32), Multiprocessor(16, 512, 8, 32, 228 * KIB)),
    "sm_120": (GPUTarget("cuda", 120, 32), Multiprocessor(12, 512, 8, 24, 100 * KIB)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Multiprocessor(8, 512, 8, 32, 64 * KIB)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Multiprocessor(16, 1536, 24, 64, 128 * KIB)),
}


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers of a thread, and its bytes that did not fit into them, as the assembler reports both."""
    if "cubin" in kernel.asm:
        report = _ask(triton.knobs.nvidia.cuobjdump.path, kernel.asm["cubin"], "-res-usage")
        count = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
        return count["REG"], count["STACK"] + count["LOCAL"]
    count = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\n", kernel.asm["amdgcn"])}
    scratch = max(count["private_segment_fixed_size"], 4 * count["vgpr_spill_count"])
    return count["vgpr_count"], scratch + 4 * count["sgpr_spill_count"]


def _ask(tool: str, cubin: bytes, *options: str) -> str:
    """What one of CUDA's tools prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def access_bytes(kernel: CompiledKernel, signature: dict[str, str]) -> dict[str, int]:
    """Bytes of the narrowest access through each pointer, by its parameter's name. Where pointers are not told apart,
    which are those of AMD's code and those that a table holds, of the widest "load" and the widest "store"."""
    if "ptx" in kernel.asm:
        # a tuple's elements are parameters of their own
        kinds = [(name, k) for name, kind in signature.items() for k in (kind if isinstance(kind, tuple) else (kind,))]
        parameters = [(name, kind) for name, kind in kinds if kind != "constexpr"]
        pointers = {i: name for i, (name, kind) in enumerate(parameters) if kind.startswith("*")}
        accesses = _ptx_accesses(kernel.asm["ptx"], pointers)
    else:
        found = _AMD_ACCESS.findall(kernel.asm["amdgcn"])
        accesses = ((direction, _amd_bytes(kind)) for direction, kind in found)
    widths: dict[str, int] = {}
    for name, width in accesses:
        widths[name] = (max if name in ("load", "store") else min)(width, widths.get(name, width))
    return widths


def _amd_bytes(kind: str) -> int:
    """Of an access: dwordx4 is what newer targets call b128."""
    if words := re.fullmatch(r"dword(?:x(\d))?", kind):
        return 4 * int(words[1] or 1)
    if "short" in kind or "byte" in kind:
        return 2 if "short" in kind else 1
    return int(re.findall(r"\d+", kind)[0]) // 8


_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\s[^;]*?\[\s*(%rd\d+)")


def _ptx_accesses(ptx: str, pointers: dict[int, str]) -> Iterator[tuple[str, int]]:
    """(parameter, bytes) of every access to global memory, its address traced back to the pointer it began as; "load"
    or "store" for the parameter where the address itself was in memory."""
    origin = {reg: pointers[int(i)] for reg, i in _PARAMETER.findall(ptx) if int(i) in pointers}
    moves = [re.findall(r"%rd\d+", line) for line in ptx.splitlines() if "[" not in line and "%rd" in line]
    known = -1
    while known != len(origin):  # once more for addresses that a loop carries
        known = len(origin)
        for move in moves:
            for source in move[1:]:
                if source in origin:
                    origin.setdefault(move[0], origin[source])
    for kind, vector, bits, address in _ACCESS.findall(ptx):
        yield origin.get(address, {"ld": "load", "st": "store"}[kind]), int(vector or 1) * int(bits) // 8
