"""The results of `python -m bench clip` as tables for people, and as CSV and JSON for programs."""

from pathlib import Path

from . import report
from .clip import Bench, Result

LEGEND = (
    "median: time of a call over the rounds; IQR: interquartile range as % of it.\n"
    "GB/s: the bytes that the algorithm can't do without / median.\n"
    "vs baseline: torch's (foreach) or timm's time / this one's, the median of the rounds' ratios; ▼ slower.\n"
    "error: the largest relative one, of the norm or of a tensor by its largest value; ! above what is allowed.\n"
    "WRONG: far above that; FAILED: an exception. Neither is timed. fastnorm's kernels above it fail the command."
)


CLIPS = report.Table(
    case_columns=("list", "dtype"),
    more=("vs baseline", "error"),
    title=lambda result: f"{result.operation}, {result.case}",
    case=lambda result: (f"{result.list}: {result.tensors} x, {result.elements / 1e6:.3g} M", result.dtype),
    values=lambda result: (report.ratio(result.speedup),),
    error=lambda result: "" if result.error is None else f"{result.error:.1e}" + (" !" if result.detail else ""),
)


def tables(results: list[Result], style: str = "simple") -> str:
    """One titled table per operation and case; `style` is tabulate's format."""
    return report.tables(results, style, CLIPS)


def write(directory: Path, stem: str, machine: dict[str, str], bench: Bench, results: list[Result]) -> list[Path]:
    """Write `<stem>.csv`, `.json` and `.md` into `directory`, and return their paths."""
    return report.write_files(directory / stem, machine, bench, results, ("", tables(results, "github"), LEGEND), {})
