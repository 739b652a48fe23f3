"""The report of `convert`: one line for each norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..text import table


@dataclass(frozen=True)
class NormReport:
    """One norm of the model.

    Attributes:
        name: as in named_modules(); "" for the model itself.
        original: package and class of the norm before `convert`.
        replacement: fastnorm's class that computes it, with its options; None for a norm that was left.
        backend: the backend that serves its device and dtype; None for a norm that was left.
        reason: why the norm was left; "" for one that was swapped.
        aliases: its other names, if the module is shared.
    """

    name: str
    original: str
    replacement: str | None = None
    backend: str | None = None
    reason: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """The result of `convert`. `print` shows it as a table.

    Attributes:
        norms: every norm found, swapped or left, in the model's order.
    """

    norms: tuple[NormReport, ...]

    @property
    def swapped(self) -> tuple[NormReport, ...]:
        """The norms that were swapped."""
        return tuple(norm for norm in self.norms if norm.replacement is not None)

    @property
    def left(self) -> tuple[NormReport, ...]:
        """The norms that were left as they are, each with its reason."""
        return tuple(norm for norm in self.norms if norm.replacement is None)

    def __str__(self) -> str:
        rows = [
            (" = ".join((norm.name or "(the model)", *norm.aliases)), norm.original, norm.replacement or "–",
             norm.backend or "–", norm.reason) for norm in self.norms
        ]  # fmt: skip
        summary = f"{len(self.swapped)} norms swapped, {len(self.left)} left"
        return "\n".join((table(("name", "from", "to (fastnorm)", "backend", "reason when left"), rows), summary))

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        norms = [asdict(norm) | {"aliases": list(norm.aliases)} for norm in self.norms]
        return {"norms": norms, "swapped": len(self.swapped), "left": len(self.left)}
