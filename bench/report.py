"""Results as tables for people, and as CSV and JSON for programs; the tables are made of what the JSON holds."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import ceiling
from . import memory as allocator
from .check import FACTOR_FOR_OTHERS, STOCK_ERROR_FACTOR
from .labels import absences, aligned, duration, is_loss, mode_label, ratio

TIMES = (
    "median: time of a call over the rounds; IQR: interquartile range as % of it.\n"
    "GB/s: the bytes that the algorithm can't do without / median"
)
MEMORY = (
    "in use: malloc keeps what is freed, as in a process that has run for a while; new: each large output comes from\n"
    "the system, and its pages are made as it is written. Times without a state are of memory in use, if that is timed."
)


@dataclass(frozen=True)
class Kind:
    """How the results of one benchmark are shown, as functions of a frame of them.

    titles: a table for each; cells: the columns, the first two of which are shown once for the rows that share them.
    speedup: the column of the ratios to `baseline`, of which `losing` speaks.
    """

    titles: Callable[[pd.DataFrame], pd.Series]
    cells: Callable[[pd.DataFrame], pd.DataFrame]
    speedup: str
    baseline: str
    legend: str


def frame_of(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A row for each result, NaN for None."""
    return pd.DataFrame(results).fillna(float("nan")).infer_objects()


def tables(results: Iterable[dict], kind: Kind, style: str = "simple") -> str:
    """One titled table per operation and mode, in the order of the results; `style` is tabulate's format."""
    frame, mark = frame_of(results), "### " if style == "github" else ""
    parts = frame.groupby(kind.titles(frame), sort=False) if len(frame) else ()
    return "\n".join(f"{mark}{title}\n\n{_body(part, kind, style)}\n" for title, part in parts)


def _body(part: pd.DataFrame, kind: Kind, style: str) -> str:
    cells = _by_memory(kind.cells(part), memory(part))
    case = list(cells.columns[:2])
    complaints = [
        f"{result.status}: {result.provider}, {' '.join(cells.loc[result.Index, case])}: {result.detail}"
        for result in part.loc[cells.index].query("median_s.isna()").itertuples()
    ]
    cells.loc[cells[case].eq(cells[case].shift()).all(axis=1), case] = ""
    return "\n".join((markdown(cells, style, _right(cells, 3)), *complaints))


def memory(frame: pd.DataFrame) -> pd.Series:
    """The state of the memory of each result: in use where it doesn't say, as it was before there was a choice."""
    stated = frame.get("memory", pd.Series(index=frame.index, dtype=object))
    return stated.fillna(allocator.IN_USE)


def states_of(memory: pd.Series) -> list[str]:
    """The states that a table has to name; none if all was in use."""
    states = list(memory.unique())
    return [] if states == [allocator.IN_USE] else states


def _by_memory(cells: pd.DataFrame, memory: pd.Series) -> pd.DataFrame:
    """The rows of the first state, with the speed-ups in every state side by side."""
    if not (states := states_of(memory)):
        return cells
    rows = {state: cells[memory == state] for state in states}  # each has the same cases, in the same order
    table = rows[states[0]]
    for column in [name for name in cells if name.startswith("vs ")]:
        place = table.columns.get_loc(column)
        table = table.drop(columns=column)
        for i, state in enumerate(states):
            table.insert(place + i, f"{column}, {state}", rows[state][column].to_numpy())
    return table


def markdown(cells: pd.DataFrame, style: str = "github", align: Sequence[str] | None = None) -> str:
    """A table of text in tabulate's format `style`."""
    return cells.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)


def _right(cells: pd.DataFrame, left: int) -> list[str]:
    """The alignment of columns: all but the first `left` ones to the right."""
    return ["left"] * left + ["right"] * (cells.shape[1] - left)


def losing(results: Iterable[dict], kind: Kind) -> str:
    """The block of what fastnorm is slower at than the baseline, of all its providers."""
    ours = [result for result in results if result["provider"].startswith("fastnorm") and result[kind.speedup]]
    lost = frame_of(result for result in ours if is_loss(result[kind.speedup]))
    title = f"Losing cells: fastnorm slower than {kind.baseline}"
    if lost.empty:
        return f"{title}: {f'none of {len(ours)}' if ours else 'nothing to compare'}"
    cells = kind.cells(lost)
    if states_of(memory(frame_of(ours))):
        cells.insert(2, "memory", memory(lost))
    cells.insert(0, "case", kind.titles(lost))
    align = _right(cells, list(cells).index("median"))
    return f"{title}: {len(lost)} of {len(ours)}\n\n{markdown(cells, 'simple', align)}"


def legend(results: Iterable[dict], kind: Kind) -> str:
    """What the columns are."""
    frame = frame_of(results)
    return "\n".join((kind.legend, *[MEMORY] * bool(len(frame) and states_of(memory(frame)))))


def write(path: Path, document: dict[str, Any], kind: Kind) -> list[Path]:
    """`path` with the suffixes csv, json and md. document: what the JSON holds."""
    paths = [path.parent / f"{path.name}.{suffix}" for suffix in ("csv", "json", "md")]
    write_json(paths[1], document)
    with paths[0].open("w", encoding="utf-8", newline="") as file:
        # comment lines (`comment="#"` in pandas), then a row per result
        file.writelines(f"# {key}: {value}\n" for key, value in document["machine"].items())
        pd.DataFrame(document["results"]).to_csv(file, index=False)
    above = (aligned(document["machine"].items()), ceiling_line(document), absences(document["absent"]))
    results = document["results"]
    text = "\n\n".join(filter(None, above)), tables(results, kind, "github"), legend(results, kind)
    paths[2].write_text("```\n{}\n```\n\n{}\n\n{}\n".format(*text), encoding="utf-8")
    return paths


def write_json(path: Path, document: dict[str, Any]) -> None:
    """The document, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(document), encoding="utf-8")


def as_json(document: dict[str, Any]) -> str:
    """What is None stays null: JSON has no NaN."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def ceiling_line(document: dict[str, Any]) -> str:
    """The copy that no cache helps in words; "" of a document without it."""
    return next((
        f"copying {copied['nbytes'] / 2**20:.0f} MiB: {copied['copy']:.1f} GB/s into a buffer in use, "
        f"{copied['clone']:.1f} GB/s into newly allocated memory"
        for copied in document.get("copy_ceilings_gb_per_s", ()) if copied["nbytes"] == ceiling.LARGE_BYTES
    ), "")  # fmt: skip


def shown(values: Iterable[Any], text: Callable[[Any], str]) -> list[str]:
    """Each value as text, "" where there is none."""
    return ["" if pd.isna(value) else text(value) for value in values]


def shapes(frame: pd.DataFrame, times: str, usual: Callable[[str, str], bool]) -> list[str]:
    """Shapes as people write them, with the layout where shape and layout are not `usual`."""
    pairs = zip(frame["shape"].str.replace("x", f" {times} "), frame["layout"], strict=True)
    return [shape if usual(shape, layout) else f"{shape}, {layout}" for shape, layout in pairs]


def _cells(frame: pd.DataFrame, case: dict[str, list[str]], more: dict[str, list[str]]) -> pd.DataFrame:
    """The columns that both kinds have, between `case` and `more`; a status in the place of a time that isn't there."""
    backends = zip(frame["provider"], frame["backend"], strict=True)
    times = zip(shown(frame["median_s"], duration), frame["status"], strict=True)
    quartiles = (frame["third_quartile_s"] - frame["first_quartile_s"]) / frame["median_s"]
    return pd.DataFrame({
        **case, "dtype": frame["dtype"],
        "provider": [f"{name} ({by})" if by and not name.endswith(by) else name for name, by in backends],
        "median": [time or status for time, status in times], "IQR": shown(quartiles, "{:.0%}".format),
        "GB/s": shown(frame["gb_per_s"], "{:.1f}".format), **more,
    }, index=frame.index)  # fmt: skip


def _ratios(frame: pd.DataFrame, column: str) -> list[str]:
    """Those that are missing for want of the baseline, as a dash."""
    return ["" if pd.isna(time) else text or ratio(None)
            for time, text in zip(frame["median_s"], shown(frame[column], ratio), strict=True)]  # fmt: skip


NORMS = Kind(
    titles=lambda frame: frame["operation"] + ", " + frame["mode"].map(mode_label),
    cells=lambda frame: _cells(frame, {"shape": shapes(frame, "x", lambda _, layout: layout == "contiguous")}, {
        "% of copy": shown(frame["percent_of_ceiling"], "{:.0f}%".format),
        "vs torch": _ratios(frame, "speedup_vs_torch"),
        "vs compile": _ratios(frame, "speedup_vs_compile"),
        "error": shown(frame["error_of_allowed"], lambda share: f"{share:.2f}" + " !" * (share > 1)),
    }),
    speedup="speedup_vs_torch",
    baseline="stock torch eager",
    legend=f"{TIMES}; % of copy: that of the best copy of this size.\n"
    "vs: the baseline's time / this one's, the median of the ratios within each round; ▼ slower.\n"
    f"error: largest error against float64; 1.00 is what is allowed ({STOCK_ERROR_FACTOR} x stock's + 1 ulp); ! more.\n"
    f"WRONG: above {FACTOR_FOR_OTHERS} and x's precision; FAILED: an exception. Neither is timed. "
    "The command fails where fastnorm is above 1.",
)  # fmt: skip

CLIPS = Kind(
    titles=lambda frame: frame["operation"] + ", " + frame["case"],
    cells=lambda frame: _cells(frame, {"list": [
        f"{r.list}: {r.tensors} x, {r.elements / 1e6:.3g} M" for r in frame.itertuples()
    ]}, {
        "vs baseline": _ratios(frame, "speedup"),
        "error": [text + " !" * bool(text and detail)
                  for text, detail in zip(shown(frame["error"], "{:.1e}".format), frame["detail"], strict=True)],
    }),
    speedup="speedup",
    baseline="stock torch eager (adaptive clips: than timm)",
    legend=f"{TIMES}.\n"
    "vs baseline: torch's (foreach) or timm's time / this one's, the median of the rounds' ratios; ▼ slower.\n"
    "error: the largest relative one, of the norm or of a tensor by its largest value; ! above what is allowed.\n"
    "WRONG: far above that; FAILED: an exception. Neither is timed. fastnorm's kernels above it fail the command.",
)  # fmt: skip


HOST_PROVIDERS = ("torch", "fastnorm-triton", "fastnorm-native", "liger")


def host_cells(results: Iterable[dict]) -> pd.DataFrame:
    """A row for each operation and mode: best / median µs of each provider."""
    frame = frame_of(results)
    frame["mode"] = frame["mode"].map(mode_label)
    times = zip(shown(frame["best_us"], "{:.1f}".format), shown(frame["median_us"], "{:.1f}".format), strict=True)
    frame["cell"] = [f"{best} / {median}" if best else "–" for best, median in times]
    return wide(frame, ["operation", "mode"], "provider", HOST_PROVIDERS, "–")


def wide(frame: pd.DataFrame, rows: list[str], across: str, columns: Iterable[str], missing: str = "") -> pd.DataFrame:
    """The column "cell" of a long frame, by `rows` in their order and by the values of `across`."""
    table = frame.pivot_table("cell", rows, across, aggfunc="first", sort=False)
    return table.reindex(columns=list(columns)).astype(object).fillna(missing).reset_index()


def prediction_tables(results: Iterable[dict], targets: dict[str, str]) -> list[pd.DataFrame]:
    """One for the row norms that were predicted at the same widths, one for each norm over channels, and one of what
    another library's kernels were predicted for too."""
    results = list(results)
    theirs = [result for result in results if result["provider"] != "fastnorm"]
    results = [result for result in results if result["provider"] == "fastnorm"]
    widths: dict[str, set] = {}
    for result in results:
        widths.setdefault(result["operation"], set()).add(result.get("cols"))
    tables: dict[Any, list[dict]] = {}
    for result in results:
        operation = result["operation"]
        tables.setdefault(operation if "image" in result else frozenset(widths[operation]), []).append(result)
    beside = [_beside(results, theirs, targets)] if theirs else []
    return [_prediction_cells(of_table, targets) for of_table in tables.values()] + beside


def _prediction_cells(results: list[dict], targets: dict[str, str]) -> pd.DataFrame:
    """A row for each call and GPU, a column for each width, or image: per cent of a copy's speed, l where latency
    bounds it."""
    frame = frame_of(results)
    frame["call"] = "`" + frame["operation"] + "` " + frame["direction"]
    if "image" in frame:
        frame["call"] += ", " + frame["layout"]
        frame["cols"] = frame["image"].str.replace("x", " × ")
    bounds = zip(frame["percent_of_copy"], frame["bound"], strict=True)
    frame["cell"] = [f"{percent} l" if bound == "latency" else f"{percent}" for percent, bound in bounds]
    return _by_columns(frame, targets)


def _beside(ours: list[dict], theirs: list[dict], targets: dict[str, str]) -> pd.DataFrame:
    """The same rows: the other library's time / ours; ▼ where ours is more than 3 per cent longer."""
    cell = ["operation", "direction", "dtype", "millions", "target", "cols"]
    mine = pd.DataFrame(ours, columns=[*cell, "us"])
    frame = frame_of(theirs).merge(mine, on=cell, how="left", suffixes=("", "_ours"))
    frame["call"] = "`" + frame["operation"] + "` " + frame["direction"]
    ratio = frame["us"] / frame["us_ours"]
    frame["cell"] = shown(ratio, lambda ratio: f"{ratio:.2f}×{' ▼' * (1.03 * ratio < 1)}")
    return _by_columns(frame, targets)


def _by_columns(frame: pd.DataFrame, targets: dict[str, str]) -> pd.DataFrame:
    frame["elements"] = [f"{millions} M" for millions in frame["millions"]]
    frame["GPU"], frame["cols"] = frame["target"].map(targets), frame["cols"].map(str)
    columns = sorted(frame["cols"].unique(), key=lambda cols: int(cols) if cols.isdigit() else 0)
    return wide(frame, ["call", "dtype", "elements", "GPU"], "cols", columns)
