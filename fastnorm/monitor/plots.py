"""The monitor's figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress, pairwise
from typing import TYPE_CHECKING

import torch

from ..clip.health import COLOURS, EXPLODING, HEALTHY, NONFINITE, VANISHING, pyplot_for
from .records import Names, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = 40  # names that fit beside the heat map


def draw(records: Sequence[Record], names: Names, figure: Figure | None) -> Figure:
    """Total norm above, the norms of all groups as a heat map below, over the same steps."""
    if figure is None:
        figure = pyplot_for("Monitor.plot").figure(figsize=(9, 7), layout="constrained")
    elif not hasattr(figure, "add_subplot"):
        raise TypeError(f"figure must be a matplotlib Figure or None, but got {type(figure).__name__}; to save a file, "
                        'call savefig("run.png") of the figure that plot() returns')  # fmt: skip
    totals, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _draw_totals(records, totals)
    _draw_heat(records, names, heat)
    return figure


def _draw_totals(records: Sequence[Record], ax: Axes) -> None:
    """Norms that a log scale can't show are drawn at the nearest edge."""
    usable = [r.total_norm for r in records if 0 < r.total_norm < math.inf] or [1.0]
    bottom, top = min(usable) / 2, max(usable) * 2
    heights = [bottom if r.total_norm == 0 else r.total_norm if r.total_norm < math.inf else top for r in records]
    steps = [r.step for r in records]
    ax.plot(steps, heights, color=COLOURS[HEALTHY], linewidth=1, label="total norm", zorder=1)
    thresholds = [r.threshold if r.threshold < math.inf else math.nan for r in records]
    if not all(map(math.isnan, thresholds)):
        ax.plot(steps, thresholds, color=COLOURS[EXPLODING], linewidth=0.8, linestyle="--", label="threshold")
    marks = {
        "clipped": ([r.clipped for r in records], "o", COLOURS[VANISHING]),
        "spike": ([r.spike is not None for r in records], "^", COLOURS[EXPLODING]),
        "skipped": ([r.skipped for r in records], "x", COLOURS[NONFINITE]),
    }
    for label, (wanted, marker, colour) in marks.items():
        if any(wanted):
            x, y = list(compress(steps, wanted)), list(compress(heights, wanted))
            ax.scatter(x, y, s=14, c=colour, marker=marker, label=label, zorder=2)
    ax.set_yscale("log")
    ax.set(ylabel="total norm")
    ax.legend(frameon=False, fontsize=8)


def _draw_heat(records: Sequence[Record], names: Names, ax: Axes) -> None:
    """log10 of the norms, the model's first layer above. White: no gradient, 0, NaN or infinite."""
    count = len(names.groups)
    norms = torch.stack([r.series["gradient_norm"] for r in records]) if records else torch.ones(1, count, device="cpu")
    logs = norms.log10()
    picture = ax.pcolormesh(
        _edges([r.step for r in records] or [0]), range(count + 1), logs.where(logs.isfinite(), math.nan).T.numpy(),
        cmap="viridis",
    )  # fmt: skip
    ax.invert_yaxis()
    if count <= _LABELS:
        ax.set_yticks([i + 0.5 for i in range(count)], names.groups, fontsize=7)
    else:
        ax.set_ylabel("parameter, from the input on")
    ax.set_xlabel("step")
    bar = ax.figure.colorbar(picture, ax=ax)
    bar.set_label("log10 of the gradient norm")


def _edges(steps: list[int]) -> list[float]:
    """The borders of the steps' columns."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - 0.5, *middles, steps[-1] + 0.5]
