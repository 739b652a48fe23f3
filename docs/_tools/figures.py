"""The figures of docs/figures: speed-ups over stock PyTorch, drawn from the files in bench/results.

`python docs/_tools/figures.py` writes them anew. They are plain SVG without fonts of their own: the same everywhere.
"""

import json
import math
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "figures"
GRID = "intel-xeon-processor-2-threads-row_norms-grid.json"
CHANNELS = "intel-xeon-processor-2-threads-batch_norm-group_norm-custom.json"
CLIP = "clip-intel-xeon-processor-2-threads.json"
WIDTH, LEFT, RIGHT, TOP, BAR = 540, 150, 56, 78, 17
COLOURS = ("#0b6e75", "#d9963a", "#7a3f9d")

Bars = list[tuple[str, list[tuple[str, float]]]]  # a label, and its bars: what each is, and its speed-up


def load(name: str) -> tuple[str, list[dict]]:
    """The machine, and fastnorm's results."""
    document = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return document["machine"]["device"].replace("(R)", ""), document["results"]


def row_norm(operation: str) -> tuple[str, Bars]:
    device, results = load(GRID)
    bars: Bars = []
    for cols in (64, 256, 1024, 4096, 16384):
        found = [r for r in results if r["shape"] == f"2048x{cols}" and r["operation"] == operation]
        bars.append((f"2048 × {cols}", _by_dtype(found)))
    return device, bars


def channel_norm(operations: dict[str, str], shape: str) -> tuple[str, Bars]:
    """operations: their names in the file, and what the figure calls them."""
    device, results = load(CHANNELS)
    bars: Bars = []
    for operation, label in operations.items():
        for layout in ("contiguous", "channels_last"):
            case = operation, shape, layout
            found = [r for r in results if (r["operation"], r["shape"], r["layout"]) == case]
            bars.append((f"{label}\n{layout}", _by_dtype(found)))
    return device, bars


def clip() -> tuple[str, Bars]:
    """Without the policies, which are compared with fastnorm's own clip."""
    device, results = load(CLIP)
    results = [r for r in results if not r["baseline"].startswith("fastnorm")]
    bars: Bars = []
    cases = dict.fromkeys((r["operation"], r["list"]) for r in results)
    for operation, name in cases:
        found = [r for r in results if (r["operation"], r["list"]) == (operation, name)]
        best = "fastnorm-deferred" if operation.startswith("clip and") else "fastnorm"
        ours = [(r["case"], r["speedup"]) for r in found if r["provider"] == best]
        bars.append((f"{operation}\n{name}", ours))
    return device, bars


def _by_dtype(results: list[dict]) -> list[tuple[str, float]]:
    ours = [r for r in results if r["provider"] == "fastnorm" and r["mode"] == "forward_backward"]
    ours = [r for r in ours if r.get("memory", "in use") == "in use"]
    return [(r["dtype"], r["speedup_vs_torch"]) for r in ours]


def draw(title: str, subtitle: str, bars: Bars) -> str:
    """Horizontal bars on a log scale from 0.5×; the line is stock PyTorch's time."""
    kinds = list(dict.fromkeys(kind for _, group in bars for kind, _ in group))
    most = max(2.0, *(value for _, group in bars for _, value in group))

    def x(value: float) -> float:
        share = math.log(max(value, 0.5) / 0.5) / math.log(most / 0.5)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [_text(0, 20, title, 16, weight="bold"), _text(0, 41, subtitle, 13.5, "#555")]
    for i, kind in enumerate(kinds):
        parts.append(f'<rect x="{LEFT + 115 * i}" y="52" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(_text(LEFT + 115 * i + 18, 63, kind, 14))
    y = TOP
    for label, group in bars:
        middle = y + BAR * len(group) / 2
        lines = label.split("\n")
        for i, line in enumerate(lines):
            parts.append(_text(LEFT - 8, middle + 4 + 15 * (i - (len(lines) - 1) / 2), line, 14, anchor="end"))
        for kind, value in group:
            colour, length = COLOURS[kinds.index(kind)], x(value) - LEFT
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(_text(LEFT + length + 5, y + BAR - 4, f"{value:.2f}×", 13))
            y += BAR
        y += 9
    line = f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{TOP - 6}" y2="{y}" stroke="#222" stroke-dasharray="4 3"/>'
    parts += [line, _text(x(1), y + 15, "stock's time = 1×", 13, "#555", anchor="middle")]
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 24}" font-family="sans-serif"'
    background = f'<rect width="{WIDTH}" height="{y + 24}" fill="#fff"/>'
    return "\n".join([f'<svg {box} role="img">', f"<title>{escape(title)}</title>", background, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, size: float, fill="#111", anchor="start", weight="normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"'
    return f'<text {place} text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def figures() -> dict[str, str]:
    """Every figure by its file's name."""
    classes = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "add_rms_norm": "AddRMSNorm",
               "add_layer_norm": "AddLayerNorm"}  # fmt: skip
    drawings = {name: (f"{title}, forward + backward", *row_norm(name)) for name, title in classes.items()}
    training = {"": "alone", "_relu": "ReLU", "_add_relu": "residual + ReLU"}
    drawings["batch_norm"] = (
        "BatchNorm2d in training, 32 × 64 × 56 × 56, forward + backward",
        *channel_norm({f"batch_norm_training{end}": label for end, label in training.items()}, "32x64x56x56"),
    )
    drawings["group_norm"] = (
        "GroupNorm, 2 × 320 × 64 × 64, forward + backward",
        *channel_norm({"group_norm_plain": "alone", "group_norm_silu": "SiLU"}, "2x320x64x64"),
    )
    drawings["clipping"] = ("Clipping, fp32: against torch, adaptive against timm", *clip())
    subtitle = "speed-up over stock, measured on a CPU: {}"
    return {f"{name}.svg": draw(title, subtitle.format(on), bars) for name, (title, on, bars) in drawings.items()}


def main() -> None:
    for name, drawing in figures().items():
        (FIGURES / name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
