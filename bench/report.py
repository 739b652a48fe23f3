"""Results as tables for people, and as CSV and JSON for programs."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .ceiling import Ceiling
from .check import FACTOR_FOR_OTHERS, STOCK_ERROR_FACTOR
from .run import Bench, Result

LOSS = 0.98  # what is slower than this is marked in documents
TIMES = ("provider", "median", "IQR", "GB/s")  # the columns that every table has
LEGEND = (
    "median: time of a call over the rounds; IQR: interquartile range as % of it.\n"
    "GB/s: the bytes that the algorithm can't do without / median; % of copy: that of the best copy of this size.\n"
    "vs: the baseline's time / this one's, the median of the ratios within each round; ▼ slower.\n"
    f"error: largest error against float64; 1.00 is what is allowed ({STOCK_ERROR_FACTOR} x stock's + 1 ulp); ! more.\n"
    f"WRONG: above {FACTOR_FOR_OTHERS} and x's precision; FAILED: an exception. Neither is timed. "
    "The command fails where fastnorm is above 1."
)


@dataclass(frozen=True)
class Table:
    """How results of one kind are shown: a table for each `title`, its columns those of the case, TIMES and `more`.

    case: what a provider's rows share, shown once; values: the cells of `more` but for the last, which is `error`.
    """

    case_columns: tuple[str, ...]
    more: tuple[str, ...]
    title: Callable[[Any], str]
    case: Callable[[Any], tuple[str, ...]]
    values: Callable[[Any], tuple[str, ...]]
    error: Callable[[Any], str]


NORMS = Table(
    case_columns=("shape", "dtype"),
    more=("% of copy", "vs torch", "vs compile", "error"),
    title=lambda result: f"{result.operation}, {mode_label(result.mode)}",
    case=lambda result: (problem_label(result), result.dtype),
    values=lambda result: (
        f"{result.percent_of_ceiling:.0f}%",
        ratio(result.speedup_vs_torch),
        ratio(result.speedup_vs_compile),
    ),
    error=lambda result: _error(result),
)


def tables(results: Iterable[Any], style: str = "simple", table: Table = NORMS) -> str:
    """One titled table per operation and mode, in the order of the results; `style` is tabulate's format."""
    groups: dict[str, list[Any]] = {}
    for result in results:
        groups.setdefault(table.title(result), []).append(result)
    mark = "### " if style == "github" else ""
    return "\n".join(f"{mark}{title}\n\n{_body(group, style, table)}\n" for title, group in groups.items())


def mode_label(mode: str) -> str:
    """A mode as people write it."""
    return mode.replace("_", " + ")


def problem_label(result: Result) -> str:
    """A shape as people write it, with its layout where that is not the usual one."""
    shape = result.shape.replace("x", " x ")
    return shape if result.layout == "contiguous" else f"{shape}, {result.layout}"


def _body(results: list[Any], style: str, table: Table) -> str:
    rows, previous = [], None
    for result in results:
        case = table.case(result)
        rows.append((*(case if case != previous else ("",) * len(case)), *cells(result, table)))
        previous = case
    columns = (*table.case_columns, *TIMES, *table.more)
    left = len(table.case_columns) + 1
    align = ("left",) * left + ("right",) * (len(columns) - left)
    complaints = [
        f"{result.status}: {result.provider}, {' '.join(table.case(result))}: {result.detail}"
        for result in results
        if not result.is_timed
    ]
    return "\n".join((tabulate(rows, columns, tablefmt=style, colalign=align, disable_numparse=True), *complaints))


def cells(result: Any, table: Table) -> tuple[str, ...]:
    """What a provider's row says behind the case; no times where there are none."""
    provider = result.provider
    if result.backend and not provider.endswith(result.backend):
        provider += f" ({result.backend})"
    if not result.is_timed:
        return provider, result.status, *("",) * (len(TIMES) + len(table.more) - 3), table.error(result)
    spread = (result.third_quartile_s - result.first_quartile_s) / result.median_s
    times = duration(result.median_s), f"{spread:.0%}", f"{result.gb_per_s:.1f}"
    return provider, *times, *table.values(result), table.error(result)


def _error(result: Result) -> str:
    share = result.error_of_allowed
    if share is None:
        return ""
    return f"{share:.2f}" + (" !" if share > 1 else "")


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds * 1e9:.0f} ns"


def ratio(speedup: float | None) -> str:
    """A speed-up, with a mark where it is a loss."""
    if speedup is None:
        return "–"
    return f"{speedup:.2f}x" + (" ▼" if round(speedup, 2) < 1 else "")


def speedup(value: float | None) -> str:
    """A speed-up in a document, with a mark where it is a loss beyond noise."""
    return "" if value is None else f"{value:.2f}×" + " ▼" * (value < LOSS)


def header(machine: dict[str, str]) -> str:
    """The machine, one fact a line."""
    return tabulate(machine.items(), tablefmt="plain", disable_numparse=True)


def absences(absent: dict[str, dict[str, str]]) -> str:
    """Which providers are missing, with the reason and the operations it holds for; "" if none is."""
    held_back: dict[tuple[str, str], list[str]] = {}
    for operation, reasons in absent.items():
        for provider, reason in reasons.items():
            held_back.setdefault((provider, reason), []).append(operation)
    lines = [
        f"  {provider}: {reason}" + ("" if len(operations) == len(absent) else f" ({', '.join(operations)})")
        for (provider, reason), operations in held_back.items()
    ]
    return "\n".join(("absent:", *lines)) if lines else ""


def ceiling_line(large: Ceiling) -> str:
    """The large copy in words."""
    return (
        f"copying {large.nbytes / 2**20:.0f} MiB: {large.copy:.1f} GB/s into a buffer in use, "
        f"{large.clone:.1f} GB/s into newly allocated memory"
    )


def write(directory: Path, stem: str, machine: dict[str, str], bench: Bench, results: list[Result]) -> list[Path]:
    """Write `<stem>.csv`, `.json` and `.md` into `directory`, and return their paths."""
    ceilings = {"copy_ceilings_gb_per_s": bench.ceilings.to_dicts()}
    text = (ceiling_line(bench.ceilings.large()), tables(results, "github"), LEGEND)
    return write_files(directory / stem, machine, bench, results, text, ceilings)


def write_files(
    path: Path, machine: dict[str, str], bench: Any, results: Sequence[Any], text: tuple[str, str, str], extra: dict
) -> list[Path]:
    """`path` with the suffixes csv, json and md. text: what stands below the machine, the tables, the legend; extra:
    what only the JSON has beside the machine, the budget, who is absent, and the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.parent / f"{path.name}.{suffix}" for suffix in ("csv", "json", "md")]
    write_csv(paths[0], machine, results)
    document = {"machine": machine, "budget": asdict(bench.plan.budget), "absent": bench.absent, **extra}
    document["results"] = [asdict(result) for result in results]
    paths[1].write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    below, body, legend = text
    sections = "\n\n".join(filter(None, (header(machine), below, absences(bench.absent))))
    paths[2].write_text(f"```\n{sections}\n```\n\n{body}\n\n{legend}\n", encoding="utf-8")
    return paths


def write_csv(path: Path, machine: dict[str, str], results: Sequence[Any]) -> None:
    """The machine as comment lines (`comment="#"` in pandas), then a row per result, dataclasses of one type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in machine.items())
        writer = csv.DictWriter(file, [field.name for field in fields(results[0])])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
