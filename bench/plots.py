"""PNG figures: GB/s over the shapes with the copy ceilings drawn, and a map of speed-ups over rows and columns."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import TwoSlopeNorm

from . import ceiling, report
from .labels import mode_label
from .memory import IN_USE

AUTOMATIC = "fastnorm"
COLOURS = {
    "torch": "#b5525c", "compile": "#d9963a", "fastnorm": "#0b6e75", "fastnorm-triton": "#3fa7ad",
    "fastnorm-native": "#3fa7ad", "fastnorm-reference": "#93c4c7", "liger": "#7a5ea8", "quack": "#4c78a8",
    "apex": "#6b8f3c", "apex-nhwc": "#6b8f3c", "copy of the same size": "#8c8c8c", "copy beyond all caches": "#8c8c8c",
}  # fmt: skip
DASHES = {"fastnorm-triton": (4, 2), "fastnorm-native": (2, 1.5), "fastnorm-reference": (1, 1.5)}
DASHES["copy beyond all caches"] = (1, 2)
INK = "#222222"
HEIGHT, WIDTH = 2.9, 4.3  # inches of a panel
SMALL = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 9.5, "legend.fontsize": 9.5, "savefig.dpi": 150,
         "xtick.labelsize": 8.5, "ytick.labelsize": 8.5}  # fmt: skip


def write(directory: Path, stem: str, document: dict[str, Any]) -> list[Path]:
    """Draw every operation of a document of results into `directory`, and return the paths of the PNG files."""
    if not document["results"]:
        return []
    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    frame = report.frame_of(document["results"])
    frame = frame[frame["gb_per_s"].notna()]
    lengths = frame["shape"].str.split("x", expand=True)
    frame = frame.assign(
        rows=lengths[0].astype(int), columns=lengths[1].astype(int), images=frame["shape"].str.count("x") > 1,
        mode=frame["mode"].map(mode_label),
        kind=frame["dtype"] + frame["layout"].map(lambda layout: "" if layout == "contiguous" else f" · {layout}")
        + report.memory(frame).map(lambda state: "" if state == IN_USE else f" · {state} memory"),
    )  # fmt: skip
    large = next(c for c in document["copy_ceilings_gb_per_s"] if c["nbytes"] == ceiling.LARGE_BYTES)
    device, paths = document["machine"]["device"], []

    def save(grid: sns.FacetGrid, name: str) -> None:
        paths.append(directory / f"{stem}-{name}.png")
        grid.figure.savefig(paths[-1], facecolor="white", bbox_inches="tight")
        matplotlib.pyplot.close(grid.figure)

    with sns.axes_style("ticks"), matplotlib.rc_context(SMALL):
        for operation, part in frame.groupby("operation", sort=False):
            save(_throughput(part, f"{operation}: throughput", device, max(large["copy"], large["clone"])), operation)
            if _is_grid(mine := part[(part["provider"] == AUTOMATIC) & part["speedup_vs_torch"].notna()]):
                title = f"{operation}: speed-up over stock"
                save(_speedup_map(mine, title, device), f"{operation}-speedup")
    return paths


def _throughput(frame: pd.DataFrame, title: str, device: str, large_copy: float) -> sns.FacetGrid:
    """Lines over the columns, at each width of the case with the most rows; of images over the shapes, side by side."""
    x = "shape" if frame["images"].any() else "columns"
    if x == "columns":
        frame = frame[frame["rows"] == frame.groupby("columns")["rows"].transform("max")]
        device += f" · {' to '.join(map(str, sorted({frame['rows'].min(), frame['rows'].max()})))} rows"
    copies = frame.drop_duplicates(["mode", "kind", x])
    same = copies.assign(gb_per_s=copies["ceiling_gb_per_s"], provider="copy of the same size")
    large = copies.assign(gb_per_s=large_copy, provider="copy beyond all caches")
    frame = pd.concat([frame, same, large])
    names = sorted(frame["provider"].unique(), key=lambda name: (*COLOURS, name).index(name))
    grid = sns.relplot(
        frame, x=x, y="gb_per_s", kind="line", row="mode", col="kind", height=HEIGHT, aspect=WIDTH / HEIGHT,
        hue="provider", style="provider", size="provider", hue_order=names, style_order=names, size_order=names,
        palette={name: COLOURS.get(name, INK) for name in names}, dashes={name: DASHES.get(name, "") for name in names},
        sizes={name: 2.4 if name == AUTOMATIC else 1.5 for name in names}, marker="o", markersize=4, markeredgewidth=0,
        facet_kws={"sharey": False},
    )  # fmt: skip
    grid.set(ylim=(0, None)).set_axis_labels(x, "GB/s").legend.set_title("")
    for ax in grid.axes.flat:
        ax.grid(axis="y", color="#e3e3e3", lw=0.6)
        if x == "columns":
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:.0f}")
        else:
            ax.tick_params("x", rotation=40)
    return _titled(grid, title, device)


def _titled(grid: sns.FacetGrid, title: str, subtitle: str) -> sns.FacetGrid:
    """A title over all panels, left-aligned, and each panel's own."""
    grid.set_titles("").set_titles("{row_name} · {col_name}", loc="left", color=INK)
    height = grid.figure.get_figheight()
    grid.figure.text(0.01, 1 + 0.32 / height, title, size=14, weight="bold", va="bottom")
    grid.figure.text(0.01, 1 + 0.1 / height, subtitle, color="#666666", va="bottom")
    return grid


def _is_grid(mine: pd.DataFrame) -> bool:
    """Whether a map has something to show: several row counts by several widths, against stock."""
    rows, columns = mine["rows"].nunique(), mine["columns"].nunique()
    is_filled = len(mine[["rows", "columns"]].drop_duplicates()) > rows * columns / 2
    return not mine["images"].any() and min(rows, columns) > 1 and is_filled


def _speedup_map(mine: pd.DataFrame, title: str, device: str) -> sns.FacetGrid:
    height = 0.42 * mine["rows"].nunique() + 0.95
    grid = sns.FacetGrid(mine, row="mode", col="kind", height=height, aspect=WIDTH / height, despine=False)
    grid.map_dataframe(_draw_map).set_axis_labels("columns", "rows").tick_params(length=0)
    return _titled(grid, title, f"{device} · stock's time / fastnorm's; red is slower")


def _draw_map(data: pd.DataFrame, **_: Any) -> None:
    """Speed-ups as coloured cells with their value, on a log scale: 1.00 white, 0.5 the deepest red, the best blue."""
    cells = data.pivot(index="rows", columns="columns", values="speedup_vs_torch").sort_index(ascending=False)
    shade = TwoSlopeNorm(0, vmin=-1, vmax=1.3 * max(1.0, np.log2(cells).max(axis=None)))
    sns.heatmap(np.log2(cells), annot=cells, fmt=".2f", cmap="RdBu", norm=shade, cbar=False, linewidths=2)
