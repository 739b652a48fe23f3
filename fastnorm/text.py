"""Plain-text tables for reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table with a rule under its headers. Columns whose index is in `numbers` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    signs = [">" if i in numbers else "<" for i in range(len(widths))]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, signs, widths, strict=True)
        return "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in columns).rstrip()

    return "\n".join((line(headers), "  ".join("-" * width for width in widths), *map(line, rows)))
