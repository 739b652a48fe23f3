"""The results of `python -m bench clip` as tables for people, and as CSV and JSON for programs."""

from pathlib import Path

from tabulate import tabulate

from .clip import Bench, Result
from .report import duration, ratio, write_files
from .run import TIMED

COLUMNS = ("list", "dtype", "provider", "median", "IQR", "GB/s", "vs baseline", "error")
LEGEND = (
    "median: time of a call over the rounds; IQR: interquartile range as % of it.\n"
    "GB/s: the bytes that the algorithm can't do without / median.\n"
    "vs baseline: torch's (foreach) or timm's time / this one's, the median of the rounds' ratios; ▼ slower.\n"
    "error: the largest relative one, of the norm or of a tensor by its largest value; ! above what is allowed.\n"
    "WRONG: fastnorm's kernels above that, others far above; FAILED: an exception. Neither is timed."
)


def tables(results: list[Result], style: str = "simple") -> str:
    """One titled table per operation and case; `style` is tabulate's format."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.operation, result.case), []).append(result)
    mark = "### " if style == "github" else ""
    return "\n".join(f"{mark}{label}, {case}\n\n{_table(group, style)}\n" for (label, case), group in groups.items())


def _table(results: list[Result], style: str) -> str:
    body, previous = [], None
    for result in results:
        which = (f"{result.list}: {result.tensors} x, {result.elements / 1e6:.3g} M", result.dtype)
        body.append((*(which if which != previous else ("", "")), *_cells(result)))
        previous = which
    align = ("left", "left", "left", *("right",) * (len(COLUMNS) - 3))
    complaints = [f"{r.status}: {r.provider}, {r.list}: {r.detail}" for r in results if r.status not in TIMED]
    return "\n".join((tabulate(body, COLUMNS, tablefmt=style, colalign=align, disable_numparse=True), *complaints))


def _cells(result: Result) -> tuple[str, ...]:
    provider = result.provider
    if result.backend and not provider.endswith(result.backend):
        provider += f" ({result.backend})"
    error = "" if result.error is None else f"{result.error:.1e}" + (" !" if result.detail else "")
    if result.status not in TIMED:
        return provider, result.status, "", "", "", error
    spread = (result.third_quartile_s - result.first_quartile_s) / result.median_s
    return (
        provider,
        duration(result.median_s),
        f"{spread:.0%}",
        f"{result.gb_per_s:.1f}",
        ratio(result.speedup),
        error,
    )


def write(directory: Path, stem: str, machine: dict[str, str], bench: Bench, results: list[Result]) -> list[Path]:
    """Write `<stem>.csv`, `.json` and `.md` into `directory`, and return their paths."""
    return write_files(directory / stem, machine, bench, results, ("", tables(results, "github"), LEGEND), {})
