"""What `convert` did: one line a norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..text import table


@dataclass(frozen=True)
class NormReport:
    """One norm of the model.

    name: as in named_modules(), "" for the model itself; aliases: its other names, if it is shared.
    original: package and class that it has, or had. replacement: the class of fastnorm that computes it now, with its
    options, and backend: what serves its device and dtype; both are None for a norm that was left alone for the reason.
    """

    name: str
    original: str
    replacement: str | None = None
    backend: str | None = None
    reason: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` found, in the model's order; `print` shows it as a table.

    norms: every norm that it saw, swapped or not.
    """

    norms: tuple[NormReport, ...]

    @property
    def swapped(self) -> tuple[NormReport, ...]:
        """The norms that are fastnorm's now."""
        return tuple(norm for norm in self.norms if norm.replacement is not None)

    @property
    def left(self) -> tuple[NormReport, ...]:
        """The norms that were left alone, with the reason of each."""
        return tuple(norm for norm in self.norms if norm.replacement is None)

    def __str__(self) -> str:
        rows = [
            (" = ".join((norm.name or "(the model)", *norm.aliases)), norm.original, norm.replacement or "–",
             norm.backend or "–", norm.reason) for norm in self.norms
        ]  # fmt: skip
        summary = f"{len(self.swapped)} norms swapped, {len(self.left)} left"
        return "\n".join((table(("name", "from", "to (fastnorm)", "backend", "reason when left"), rows), summary))

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        norms = [asdict(norm) | {"aliases": list(norm.aliases)} for norm in self.norms]
        return {"norms": norms, "swapped": len(self.swapped), "left": len(self.left)}
