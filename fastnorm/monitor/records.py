"""What a row says, in the user's terms: norms by group, ratios, shares; as dicts, arrays and lines of text."""

from __future__ import annotations

import csv
import io
import json
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clip.activations import zero_share
from ..clip.health import finite
from .rows import Row, put

# The numbers that a record has for each group, norm or layer.
SERIES = ("gradient_norm", "nonfinite", "weight_norm", "update_ratio", "input_rms", "zero_share")


@dataclass(frozen=True)
class Names:
    """Whose numbers there are. group_of: the group of each parameter, by position. sizes: elements of each group."""

    groups: list[str]
    group_of: Tensor
    norms: list[str]
    layers: list[str]

    def of(self, series: str) -> list[str]:
        return {"input_rms": self.norms, "zero_share": self.layers}.get(series, self.groups)


@dataclass(frozen=True)
class Record:
    """One step. series: by the names of SERIES, float64 for each group, norm or layer, NaN where none was measured.
    measured: by the same names, where there are numbers. They may be NaN themselves."""

    step: int
    total_norm: float
    coefficient: float
    threshold: float
    skipped: bool
    spike: float | None
    series: dict[str, Tensor]
    measured: dict[str, Tensor]

    @property
    def has_clip(self) -> bool:
        return not math.isnan(self.threshold)

    @property
    def clipped(self) -> bool:
        return self.coefficient < 1

    def as_dict(self, names: Names) -> dict[str, Any]:
        """Without what was not measured. The coefficient and the threshold of a step without a clip are None."""
        result: dict[str, Any] = {
            "step": self.step,
            "total_norm": self.total_norm,
            "coefficient": self.coefficient if self.has_clip else None,
            "threshold": self.threshold if self.has_clip else None,
            "clipped": self.clipped,
            "skipped": self.skipped,
            "spike": self.spike,
        }
        for series, numbers in self.series.items():
            found = zip(names.of(series), numbers.tolist(), self.measured[series].tolist(), strict=True)
            result[series] = {name: number for name, number, is_measured in found if is_measured}
        return result

    def scalars(self, names: Names) -> Iterator[tuple[str, float]]:
        """(name, number) of all that was measured, series as "gradient_norm/layer.weight"."""
        for key, value in self.as_dict(names).items():
            if isinstance(value, dict):
                yield from ((f"{key}/{name}", number) for name, number in value.items())
            elif key != "step" and value is not None:
                yield key, float(value)


def decode(row: Row, names: Names) -> Record:
    """What follows from a row's numbers."""
    count, groups = len(names.group_of), len(names.groups)
    norms, present = row.norms(count)

    def summed(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """(groups,): sums over the parameters at `where`, NaN for a group without one; and which have one."""
        sums, members = torch.zeros(2, groups, dtype=torch.float64, device="cpu")
        sums.index_add_(0, names.group_of[where], values[where])
        members.index_add_(0, names.group_of[where], where[where].double())
        return sums.masked_fill(members == 0, math.nan), members > 0

    def lengths(kind: str) -> tuple[Tensor, Tensor]:
        """(groups,): the L2 norm of all of a group's tensors; and which have one."""
        values, where = row.placed(kind, count)
        squares, found = summed(values.square(), where)
        return squares.sqrt(), found

    squares, has_gradients = summed(norms.square(), present)
    weights, has_weights = lengths("weights")
    updates, has_updates = lengths("updates")
    zeros = torch.full((len(names.layers),), math.nan, dtype=torch.float64, device="cpu")
    for values, part in row.of_kind("nonzero"):
        shares = [zero_share(number, size) for number, size in zip(values.tolist(), part.sizes, strict=True)]
        put(zeros, part.where, values.new_tensor(shares))
    found = {
        "gradient_norm": (squares.sqrt(), has_gradients),
        "nonfinite": summed((~norms.isfinite()).double(), present),
        "weight_norm": (weights, has_weights),
        "update_ratio": (updates / weights, has_updates & has_weights & ((weights != 0) | (updates != 0))),
        "input_rms": _input_rms(row, len(names.norms)),
        "zero_share": (zeros, ~zeros.isnan()),
    }
    series, measured = ({key: pair[i] for key, pair in found.items()} for i in (0, 1))
    coefficient, threshold = row.number("coefficient"), row.number("threshold")
    skipped = row.number("skipped") > 0
    return Record(row.step, row.total_norm(), coefficient, threshold, skipped, row.spike, series, measured)


def _input_rms(row: Row, count: int) -> tuple[Tensor, Tensor]:
    """(count,): of everything that each norm was given, NaN for one that was given nothing; and which were given some.
    """
    squares, sizes = torch.zeros(2, count, dtype=torch.float64, device="cpu")
    for values, part in row.of_kind("inputs"):
        where = torch.tensor(part.where, device="cpu")
        factors, offsets = values.new_tensor(part.factors), values.new_tensor(part.offsets)
        squares.index_add_(0, where, factors * values.square() - offsets)
        sizes.index_add_(0, where, values.new_tensor(part.sizes))
    return (squares.clamp(min=0) / sizes).sqrt(), sizes > 0  # below 0 by rounding, where eps is far above x²


class RunningMedian:
    """The median of the last finite norms."""

    WINDOW, LEAST = 100, 10  # how many norms it is of, and how many it needs

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []

    def times(self, norm: float) -> float | None:
        """How many times the median a norm is; inf if it is not finite, None while there are too few norms."""
        if not math.isfinite(norm):
            return math.inf
        if len(self.ordered) < self.LEAST:
            return None
        middle = (self.ordered[(len(self.ordered) - 1) // 2] + self.ordered[len(self.ordered) // 2]) / 2
        return norm / middle if middle > 0 else None

    def add(self, norm: float) -> None:
        if not math.isfinite(norm):
            return
        if len(self.recent) == self.WINDOW:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]
        self.recent.append(norm)
        insort(self.ordered, norm)


def arrays(records: Sequence[Record], names: Names) -> dict[str, Any]:
    """By name: (steps,), and (steps, names) of the series. Needs NumPy."""
    import numpy

    result = {
        "step": numpy.array([r.step for r in records], dtype=numpy.int64),
        **{key: numpy.array([getattr(r, key) for r in records], dtype=numpy.float64) for key in _NUMBERS},
        **{key: numpy.array([getattr(r, key) for r in records], dtype=bool) for key in ("clipped", "skipped")},
    }
    for series in SERIES:
        rows = [r.series[series] for r in records]
        result[series] = (torch.stack(rows) if rows else torch.empty(0, len(names.of(series)), device="cpu")).numpy()
    return result


_NUMBERS = ("total_norm", "coefficient", "threshold")


def as_csv(records: Sequence[Record], names: Names) -> str:
    """A line for each step. What was not measured is empty; what is not finite is nan, inf or -inf."""
    header = ["step", *_NUMBERS, "clipped", "skipped", "spike"]
    header += [f"{series}/{name}" for series in SERIES for name in names.of(series)]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        numbers = {key: int(value) if key in ("clipped", "skipped") else value for key, value in record.scalars(names)}
        writer.writerow({"step": record.step, **numbers})
    return text.getvalue()


def as_jsonl(records: Sequence[Record], names: Names) -> str:
    """A dict for each step. Numbers that are not finite are null."""
    return "".join(json.dumps(_strict(record.as_dict(names)), allow_nan=False) + "\n" for record in records)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    return finite(value) if isinstance(value, float) else value
