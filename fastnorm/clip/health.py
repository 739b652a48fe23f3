"""Diagnosis of a model's gradients: which vanish, explode, are uneven or not finite."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..text import table
from . import lists
from .norms import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEALTHY, VANISHING, EXPLODING, NONFINITE, MISSING = "", "vanishing", "exploding", "non-finite", "no gradient"


@dataclass(frozen=True)
class GradientNorm:
    """One parameter's gradient.

    Attributes:
        name: the parameter's name.
        size: its number of elements.
        norm: the L2 norm of its gradient; None without a gradient.
        flag: "" or what is wrong: "vanishing", "exploding", "non-finite" or "no gradient".
    """

    name: str
    size: int
    norm: float | None
    flag: str = HEALTHY


@dataclass(frozen=True)
class GradientHealth:
    """The result of `gradient_health`. `print` shows it as a table.

    Attributes:
        parameters: one entry for each parameter, in the model's order, which is taken for its depth.
        total_norm: L2 norm of all gradients together.
        ratio: largest norm / smallest norm, of those that are finite and above 0; None if there are none.
        diagnosis: the findings in words.
        vanishing_below: norms below it are vanishing.
        exploding_above: norms above it are exploding.
        ratio_above: ratios above it are uneven.
    """

    parameters: tuple[GradientNorm, ...]
    total_norm: float
    ratio: float | None
    diagnosis: str
    vanishing_below: float
    exploding_above: float
    ratio_above: float

    def flagged(self, flag: str) -> tuple[str, ...]:
        """The names of the parameters with this flag."""
        return tuple(p.name for p in self.parameters if p.flag == flag)

    @property
    def vanishing(self) -> tuple[str, ...]:
        """Names of the parameters whose norm is below `vanishing_below`, zero included."""
        return self.flagged(VANISHING)

    @property
    def exploding(self) -> tuple[str, ...]:
        """Names of the parameters whose norm is above `exploding_above`."""
        return self.flagged(EXPLODING)

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters whose norm is NaN or infinite."""
        return self.flagged(NONFINITE)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """Names of the parameters whose `.grad` is None."""
        return self.flagged(MISSING)

    @property
    def uneven(self) -> bool:
        """Whether the ratio is above `ratio_above`."""
        return self.ratio is not None and self.ratio > self.ratio_above

    @property
    def healthy(self) -> bool:
        """Whether there are gradients, and none of them is vanishing, exploding or non-finite."""
        return any(p.norm is not None for p in self.parameters) and not (
            self.vanishing or self.exploding or self.nonfinite
        )

    def __str__(self) -> str:
        rows = [(p.name, f"{p.size:,}", "" if p.norm is None else f"{p.norm:.3e}", p.flag) for p in self.parameters]
        ratio = "–" if self.ratio is None else f"{self.ratio:.3g}" + (" (uneven)" if self.uneven else "")
        summary = f"total norm {self.total_norm:.3e}, largest / smallest {ratio}"
        headers = ("parameter", "size", "gradient norm", "flag")
        return "\n".join((table(headers, rows, numbers=(1, 2)), summary, self.diagnosis))

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON. A norm that is not finite is None there, and its flag says so."""
        result = asdict(self)
        result["parameters"] = [p | {"norm": finite(p["norm"])} for p in result["parameters"]]
        result["total_norm"] = finite(self.total_norm)
        return result | {"uneven": self.uneven, "healthy": self.healthy}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the norms over depth on a log scale, with the names of flagged parameters.

        Norms that a log scale can't show (0, NaN, inf) are drawn at the nearest edge.

        Args:
            ax: where to draw; None makes a new figure.

        Returns:
            The Axes.

        Raises:
            ImportError: without matplotlib.
        """
        pyplot = pyplot_for("GradientHealth.plot")
        if ax is None:
            _, ax = pyplot.subplots(figsize=(9, 4), layout="constrained")
        _draw(self, ax)
        return ax


@torch.no_grad()
def gradient_health(
    model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    vanishing_below: float = 1e-7,
    exploding_above: float = 1e3,
    ratio_above: float = 100.0,
) -> GradientHealth:
    """Measures all gradients of a model and finds what is wrong with them, in one pass and with one host sync.

    Call it after `backward()`. It changes nothing.

    Args:
        model_or_named_parameters: a module, or (name, parameter) pairs from the input side to the output side.
        vanishing_below: lower bound of a healthy L2 norm of one parameter's gradient.
        exploding_above: upper bound of it.
        ratio_above: largest norm / smallest norm above which the norms are uneven.

    Returns:
        The norms, flags and a diagnosis, to be printed or plotted.

    Raises:
        TypeError: for anything but a module or named parameters.
        ValueError: for bounds out of order.
    """
    check_bounds(vanishing_below, exploding_above, ratio_above)
    names, parameters = _named(model_or_named_parameters)
    total_norm, norms = _read_norms([p.grad for p in parameters])
    sizes = [parameter.numel() for parameter in parameters]
    return judge(names, sizes, norms, total_norm, (vanishing_below, exploding_above, ratio_above))


def check_bounds(vanishing_below: float, exploding_above: float, ratio_above: float) -> None:
    if not 0 <= vanishing_below < exploding_above:
        raise ValueError(f"vanishing_below must be at least 0 and below exploding_above, but got {vanishing_below} "
                         f"and {exploding_above}")  # fmt: skip
    if not ratio_above >= 1:
        raise ValueError(f"ratio_above must be at least 1, but got {ratio_above}")


def judge(
    names: Sequence[str],
    sizes: Sequence[int],
    norms: Sequence[float | None],
    total_norm: float,
    bounds: tuple[float, float, float],
) -> GradientHealth:
    """Flags and diagnosis of norms that are on the host. bounds: vanishing_below, exploding_above, ratio_above."""
    vanishing_below, exploding_above, ratio_above = bounds
    rows = [
        GradientNorm(name, size, norm, flag_of(norm, size, vanishing_below, exploding_above))
        for name, size, norm in zip(names, sizes, norms, strict=True)
    ]
    usable = [norm for norm in norms if norm is not None and 0 < norm < math.inf]
    ratio = max(usable) / min(usable) if usable else None
    return GradientHealth(tuple(rows), total_norm, ratio, _diagnose(rows, ratio, ratio_above), *bounds)


def _named(model_or_named_parameters: Any) -> tuple[list[str], list[Tensor]]:
    given = model_or_named_parameters
    if not isinstance(given, (nn.Module, Iterable)):
        raise TypeError(f"gradient_health takes a module or (name, parameter) pairs, but got {type(given).__name__}")
    parameters, names = lists.listed(given.named_parameters() if isinstance(given, nn.Module) else given)
    if parameters and names is None:
        raise TypeError("gradient_health needs names: give a module or model.named_parameters()")
    return names or [], parameters


def _read_norms(grads: Sequence[Tensor | None]) -> tuple[float, list[float | None]]:
    """The total norm and each norm as numbers, by one copy to the host."""
    present = [dense(grad) for grad in grads if grad is not None]
    if not present:
        return 0.0, [None] * len(grads)
    total_norm, _, _, norms = measure(present, 2.0, math.inf)
    total, *values = torch.cat((total_norm.reshape(1), norms)).tolist()
    remaining = iter(values)
    return total, [None if grad is None else next(remaining) for grad in grads]


def dense(grad: Tensor) -> Tensor:
    """A sparse gradient's values, with duplicate rows added up; a strided one as it is."""
    if grad.layout is torch.strided:
        return grad
    return grad.coalesce().values() if grad.is_sparse else grad.values()


def flag_of(norm: float | None, size: int, vanishing_below: float, exploding_above: float) -> str:
    """What is wrong with a gradient of `size` elements; None: there is none."""
    if norm is None:
        return MISSING
    if not math.isfinite(norm):
        return NONFINITE
    if norm < vanishing_below and size > 0:
        return VANISHING
    return EXPLODING if norm > exploding_above else HEALTHY


def _diagnose(rows: Sequence[GradientNorm], ratio: float | None, ratio_above: float) -> str:
    """The findings in words, the worst first."""
    present = [row for row in rows if row.norm is not None and row.size > 0]
    if not present:
        return "no gradients: call backward() first" if rows else "no parameters"
    findings = []
    for flag in (NONFINITE, EXPLODING, VANISHING):
        flagged = [i for i, row in enumerate(present) if row.flag == flag]
        if flagged:
            some = f"{len(flagged)} of {len(present)}, the first is {present[flagged[0]].name}"
            findings.append(f"{_where(flagged, len(present))} {flag} gradients ({some})")
    uneven = ratio is not None and ratio > ratio_above
    if uneven:
        trend = _trend(present, ratio_above)
        findings.append(f"norms are uneven: the largest is {ratio:.3g} times the smallest{trend}")
    missing = sum(row.norm is None for row in rows)
    if missing:
        findings.append(f"{missing} of {len(rows)} parameters have no gradient")
    return "; ".join(findings if any(row.flag for row in present) or uneven else ["healthy", *findings])


def _where(flagged: Sequence[int], count: int) -> str:
    """Where the flagged positions are in depth: within one half, or without a gap up to one end, or elsewhere."""
    first, last = flagged[0], flagged[-1]
    if len(flagged) == count:
        return "all layers have"
    if last < count / 2 or last == len(flagged) - 1:
        return "early layers have"
    return "late layers have" if first >= count / 2 or first == count - len(flagged) else "some layers have"


def _trend(present: Sequence[GradientNorm], ratio_above: float) -> str:
    """Whether norms grow or shrink over depth, by the medians of the first and the last third."""
    norms = [row.norm for row in present if row.norm is not None and 0 < row.norm < math.inf]
    third = len(norms) // 3
    if third == 0:
        return ""
    early, late = statistics.median(norms[:third]), statistics.median(norms[-third:])
    if max(early, late) <= math.sqrt(ratio_above) * min(early, late):
        return ""
    course = "vanish towards the early layers" if early < late else "grow towards the early layers"
    return f", and norms {course} (median {early:.1e} in the first third, {late:.1e} in the last)"


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def pyplot_for(user: str) -> Any:
    """matplotlib.pyplot, or an ImportError that says who needs it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{user} needs matplotlib: pip install matplotlib") from error
    return pyplot


COLOURS = {HEALTHY: "#0b6e75", VANISHING: "#d9963a", EXPLODING: "#b5525c", NONFINITE: "#7a3f9d"}


def _draw(health: GradientHealth, ax: Axes) -> None:
    """Draws norms over depth, bounds as lines, and flagged parameters in a colour and by name."""
    rows = [(i, p.name, p.norm, p.flag) for i, p in enumerate(health.parameters) if p.norm is not None]
    usable = [norm for _, _, norm, _ in rows if 0 < norm < math.inf] or [1.0]
    bottom, top = min(usable) / 10, max(usable) * 10
    heights = {i: bottom if norm == 0 else norm if norm < math.inf else top for i, _, norm, _ in rows}
    line = [math.nan if flag == NONFINITE else heights[i] for i, _, _, flag in rows]  # NaN leaves a gap
    ax.plot(list(heights), line, color="#c9d6d8", linewidth=1, zorder=1)
    for kind, colour in COLOURS.items():
        here = {i: name for i, name, _, flag in rows if flag == kind}
        if here:
            ax.scatter(list(here), [heights[i] for i in here], 18, colour, label=kind or "in bounds", zorder=2)
        for i, name in here.items() if kind else ():
            ax.annotate(
                name, (i, heights[i]), (2, 4), textcoords="offset points", fontsize=7, color=colour, rotation=35,
                annotation_clip=True,
            )  # fmt: skip
    ax.set_yscale("log")
    for bound, flag in ((health.vanishing_below, VANISHING), (health.exploding_above, EXPLODING)):
        if bottom < bound < top:
            ax.axhline(bound, color=COLOURS[flag], linewidth=0.8, linestyle="--")
    ax.set(xlabel="parameter, from the input on", ylabel="gradient norm")
    ax.margins(y=0.15)
    ax.set_title(health.diagnosis, fontsize=9, wrap=True)
    if rows:
        ax.legend(frameon=False, fontsize=8)
