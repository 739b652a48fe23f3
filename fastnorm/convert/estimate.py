"""The estimate of what a conversion gains, as it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..text import table


@dataclass(frozen=True)
class Times:
    """Of one call, in seconds.

    Attributes:
        stock_s: the median of the original norm.
        fastnorm_s: that of the swapped one.
        speedup: the median of the ratios stock / fastnorm within each round.
    """

    stock_s: float
    fastnorm_s: float
    speedup: float


@dataclass(frozen=True)
class NormTimes:
    """Equal norms that get equal inputs.

    Attributes:
        names: as in named_modules().
        replacement: fastnorm's class, as in the report.
        input: the input's shape, dtype, and memory format where it is not contiguous.
        calls: how often the pass calls them, all together.
        forward: of one call.
        training: of one call and its backward; None in evaluation, or where nothing needs a gradient.
    """

    names: tuple[str, ...]
    replacement: str
    input: str
    calls: int
    forward: Times
    training: Times | None

    @property
    def is_slower(self) -> bool:
        """Whether fastnorm is slower than stock by as much as two digits show."""
        return any(round(times.speedup, 2) < 1 for times in (self.forward, self.training) if times)


@dataclass(frozen=True)
class ConversionEstimate:
    """What the swapped norms of a model gain on this machine. `print` shows it as a table.

    Norms are timed alone, so their inputs lie in a cache more often than in the model. This is an estimate: only the
    whole model, timed before and after, shows what it gains.

    Attributes:
        norms: the times of the norms, by kind and input, in the order of their first call.
        pass_s: seconds of a whole forward pass of the converted model.
    """

    norms: tuple[NormTimes, ...]
    pass_s: float

    @property
    def stock_s(self) -> float:
        """Seconds of all swapped norms in a forward pass, as they were before the swap."""
        return sum(norm.calls * norm.forward.stock_s for norm in self.norms)

    @property
    def fastnorm_s(self) -> float:
        """Seconds of all swapped norms in a forward pass."""
        return sum(norm.calls * norm.forward.fastnorm_s for norm in self.norms)

    @property
    def share(self) -> float:
        """The share of the norms in a forward pass before the swap."""
        return self.stock_s / (self._others_s + self.stock_s)

    @property
    def speedup(self) -> float:
        """How many times as fast the whole forward pass has become."""
        return (self._others_s + self.stock_s) / (self._others_s + self.fastnorm_s)

    @property
    def limit(self) -> float | None:
        """How many times as fast the forward pass would be if norms took no time; None if nothing else takes any."""
        return (self._others_s + self.stock_s) / self._others_s if self._others_s else None

    @property
    def slower(self) -> tuple[str, ...]:
        """The names of the norms that are slower than stock, in the forward pass or with the backward."""
        return tuple(name for norm in self.norms if norm.is_slower for name in norm.names)

    @property
    def _others_s(self) -> float:
        return max(self.pass_s - self.fastnorm_s, 0.0)

    def __str__(self) -> str:
        calls = sum(norm.calls for norm in self.norms)
        steps = [(norm.calls, norm.training) for norm in self.norms if norm.training]
        headers, rows = _columns(self.norms, bool(steps))
        limit = f", so {self.limit:.2f}x if they took no time" if self.limit else ""
        lines = [f"{calls} calls of norms, forward: {_in_both(self.stock_s, self.fastnorm_s)}"]
        if steps:
            both = sum(n * times.stock_s for n, times in steps), sum(n * times.fastnorm_s for n, times in steps)
            lines.append(f"forward and backward: {_in_both(*both)}")
        lines.append(
            f"the whole forward pass: {_ms(self.pass_s)} ms, {self.speedup:.2f}x as fast as in stock; norms were "
            f"{self.share:.0%} of it{limit}"
        )
        lines.append(f"slower than in stock: {', '.join(self.slower) or 'none'}")
        return "\n".join((table(headers, rows, range(3, len(headers))), *lines))

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        norms = [asdict(norm) | {"names": list(norm.names)} for norm in self.norms]
        names = ("pass_s", "stock_s", "fastnorm_s", "share", "speedup", "limit")
        return {"norms": norms, "slower": list(self.slower)} | {name: getattr(self, name) for name in names}


def _columns(norms: Sequence[NormTimes], trains: bool) -> tuple[list[str], list[list[str]]]:
    """The headers, and a row for each kind of norm and input."""
    headers, rows = ["norms", "to (fastnorm)", "input", "calls", "stock ms", "fastnorm ms", "forward"], []
    headers += ["stock ms", "fastnorm ms", "forward + backward"] if trains else []
    for norm in norms:
        others = f" and {len(norm.names) - 1} more" if len(norm.names) > 1 else ""
        row = [f"{norm.names[0] or '(the model)'}{others}", norm.replacement, norm.input, str(norm.calls)]
        for times in (norm.forward, norm.training)[: 1 + trains]:
            row += _cells(times, norm.calls)
        rows.append(row)
    return headers, rows


def _cells(times: Times | None, calls: int) -> list[str]:
    if times is None:
        return ["–"] * 3
    return [_ms(calls * times.stock_s), _ms(calls * times.fastnorm_s), f"{times.speedup:.2f}x"]


def _in_both(stock_s: float, fastnorm_s: float) -> str:
    return f"{_ms(stock_s)} ms in stock, {_ms(fastnorm_s)} ms in fastnorm"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:#.3g}".rstrip(".")
