"""What the gradients of a model look like: vanishing, exploding, uneven, not finite; and which activations are dead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..text import table
from . import lists
from .norms import measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEALTHY, VANISHING, EXPLODING, NONFINITE, MISSING = "", "vanishing", "exploding", "non-finite", "no gradient"
RELU_LIKE = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink)


@dataclass(frozen=True)
class GradientNorm:
    """One parameter: its number of elements, its gradient's L2 norm (None without a gradient), and what is wrong."""

    name: str
    size: int
    norm: float | None
    flag: str = HEALTHY


@dataclass(frozen=True)
class GradientHealth:
    """What `gradient_health` found. `print` shows it as a table; `to_dict()` and `plot()` are for programs and eyes.

    parameters: in the model's order, which is taken for its depth.
    total_norm: L2 norm of all gradients together.
    ratio: largest norm / smallest, of those that are finite and above zero; None if there are none.
    diagnosis: the findings in words.
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
        """All of it for JSON: a norm that is not finite is None, and its flag says so."""
        result = asdict(self)
        result["parameters"] = [p | {"norm": _finite(p["norm"])} for p in result["parameters"]]
        result["total_norm"] = _finite(self.total_norm)
        return result | {"uneven": self.uneven, "healthy": self.healthy}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the norms over depth on a log scale, flagged ones marked by name, and returns the Axes.

        ax: where to draw; without one, a new figure. Norms that a log scale can't hold (zero, NaN, inf) stand on the
        edge that is nearest. Raises ImportError without matplotlib.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("GradientHealth.plot needs matplotlib: pip install matplotlib") from error
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
    """Norms of all gradients of a model, and what is wrong with them, in one pass and with one host sync.

    Call it after `backward()`. Nothing is changed.

    model_or_named_parameters: a module, or (name, parameter) pairs from the input side to the output side.
    vanishing_below, exploding_above: bounds of a healthy L2 norm of one parameter's gradient.
    ratio_above: how many times the smallest norm the largest may be without being called uneven.
    Raises TypeError for anything else, ValueError for bounds that aren't ordered.
    """
    if not 0 <= vanishing_below < exploding_above:
        raise ValueError(f"vanishing_below must be at least 0 and below exploding_above, but got {vanishing_below} "
                         f"and {exploding_above}")  # fmt: skip
    if not ratio_above >= 1:
        raise ValueError(f"ratio_above must be at least 1, but got {ratio_above}")
    names, parameters = _named(model_or_named_parameters)
    total_norm, norms = _read_norms([p.grad for p in parameters])
    rows = []
    for name, parameter, norm in zip(names, parameters, norms, strict=True):
        flag = _flag(norm, parameter.numel(), vanishing_below, exploding_above)
        rows.append(GradientNorm(name, parameter.numel(), norm, flag))
    usable = [norm for norm in norms if norm is not None and 0 < norm < math.inf]
    ratio = max(usable) / min(usable) if usable else None
    diagnosis = _diagnose(rows, ratio, ratio_above)
    return GradientHealth(tuple(rows), total_norm, ratio, diagnosis, vanishing_below, exploding_above, ratio_above)


def _named(model_or_named_parameters: Any) -> tuple[list[str], list[Tensor]]:
    given = model_or_named_parameters
    if not isinstance(given, (nn.Module, Iterable)):
        raise TypeError(f"gradient_health takes a module or (name, parameter) pairs, but got {type(given).__name__}")
    parameters, names = lists.listed(given.named_parameters() if isinstance(given, nn.Module) else given)
    if parameters and names is None:
        raise TypeError("gradient_health needs names: give a module or model.named_parameters()")
    return names or [], parameters


def _read_norms(grads: Sequence[Tensor | None]) -> tuple[float, list[float | None]]:
    """Total norm and norms as numbers, by one copy to the host."""
    present = [_dense(grad) for grad in grads if grad is not None]
    if not present:
        return 0.0, [None] * len(grads)
    total_norm, _, norms = measure(present, 2.0, math.inf)
    total, *values = torch.cat((total_norm.reshape(1), norms)).tolist()
    remaining = iter(values)
    return total, [None if grad is None else next(remaining) for grad in grads]


def _dense(grad: Tensor) -> Tensor:
    """The values of a sparse gradient, those of rows that occur twice added up."""
    if grad.layout is torch.strided:
        return grad
    return grad.coalesce().values() if grad.is_sparse else grad.values()


def _flag(norm: float | None, size: int, vanishing_below: float, exploding_above: float) -> str:
    if norm is None:
        return MISSING
    if not math.isfinite(norm):
        return NONFINITE
    if norm < vanishing_below and size > 0:
        return VANISHING
    return EXPLODING if norm > exploding_above else HEALTHY


def _diagnose(rows: Sequence[GradientNorm], ratio: float | None, ratio_above: float) -> str:
    """The findings, the worst first."""
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
    """Which part of the depth the flagged positions lie in: within one half, or all that there are up to one end."""
    first, last = flagged[0], flagged[-1]
    if len(flagged) == count:
        return "all layers have"
    if last < count / 2 or last == len(flagged) - 1:
        return "early layers have"
    return "late layers have" if first >= count / 2 or first == count - len(flagged) else "some layers have"


def _trend(present: Sequence[GradientNorm], ratio_above: float) -> str:
    """Whether norms grow or shrink along the depth, by the medians of its first and last third."""
    norms = [row.norm for row in present if 0 < row.norm < math.inf]
    third = len(norms) // 3
    if third == 0:
        return ""
    early, late = statistics.median(norms[:third]), statistics.median(norms[-third:])
    if max(early, late) <= math.sqrt(ratio_above) * min(early, late):
        return ""
    course = "vanish towards the early layers" if early < late else "grow towards the early layers"
    return f", and norms {course} (median {early:.1e} in the first third, {late:.1e} in the last)"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


_COLOURS = {HEALTHY: "#0b6e75", VANISHING: "#d9963a", EXPLODING: "#b5525c", NONFINITE: "#7a3f9d"}


def _draw(health: GradientHealth, ax: Axes) -> None:
    """Norms over depth, the bounds as lines, what is flagged in its colour and by name."""
    rows = [(i, row) for i, row in enumerate(health.parameters) if row.norm is not None]
    usable = [row.norm for _, row in rows if 0 < row.norm < math.inf] or [1.0]
    bottom, top = min(usable) / 10, max(usable) * 10
    heights = {i: bottom if row.norm == 0 else row.norm if row.norm < math.inf else top for i, row in rows}
    # what is not finite leaves a gap in the line
    line = [math.nan if row.flag == NONFINITE else heights[i] for i, row in rows]
    ax.plot(heights.keys(), line, color="#c9d6d8", linewidth=1, zorder=1)
    for flag, colour in _COLOURS.items():
        here = [i for i, row in rows if row.flag == flag]
        if here:
            ax.scatter(here, [heights[i] for i in here], 18, colour, label=flag or "in bounds", zorder=2)
        for i in here if flag else ():
            style = {"fontsize": 7, "color": colour, "rotation": 35, "annotation_clip": True}
            ax.annotate(health.parameters[i].name, (i, heights[i]), (2, 4), textcoords="offset points", **style)
    ax.set_yscale("log")
    for bound, flag in ((health.vanishing_below, VANISHING), (health.exploding_above, EXPLODING)):
        if bottom < bound < top:
            ax.axhline(bound, color=_COLOURS[flag], linewidth=0.8, linestyle="--")
    ax.set(xlabel="parameter, from the input on", ylabel="gradient norm")
    ax.margins(y=0.15)
    ax.set_title(health.diagnosis, fontsize=9, wrap=True)
    if rows:
        ax.legend(frameon=False, fontsize=8)


@dataclass(frozen=True)
class LayerActivity:
    """One layer: how many activations it gave, the share that is exactly zero, and whether that is too much."""

    name: str
    size: int
    zero_share: float
    dead: bool


@dataclass(frozen=True)
class DeadNeurons:
    """What `dead_neurons` found, in the order in which the layers first ran; `print` shows it as a table."""

    layers: tuple[LayerActivity, ...]
    threshold: float

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the layers whose share of zeros is above the threshold."""
        return tuple(layer.name for layer in self.layers if layer.dead)

    def __str__(self) -> str:
        rows = [(x.name, f"{x.size:,}", f"{x.zero_share:.1%}", "dead" if x.dead else "") for x in self.layers]
        found = f"{len(self.dead)} of {len(rows)} layers have more than {self.threshold:.0%} zeros"
        return table(("layer", "activations", "zeros", "flag"), rows, numbers=(1, 2)) + "\n" + found

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return asdict(self)


@torch.no_grad()
def dead_neurons(
    model: nn.Module, inputs: Any, *, threshold: float = 0.9, layers: tuple[type[nn.Module], ...] = RELU_LIKE
) -> DeadNeurons:
    """Runs a model once, and counts the activations that are exactly zero after each ReLU-like module.

    Some zeros are what a ReLU is for (half of them on centred inputs); a layer of almost nothing else has died. The
    model runs in evaluation mode and without gradients; its modules' modes, and the hooks, are put back in any case.

    inputs: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
    threshold: the share of zeros, 0 to 1, above which a layer is flagged.
    layers: which modules are looked at. A module that runs several times is counted over all its runs. Functional
        activations can't be seen.
    Raises ValueError for a threshold outside 0 to 1, and where none of these modules ran.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, but got {threshold}")
    sizes: dict[str, int] = {}
    nonzero: dict[str, Tensor] = {}
    with _watched(model, layers, sizes, nonzero):
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    if not sizes:
        kinds = ", ".join(kind.__name__ for kind in layers)
        raise ValueError(f"no module of {type(model).__name__} that ran is one of {kinds}; functional activations "
                         "can't be seen, other modules can be named by layers=")  # fmt: skip
    device = next(iter(nonzero.values())).device
    counts = torch.stack([count.to(device) for count in nonzero.values()]).tolist()
    found = []
    for (name, size), count in zip(sizes.items(), counts, strict=True):
        share = 1 - count / size if size else 0.0
        found.append(LayerActivity(name, size, share, share > threshold))
    return DeadNeurons(tuple(found), threshold)


@contextmanager
def _watched(
    model: nn.Module, layers: tuple[type[nn.Module], ...], sizes: dict[str, int], nonzero: dict[str, Tensor]
) -> Iterator[None]:
    """Counts what the layers give while the context lasts, with the model in evaluation mode."""

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def count(module: nn.Module, arguments: object, output: Tensor) -> None:
            sizes[name] = sizes.get(name, 0) + output.numel()
            nonzero[name] = nonzero.get(name, 0) + torch.count_nonzero(output)

        return module.register_forward_hook(count)

    modes = [(module, module.training) for module in model.modules()]
    handles = [watch(name or type(m).__name__, m) for name, m in model.named_modules() if isinstance(m, layers)]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
