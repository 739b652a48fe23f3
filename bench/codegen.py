"""`python -m bench codegen`: what the compilers make of every shipped Triton kernel, with Liger-Kernel's beside them.

No GPU is needed. Exit status 1 if a kernel of ours keeps registers in memory.
"""

import argparse
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm

import fastnorm
from fastnorm import triton_kernels

from .arguments import add_output, names, positive
from .compiled import Failure, Kernel, compile_all
from .machine_code import TARGETS
from .problem import (
    CLIPS,
    DTYPES,
    IMAGES,
    LIGER,
    LONG_WIDTHS,
    MODEL_WIDTHS,
    NARROW_WIDTHS,
    ODD_WIDTHS,
    OPERATIONS,
    OURS,
    Problem,
    beside,
    problems_of,
)

PROVIDERS = (OURS, LIGER)
DEFAULTS = {
    "targets": tuple(TARGETS),
    "operations": (*OPERATIONS, *IMAGES, *CLIPS),
    "dtypes": ("bf16", "fp32", "mixed"),
    "widths": (*NARROW_WIDTHS, *MODEL_WIDTHS, *LONG_WIDTHS, *ODD_WIDTHS),
    "providers": PROVIDERS,
}
QUICK = DEFAULTS | {
    "targets": ("sm_90", "gfx942"),
    "operations": ("rms_norm", "layer_norm", "clip_grad_norm_"),
    "dtypes": ("bf16",),
    "widths": (4096,),
}
LEGEND = (
    "width: of the rows that the code is for; any where it takes all. registers: of a thread. spilled: bytes of a\n"
    "thread, kept elsewhere for want of registers. shared: bytes of a program. resident: warps on a multiprocessor,\n"
    "by registers and shared memory. access: bytes of the narrowest load or store through a pointer to rows; of the\n"
    "widest where the code does not tell pointers apart (AMD's, and addresses out of a table).\n"
    "instr: machine instructions for each element of x, counted in the disassembly: those of one turn of the loops\n"
    "along the data, a loop inside of them as often as it turns, or of the whole kernel where it has no such loop, on\n"
    "all threads of a program; divided by the elements of x that they handle. Lanes beyond a row's end are not among\n"
    "those. Where the code branches, the way of a full tile counts. What a program does once, before and after such\n"
    "loops, does not. –: work that does not grow with x."
)
COLUMNS = {
    "operation": "operation", "dtype": "dtype", "cols": "width", "provider": "provider",
    "kernel": "kernel", "warps": "warps", "registers": "registers", "spilled": "spilled", "shared": "shared",
    "resident_warps": "resident", "access": "access", "instructions": "instr",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What was compiled, and by what."""

    facts: dict[str, str]
    kernels: list[Kernel]
    failures: list[Failure]

    @property
    def spilling(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.spilled and kernel.provider == OURS]


def main(arguments: Sequence[str]) -> int:
    """Compile, print and write; 1 if a kernel of ours spills, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if triton_kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 interprets the kernels, and this compiles them: unset it")
    chosen = {name: getattr(options, name) or (QUICK if options.quick else DEFAULTS)[name] for name in DEFAULTS}
    found = list(tqdm(compile_all(_problems(**chosen), options.jobs, options.instructions), unit="kernel"))
    kernels = [each for each in found if isinstance(each, Kernel)]
    run = Run(_facts(), kernels, [each for each in found if isinstance(each, Failure)])
    for target in chosen["targets"]:
        print(f"\n{target}\n{_table((k for k in kernels if k.target == target), 'simple')}")
    print("", LEGEND, "", _summary(run, "simple"), sep="\n")
    is_default = all(chosen[name] == DEFAULTS[name] for name in DEFAULTS)
    suffix = "" if is_default else "-quick" if options.quick else "-custom"
    print("wrote", *_write(options.output / f"codegen{suffix}", run), sep="\n  ")
    return int(bool(run.spilling))


def _problems(providers: Collection[str], **selection: Iterable) -> list[Problem]:
    """Ours, each followed by Liger-Kernel's where both are asked for."""
    pairs = [(problem, beside(problem)) for problem in problems_of(**selection)]
    return [problem for pair in pairs for problem in pair if problem and problem.provider in providers]


def _facts() -> dict[str, str]:
    versions = {"fastnorm": fastnorm.__version__, "triton": triton.__version__, "torch": torch.__version__}
    ptxas = triton.knobs.nvidia.ptxas
    try:
        liger = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        liger = "not installed: pip install --no-deps liger-kernel"
    return versions | {"ptxas": ptxas.version, "liger-kernel": liger}


def _table(kernels: Iterable[Kernel], style: str) -> str:
    lines = [[_cell(kernel, field) for field in COLUMNS] for kernel in kernels]
    align = ["left" if field in ("operation", "dtype", "provider", "kernel") else "right" for field in COLUMNS]
    return tabulate(lines, COLUMNS.values(), tablefmt=style, colalign=align, disable_numparse=True)


def _cell(kernel: Kernel, field: str) -> str:
    value = getattr(kernel, field)
    if field == "instructions":
        return "–" if value is None else f"{value:.1f}"
    return "any" if value is None else str(value)


def _summary(run: Run, style: str) -> str:
    """How many kernels there are and which spill, and what of Liger-Kernel's there is not."""
    count = Counter((kernel.provider, kernel.target) for kernel in run.kernels)
    spills = Counter((kernel.provider, kernel.target) for kernel in run.kernels if kernel.spilled)
    lines = [(*key, number, spills[key]) for key, number in count.items()]
    text = [tabulate(sorted(lines), ("provider", "target", "kernels", "of them spill"), tablefmt=style), ""]
    text += [
        f"{k.target} {k.operation} {k.kernel} {k.dtype} {k.cols or 'any'}: spills {k.spilled} bytes"
        for k in run.spilling
    ]
    reasons = Counter(failure.reason for failure in run.failures)
    return "\n".join((*text, *(f"{LIGER}, {number} calls: {reason}" for reason, number in reasons.items())))


def _write(path: Path, run: Run) -> list[Path]:
    """Everything as JSON, a kernel a line; as Markdown the summary, and ours beside Liger-Kernel's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.parent / f"{path.name}.{suffix}" for suffix in ("json", "md")]
    records = [asdict(kernel) for kernel in run.kernels]
    lines = ",\n".join(json.dumps(list(record.values())) for record in records)
    head = json.dumps({"facts": run.facts, "failures": [asdict(failure) for failure in run.failures]}, indent=1)
    fields = json.dumps(list(records[0]) if records else [])
    paths[0].write_text(f'{head[:-2]},\n "fields": {fields},\n "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    rows = [kernel for kernel in run.kernels if kernel.instructions is not None and kernel.dtype == "bf16"]
    tables = [
        f"## {target}\n\n{_table((k for k in rows if k.target == target), 'github')}\n"
        for target in dict.fromkeys(kernel.target for kernel in rows)
    ]
    facts = tabulate(run.facts.items(), tablefmt="plain", disable_numparse=True)
    rest = "All kernels are in the JSON file of the same name; here are those in bf16 whose work grows with x."
    sections = (f"```\n{facts}\n```", _summary(run, "github"), LEGEND, rest, *tables)
    paths[1].write_text("\n\n".join(sections), encoding="utf-8")
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench codegen",
        description="Compile every shipped kernel for every architecture, without a GPU, and read the machine code.",
    )

    def add(flag: str, parse: Callable[[str], tuple], text: str) -> None:
        default = ",".join(map(str, DEFAULTS[flag.strip("-")]))
        parser.add_argument(flag, type=parse, metavar="LIST", help=f"{text} (default: {default})")

    add("--targets", names(TARGETS, "target"), "GPU architectures")
    add("--operations", names(DEFAULTS["operations"], "operation"), "operations, forward and backward")
    add("--dtypes", names(DTYPES, "dtype"), f"of {','.join(DTYPES)}")
    add("--widths", _widths, "columns of a row")
    add("--providers", names(PROVIDERS, "provider"), f"{LIGER} where it is installed")
    parser.add_argument("--quick", action="store_true", help="two targets, three operations: about half a minute")
    text = "don't disassemble, which takes as long as to compile"
    parser.add_argument("--no-instructions", dest="instructions", action="store_false", help=text)
    parser.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="processes (default: 1)")
    add_output(parser)
    return parser


def _widths(text: str) -> tuple[int, ...]:
    return tuple(positive(int)(item) for item in text.split(","))
