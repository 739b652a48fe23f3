"""The report of `convert`: one line for each norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import ref

from torch import nn

from ..text import table
from .estimate import ConversionEstimate
from .measure import estimated


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
    _model: ref[nn.Module] | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConversionReport, (self.norms,)  # a pickle doesn't know the model

    @property
    def swapped(self) -> tuple[NormReport, ...]:
        """The norms that were swapped."""
        return tuple(norm for norm in self.norms if norm.replacement is not None)

    @property
    def left(self) -> tuple[NormReport, ...]:
        """The norms that were left as they are, each with its reason."""
        return tuple(norm for norm in self.norms if norm.replacement is None)

    def estimate(self, *args: Any, **kwargs: Any) -> ConversionEstimate:
        """Times the swapped norms beside their originals, on inputs like those that a run of the model gives to them.

        The model runs forward a few times, in its mode; in training the norms' backward is timed too. Each kind of norm
        and input is timed once, in turns with its original, with torch.utils.benchmark. Parameters, gradients, buffers,
        hooks, mode and random numbers of torch stay as they were, also if the model raises.

        Args:
            *args: the inputs of the model's forward.
            **kwargs: those by keyword.

        Returns:
            Milliseconds of the norms before and after, and of the whole pass, to be printed.

        Raises:
            TypeError: without inputs.
            ValueError: if no norm was swapped, or the model calls none; if the model is gone or reverted, has
                uninitialised or sharded parameters, or lies on a device other than a CPU or a CUDA GPU.

        What the model raises is passed on.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise ValueError("estimate: the model of this report is gone, or the report was pickled without it")
        return estimated(model, {norm.name: str(norm.replacement) for norm in self.swapped}, args, kwargs)

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
