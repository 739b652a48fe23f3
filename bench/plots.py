"""PNG figures: GB/s over the shapes with the copy ceiling drawn, and a map of speed-ups over rows and columns."""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .operation import Shape, shape_name
from .report import mode_label
from .run import Result

AUTOMATIC = "fastnorm"
COLOURS = {
    "torch": "#b5525c",
    "compile": "#d9963a",
    "fastnorm": "#0b6e75",
    "fastnorm-triton": "#3fa7ad",
    "fastnorm-native": "#3fa7ad",
    "fastnorm-reference": "#93c4c7",
    "liger": "#7a5ea8",
    "quack": "#4c78a8",
    "apex": "#6b8f3c",
    "apex-nhwc": "#6b8f3c",
}
DASHES = {"fastnorm-triton": (4, 2), "fastnorm-native": (2, 1.5), "fastnorm-reference": (1, 1.5)}
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": "#222222",
    "savefig.dpi": 150,
}
INK, CEILING = "#222222", "#8c8c8c"
PANEL_WIDTH, PANEL_HEIGHT, TITLE_HEIGHT = 4.3, 2.9, 0.66  # inches
LEGEND_ENTRY_WIDTH = 1.9


@dataclass(frozen=True)
class Panel:
    """One mode, dtype and layout of one operation."""

    mode: str
    dtype: str
    layout: str
    results: list[Result]

    @property
    def title(self) -> str:
        """What the panel shows; the usual layout goes without saying."""
        layout = () if self.layout == "contiguous" else (self.layout,)
        return " · ".join((mode_label(self.mode), self.dtype, *layout))


@dataclass(frozen=True)
class Axis:
    """Where shapes stand: (rows, cols) at the logarithm of their width, other shapes side by side in their order."""

    name: str
    shapes: list[Shape]

    @classmethod
    def of(cls, results: list[Result]) -> "Axis":
        """The axis for all shapes of the results."""
        shapes = list(dict.fromkeys(result.lengths for result in results))
        return cls("columns" if len(shapes[0]) == 2 else "shape", shapes)

    def at(self, shape: Shape) -> float:
        """The position of a shape."""
        return self.shapes.index(shape) if self.name == "shape" else math.log2(shape[1])

    def draw(self, ax: Axes) -> None:
        """Ticks and labels; of many widths only powers of two are labelled."""
        ax.xaxis.set_minor_locator(FixedLocator([self.at(shape) for shape in self.shapes]))
        if self.name == "shape":
            ax.set_xticks(range(len(self.shapes)), map(shape_name, self.shapes), rotation=40, ha="right", size=8)
        else:
            widths = sorted(shape[1] for shape in self.shapes)
            labelled = widths if len(widths) <= 4 else [width for width in widths if width & (width - 1) == 0]
            ax.set_xticks([math.log2(width) for width in labelled], labelled)


def write(directory: Path, stem: str, device: str, large_copy: float, results: list[Result]) -> list[Path]:
    """Draw every operation of `results` into `directory`, and return the paths of the PNG files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for operation in dict.fromkeys(result.operation for result in results):
        timed = [r for r in results if r.operation == operation and r.is_timed]
        with matplotlib.rc_context(STYLE):
            if timed:
                figure = _throughput(operation, device, large_copy, _tallest(timed))
                paths.append(_save(figure, directory / f"{stem}-{operation}.png"))
            if _is_grid(timed):
                figure = _speedup_map(operation, device, [r for r in timed if r.provider == AUTOMATIC])
                paths.append(_save(figure, directory / f"{stem}-{operation}-speedup.png"))
    return paths


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, facecolor="white")
    return path


def _tallest(results: list[Result]) -> list[Result]:
    """At each width the case with the most rows, where one was timed at several; shapes other than that are kept."""
    rows: dict[Shape, int] = {}
    for n_rows, *rest in (result.lengths for result in results):
        rows[tuple(rest)] = max(n_rows, rows.get(tuple(rest), 0))
    return [r for r in results if len(r.lengths) > 2 or r.lengths[0] == rows[r.lengths[1:]]]


def _panels(results: list[Result]) -> list[list[Panel]]:
    """Modes down, dtypes and layouts across."""
    modes = dict.fromkeys(result.mode for result in results)
    kinds = dict.fromkeys((result.dtype, result.layout) for result in results)
    return [
        [Panel(m, *kind, [r for r in results if (r.mode, r.dtype, r.layout) == (m, *kind)]) for kind in kinds]
        for m in modes
    ]


def _figure(
    panels: list[list[Panel]], title: str, subtitle: str, panel_height: float
) -> tuple[Figure, list[list[Axes]]]:
    """A grid of panels under a left-aligned title, each panel with its own."""
    down, across = len(panels), len(panels[0])
    height, width = panel_height * down + TITLE_HEIGHT, max(PANEL_WIDTH * across, 6.4)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    figure.get_layout_engine().set(rect=(0.005, 0.01, 0.985, 0.99 - TITLE_HEIGHT / height), h_pad=0.09, w_pad=0.09)
    figure.text(0.15 / width, 1 - 0.16 / height, title, size=14, weight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.44 / height, subtitle, size=9.5, color="#666666", va="top")
    for panel_row, axes_row in zip(panels, axes, strict=True):
        for panel, ax in zip(panel_row, axes_row, strict=True):
            ax.set_title(panel.title, loc="left", color=INK)
    return figure, axes.tolist()


def _throughput(operation: str, device: str, large_copy: float, results: list[Result]) -> Figure:
    axis, panels = Axis.of(results), _panels(results)
    rows = sorted({shape[0] for shape in axis.shapes})
    rows_label = f"{rows[0]} rows" if len(rows) == 1 else f"{rows[0]} to {rows[-1]} rows"
    subtitle = device if axis.name == "shape" else f"{device} · {rows_label}"
    figure, axes = _figure(panels, f"{operation}: throughput", subtitle, PANEL_HEIGHT)
    entries: dict[str, object] = {}  # what the legend names
    for panel_row, axes_row in zip(panels, axes, strict=True):
        for panel, ax in zip(panel_row, axes_row, strict=True):
            entries |= _draw_lines(ax, axis, panel.results, large_copy)
        axes_row[0].set_ylabel("GB/s")
    for ax in axes[-1]:
        ax.set_xlabel(axis.name)
    order = [*(name for name in COLOURS if name in entries), *(name for name in entries if name not in COLOURS)]
    figure.legend(
        [entries[name] for name in order], order, loc="outside lower left", frameon=False, handlelength=2.2,
        ncols=int(figure.get_figwidth() / LEGEND_ENTRY_WIDTH), columnspacing=1.4,
    )  # fmt: skip
    return figure


def _draw_lines(ax: Axes, axis: Axis, results: list[Result], large_copy: float) -> dict[str, object]:
    """One panel; returns what it drew by legend entry."""
    if not results:
        ax.text(0.5, 0.5, "nothing timed", transform=ax.transAxes, ha="center")
        return {}
    ceiling = sorted({axis.at(result.lengths): result.ceiling_gb_per_s for result in results}.items())
    line = ax.plot(*zip(*ceiling, strict=True), color=CEILING, lw=1.1, marker="_", ms=7, zorder=2)[0]
    ax.fill_between(*zip(*ceiling, strict=True), color="#f1f1f1", lw=0, zorder=0)
    entries = {"copy of the same size": line}
    entries["copy beyond all caches"] = ax.axhline(large_copy, color=CEILING, lw=1, ls=(0, (1, 2)), zorder=1)
    for provider in dict.fromkeys(result.provider for result in results):
        points = sorted((axis.at(r.lengths), r.gb_per_s) for r in results if r.provider == provider)
        main = provider == AUTOMATIC
        entries[provider] = ax.plot(
            *zip(*points, strict=True), label=provider, color=COLOURS.get(provider, INK), lw=2.4 if main else 1.5,
            marker="o", ms=5 if main else 3.5, dashes=DASHES.get(provider, ()), zorder=5 if main else 4,
        )[0]  # fmt: skip
    axis.draw(ax)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="#e3e3e3", lw=0.6)
    ax.set_axisbelow(True)
    return entries


def _is_grid(results: list[Result]) -> bool:
    """Whether a map has something to show: several row counts by several widths, against stock."""
    mine = [r for r in results if r.provider == AUTOMATIC and r.speedup_vs_torch is not None]
    shapes = {r.lengths for r in mine if len(r.lengths) == 2}
    rows, cols = {shape[0] for shape in shapes}, {shape[1] for shape in shapes}
    return min(len(rows), len(cols)) > 1 and len(shapes) > len(rows) * len(cols) / 2


def _speedup_map(operation: str, device: str, results: list[Result]) -> Figure:
    rows, cols = (sorted({r.lengths[dim] for r in results}) for dim in (0, 1))
    panels = _panels(results)
    height = 0.42 * len(rows) + 0.95
    subtitle = f"{device} · stock's time / fastnorm's; red is slower"
    figure, axes = _figure(panels, f"{operation}: speed-up over stock", subtitle, height)
    for panel_row, axes_row in zip(panels, axes, strict=True):
        for panel, ax in zip(panel_row, axes_row, strict=True):
            _draw_map(ax, panel.results, rows, cols)
        axes_row[0].set_ylabel("rows")
    for ax in axes[-1]:
        ax.set_xlabel("columns")
    return figure


def _draw_map(ax: Axes, results: list[Result], rows: list[int], cols: list[int]) -> None:
    """Speed-ups as coloured cells with their value, on a log scale: 1.00 white, 0.5 the deepest red, the best blue."""
    cells = [[math.nan] * len(cols) for _ in rows]
    for result in results:
        n_rows, n_cols = result.lengths
        cells[rows.index(n_rows)][cols.index(n_cols)] = math.log2(result.speedup_vs_torch)
    best = max(1.0, *(value for row in cells for value in row if not math.isnan(value)))
    shade = TwoSlopeNorm(0, vmin=-1, vmax=1.3 * best)
    ax.imshow(cells, cmap="RdBu", norm=shade, aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if abs(shade(value) - 0.5) > 0.28 else INK
                weight = "bold" if value < 0 else "normal"
                ax.text(x, y, f"{2**value:.2f}", ha="center", va="center", size=8.5, color=colour, weight=weight)
    ax.set_xticks(range(len(cols)), cols)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks([x + 0.5 for x in range(len(cols) - 1)], minor=True)
    ax.set_yticks([y + 0.5 for y in range(len(rows) - 1)], minor=True)
    ax.grid(which="minor", color="white", lw=2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
