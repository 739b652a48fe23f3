"""The tables of docs/ from the files in bench/results: `python -m bench summary` fills them in.

A document says between which lines a table stands, and which files it is made of:

    <!-- cells NAME.json -->
    <!-- end -->

cells: every case, with its time; operations: the speed-ups of every operation and shape, side by side; spread: the
least, median and largest speed-up of every operation, with the cases that lose; clip: every list of gradients, of
the file that `python -m bench clip` writes; instructions: those that the kernels take for each element on every
architecture, Liger-Kernel's behind ours, of the operations, dtypes and widths that the line goes on to name:

    <!-- instructions NAME.json rms_norm,clip_grad_norm_ bf16 4096,any -->

card, headline: what `make card` found on cards, whose card.json were put into bench/results as card-NAME.json; all of
it, or rows of 4096 columns alone. As long as there is none, a sentence says so.

host: the host's µs a call, best / median, of the file that `python -m bench host` writes.
"""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .card.summary import TIMES, clip_rows, norm_rows, question_rows
from .report import LOSS, mode_label, speedup

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "docs" / "machine_code.md", ROOT / "README.md")
CLIPS = ("fastnorm", "fastnorm-deferred", "fastnorm-reference")  # fastnorm-native is what fastnorm takes on a CPU
KINDS = "cells|operations|spread|clip|instructions|card|headline|host"
BLOCK = re.compile(rf"(<!-- ({KINDS}) ([^>]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

NO_CARD = "GPU times have not been measured yet: `make card` does it on a card."

Case = dict[str, Any]  # a result as the JSON has it


def fill(document: Path) -> bool:
    """Make the document's tables anew; whether that changed anything."""
    before = document.read_text(encoding="utf-8")
    after = BLOCK.sub(lambda match: f"{match[1]}{_table(match[2], match[3].split())}\n{match[5]}", before)
    document.write_text(after, encoding="utf-8")
    return after != before


def _table(kind: str, names: Sequence[str]) -> str:
    if kind in ("card", "headline"):
        cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(names[0]))]
        cards = [card for card in cards if card["results"] and not card["rehearsal"]]
        return "\n\n".join(_card(document, kind == "headline") for document in cards) or NO_CARD
    if kind == "instructions":
        name, *chosen = names
        operations, dtypes, widths = (part.split(",") for part in chosen)
        kernels = [k for k in kernels_of(RESULTS / name) if k["operation"] in operations and k["dtype"] in dtypes]
        return _instructions([kernel for kernel in kernels if _width(kernel) in widths])
    documents = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names]
    results = [result for document in documents for result in document["results"]]
    if kind == "host":
        from .host import rows  # which imports much

        return _github(*rows(results))
    if kind == "clip":
        return _clip([result for result in results if result["provider"] in CLIPS])
    ours = [result for result in results if result["provider"] == "fastnorm"]
    return {"cells": _cells, "operations": _operations, "spread": _spread}[kind](ours)


def _card(document: Case, is_headline: bool) -> str:
    machine, results = document["machine"], document["results"]
    if is_headline:
        results = [result for result in results if result["shape"].endswith("x4096")]
    tables = [_github(norm_rows(results), TIMES)]
    if not is_headline:
        tables += [_github(*clip_rows(document["clips"]))] if document["clips"] else []
        choices = question_rows(document["questions"])
        tables += [_github(*choices)] if choices else []
    return "\n\n".join([f"{machine['device']}, torch {machine.get('torch')}, {machine.get('date')}:", *tables])


def _cells(results: list[Case]) -> str:
    headers = ("operation", "mode", "shape", "dtype", "ms", "against stock", "against torch.compile")
    rows = [
        (
            *(f"`{result['operation']}`", mode_label(result["mode"]), _shape(result), result["dtype"]),
            *(f"{result['median_s'] * 1e3:.3g}", speedup(result["speedup_vs_torch"])),
            speedup(result["speedup_vs_compile"]),
        )
        for result in results
    ]
    return _github(rows, headers)


def _operations(results: list[Case]) -> str:
    columns = list(dict.fromkeys((result["mode"], result["dtype"]) for result in results))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for result in results:
        row = rows.setdefault((f"`{result['operation']}`", _shape(result)), {})
        row[result["mode"], result["dtype"]] = speedup(result["speedup_vs_torch"])
    headers = ("operation", "shape", *(f"{mode_label(mode)} {dtype}" for mode, dtype in columns))
    return _github([(*key, *(row.get(column, "") for column in columns)) for key, row in rows.items()], headers)


def _spread(results: list[Case]) -> str:
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for result in results:
        groups.setdefault((result["operation"], result["mode"], result["dtype"]), []).append(result)
    headers = ("operation", "mode", "dtype", "least", "median", "most", f"below {LOSS}×")
    return _github([_spread_row(*key, group) for key, group in groups.items()], headers)


def _spread_row(operation: str, mode: str, dtype: str, group: list[Case]) -> tuple[str, ...]:
    speedups = sorted(result["speedup_vs_torch"] for result in group)
    losing = [f"{_shape(each)}: {each['speedup_vs_torch']:.3f}" for each in group if each["speedup_vs_torch"] < LOSS]
    losses = f"{len(losing)} of {len(group)}" + (f" ▼ ({', '.join(losing)})" if losing else "")
    three = (speedups[0], statistics.median(speedups), speedups[-1])
    return f"`{operation}`", mode_label(mode), dtype, *(f"{value:.2f}×" for value in three), losses


def kernels_of(path: Path) -> list[Case]:
    """The kernels of a JSON file of `python -m bench codegen`."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(document["fields"], kernel, strict=True)) for kernel in document["kernels"]]


def _width(kernel: Case) -> str:
    return str(kernel["cols"] or "any")


def _instructions(kernels: list[Case]) -> str:
    """A row for each kernel, dtype and width: ours / Liger-Kernel's, with what it spills, in bytes of a thread."""
    targets = list(dict.fromkeys(kernel["target"] for kernel in kernels))
    cells: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = {}
    for kernel in kernels:
        if kernel["instructions"] is not None:
            direction = next((d for d in ("forward", "backward") if d in kernel["kernel"]), kernel["kernel"])
            key = f"`{kernel['operation']}`", direction, kernel["dtype"], _width(kernel)
            spilled = f" (spills {kernel['spilled']})" if kernel["spilled"] else ""
            cell = cells.setdefault(key, {}).setdefault(kernel["target"], {})
            cell.setdefault(kernel["provider"], f"{kernel['instructions']:.1f}{spilled}")
    rows = [
        (*key, *(" / ".join(row.get(target, {}).get(who, "–") for who in ("fastnorm", "liger")) for target in targets))
        for key, row in cells.items()
    ]
    return _github(rows, ("operation", "kernel", "dtype", "width", *targets))


def _clip(results: list[Case]) -> str:
    headers = ("operation", "gradients", "case", "provider", "ms", "against", "speed-up")
    rows = [
        (
            *(f"`{result['operation']}`", f"{result['list']}: {result['tensors']:,} tensors, {_millions(result)}"),
            *(f"{result['case']}, {result['dtype']}", result["provider"], f"{result['median_s'] * 1e3:.3g}"),
            *(result["baseline"], speedup(result["speedup"])),
        )
        for result in results
    ]
    return _github(rows, headers)


def _millions(result: Case) -> str:
    return f"{result['elements'] / 1e6:.3g} M"


def _shape(result: Case) -> str:
    shape = result["shape"].replace("x", " × ")
    return f"{shape}, {result['layout']}" if len(result["shape"].split("x")) > 2 else shape


def _github(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
