"""`python -m bench codegen`: what the compilers make of every shipped Triton kernel, with Liger-Kernel's beside them.

No GPU is needed. Exit status 1 if a kernel of ours keeps registers in memory.
"""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton
from tqdm import tqdm

import fastnorm
from fastnorm import triton_kernels

from . import machine
from .compiled import Failure, Kernel, compile_all
from .labels import aligned
from .problem import DEFAULTS, LIGER, OURS, QUICK, beside, problems_of
from .report import markdown

LEGEND = (
    "width: of the rows that the code is for; any where it takes all. registers: of a thread. spilled: bytes of a\n"
    "thread, kept elsewhere for want of registers. shared: bytes of a program. resident: warps on a multiprocessor,\n"
    "by registers and shared memory. access: bytes of the narrowest load or store through a pointer to rows; of the\n"
    "widest where the code does not tell pointers apart (AMD's, and addresses out of a table)."
)
COLUMNS = {
    "operation": "operation", "dtype": "dtype", "cols": "width", "provider": "provider",
    "kernel": "kernel", "warps": "warps", "registers": "registers", "spilled": "spilled", "shared": "shared",
    "resident_warps": "resident", "access": "access",
}  # fmt: skip
FIELDS = [field.name for field in fields(Kernel)]
TEXTS = {"cols": lambda n: str(n or "any")}


def main(options: Namespace) -> tuple[int, dict[str, Any]]:
    """Compile, print and write; 1 if a kernel of ours spills, else 0."""
    if triton_kernels.INTERPRETED:
        options.parser.error("TRITON_INTERPRET=1 interprets the kernels, and this compiles them: unset it")
    chosen = {name: getattr(options, name) or (QUICK if options.quick else DEFAULTS)[name] for name in DEFAULTS}
    pairs = [(ours, beside(ours)) for ours in problems_of(*(chosen[name] for name in list(DEFAULTS)[:4]))]
    problems = [each for pair in pairs for each in pair if each and each.provider in chosen["providers"]]
    found = list(tqdm(compile_all(problems, options.jobs), unit="kernel"))
    document = {
        "facts": _facts(), "failures": [asdict(each) for each in found if isinstance(each, Failure)],
        "fields": FIELDS, "kernels": [list(asdict(each).values()) for each in found if isinstance(each, Kernel)],
    }
    kernels = frame_of(document)
    for target in chosen["targets"]:
        print(f"\n{target}\n{_table(kernels[kernels['target'] == target], 'simple')}")
    print("", LEGEND, "", _summary(document, "simple"), sep="\n")
    suffix = "" if chosen == DEFAULTS else "-quick" if options.quick else "-custom"
    print("wrote", *write(options.output / f"codegen{suffix}", document), sep="\n  ")
    return int(not _spilling(kernels).empty), document


def frame_of(document: dict[str, Any]) -> pd.DataFrame:
    """A row for each kernel, None and numbers as they are."""
    return pd.DataFrame(document["kernels"], columns=document["fields"], dtype=object)


def _facts() -> dict[str, str]:
    versions = {"fastnorm": fastnorm.__version__, "triton": triton.__version__, "torch": torch.__version__}
    liger = machine.version("liger-kernel", "not installed: pip install --no-deps liger-kernel")
    return versions | {"ptxas": triton.knobs.nvidia.ptxas.version, "liger-kernel": liger}


def _table(kernels: pd.DataFrame, style: str) -> str:
    cells = {title: kernels[field].map(TEXTS.get(field, str)) for field, title in COLUMNS.items()}
    align = ["left" if title in ("operation", "dtype", "provider", "kernel") else "right" for title in cells]
    return markdown(pd.DataFrame(cells), style, align)


def _spilling(kernels: pd.DataFrame) -> pd.DataFrame:
    return kernels[(kernels["spilled"] > 0) & (kernels["provider"] == OURS)]


def _summary(document: dict[str, Any], style: str) -> str:
    """How many kernels there are and which spill, and what of Liger-Kernel's there is not."""
    kernels = frame_of(document)
    spills = kernels["spilled"].map(bool).groupby([kernels["provider"], kernels["target"]])
    counts = spills.agg(**{"kernels": "size", "of them spill": "sum"}).reset_index()
    text = [counts.to_markdown(index=False, tablefmt=style), ""]
    text += [
        f"{k.target} {k.operation} {k.kernel} {k.dtype} {k.cols or 'any'}: spills {k.spilled} bytes"
        for k in _spilling(kernels).itertuples()
    ]
    reasons = Counter(failure["reason"] for failure in document["failures"])
    return "\n".join((*text, *(f"{LIGER}, {number} calls: {reason}" for reason, number in reasons.items())))


def write(path: Path, document: dict[str, Any]) -> list[Path]:
    """Everything as JSON, a kernel a line; as Markdown the summary, and ours beside Liger-Kernel's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.parent / f"{path.name}.{suffix}" for suffix in ("json", "md")]
    lines = ",\n".join(map(json.dumps, document["kernels"]))
    head = json.dumps({name: document[name] for name in ("facts", "failures")}, indent=1)
    columns = json.dumps(document["fields"])
    paths[0].write_text(f'{head[:-2]},\n "fields": {columns},\n "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    kernels = frame_of(document)
    shown = kernels[kernels["dtype"] == "bf16"].groupby("target", sort=False)
    tables = [f"## {target}\n\n{_table(part, 'github')}\n" for target, part in shown]
    rest = "All kernels are in the JSON file of the same name; here are those in bf16."
    facts = f"```\n{aligned(document['facts'].items())}\n```"
    paths[1].write_text("\n\n".join((facts, _summary(document, "github"), LEGEND, rest, *tables)), encoding="utf-8")
    return paths
