"""Figures and tables as people read them, by the standard library alone: `make card` runs where nothing else is."""

from collections.abc import Iterable, Sequence

LOSS = 0.98  # what is slower than this is marked in documents


def mode_label(mode: str) -> str:
    """A mode as people write it."""
    return mode.replace("_", " + ")


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds * 1e9:.0f} ns"


def ratio(speedup: float | None) -> str:
    """A speed-up, with a mark where it is a loss."""
    return "–" if speedup is None else f"{speedup:.2f}x" + " ▼" * is_loss(speedup)


def is_loss(speedup: float) -> bool:
    """Whether it is slower by as much as two digits show."""
    return round(speedup, 2) < 1


def speedup(value: float | None) -> str:
    """A speed-up in a document, with a mark where it is a loss beyond noise."""
    return "" if value is None else f"{value:.2f}×" + " ▼" * (value < LOSS)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows of text in columns, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def github(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, ("---",) * len(headers), *rows))


def absences(absent: dict[str, dict[str, str]]) -> str:
    """Which providers are missing, with the reason and the operations it holds for; "" if none is."""
    lines = []
    for provider, reason in dict.fromkeys(missing for reasons in absent.values() for missing in reasons.items()):
        operations = [operation for operation, reasons in absent.items() if reasons.get(provider) == reason]
        where = "" if len(operations) == len(absent) else f" ({', '.join(operations)})"
        lines.append(f"  {provider}: {reason}{where}")
    return "\n".join(("absent:", *lines)) if lines else ""
