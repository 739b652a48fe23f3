"""Correctness before time: every provider against the stock formula in float64.

A provider's largest error may be 1.25 times the one that stock PyTorch makes on the same input in the same dtype, plus
one unit in the last place of the largest value; the same rule as in the tests. fastnorm is held to it: the command
fails where it is above. The others are what it is compared with: where torch.compile or a peer sums a float32 dweight
less carefully than stock does (6 to 14 times what is allowed is usual; 370 times where a 16-bit x makes torch.compile
round what it sums, which is still within x's precision), their times are shown beside that error, because leaving them
out would flatter us.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .workload import Workload

STOCK_ERROR_FACTOR = 1.25
FACTOR_FOR_OTHERS = 32  # beyond this many times what is allowed, it is a wrong answer and not a sloppy sum
FLOAT64_SLACK_ULPS = 1024  # in float64 the oracle has rounding errors of its own, those of a sum over all of x
CHUNK_ELEMENTS = 2**19  # keeps float64 temporaries small, within a cache


@dataclass(frozen=True)
class Verdict:
    """`worst` is the largest error in units of what is allowed (so above one is too much), `detail` where it is.

    is_tolerable: no error is so large that a time for it would mean nothing.
    """

    worst: float
    detail: str
    is_tolerable: bool = True


class Reference:
    """Float64 values of a workload, and how far from them a provider may be."""

    def __init__(self, workload: Workload, mode: str):
        self.workload = workload
        self.exact = oracle(workload, mode)
        self.stock_dtypes: dict[str, torch.dtype] = {}
        self.allowed: dict[str, float] = {}
        for name, value in workload.evaluate(workload.operation.stock, mode).items():
            self.stock_dtypes[name] = value.dtype
            error, exact = max_error(value, self.exact[name]), self.exact[name]
            self.allowed[name] = STOCK_ERROR_FACTOR * error + slack(value.dtype, exact)

    def judge(self, function: Callable, mode: str) -> Verdict:
        """Evaluate `function` once and compare all that it returns."""
        worst, detail, is_tolerable = 0.0, "", True
        for name, value in self.workload.evaluate(function, mode).items():
            exact, allowed = self.exact[name], self.allowed[name]
            if value.shape != exact.shape or value.dtype != self.stock_dtypes[name]:
                got, wanted = (tuple(value.shape), value.dtype), (tuple(exact.shape), self.stock_dtypes[name])
                return Verdict(math.inf, f"{name} is {got}, stock gives {wanted}", is_tolerable=False)
            error = max_error(value, exact)
            share = math.inf if math.isnan(error) else error / allowed
            # `not <=`, because a NaN is tolerable to nobody
            if not error <= max(FACTOR_FOR_OTHERS * allowed, slack(self.workload.inputs["x"].dtype, exact)):
                is_tolerable = False
            if share >= worst:
                worst, detail = share, f"{name} is off by {error:.2g}, allowed {allowed:.2g}"
        return Verdict(worst, detail, is_tolerable)


def oracle(workload: Workload, mode: str) -> dict[str, Tensor]:
    """Outputs, buffers and gradients of the stock formula in float64, computed a few slices at a time."""
    family = workload.operation.family
    cut = family.cut | {f"d{name}": dim for name, dim in family.cut.items()}
    slices, largest = workload.inputs["x"].shape[cut["x"]], max(x.numel() for x in workload.inputs.values())
    step = max(1, CHUNK_ELEMENTS * slices // largest)
    pieces: dict[str, list[Tensor]] = {}
    for start in range(0, slices, step):
        part = workload.part(start, min(start + step, slices), torch.float64)
        for name, value in part.evaluate(workload.operation.stock, mode).items():
            pieces.setdefault(name, []).append(value)
    return {
        name: torch.cat(parts, cut[name]) if name in cut else torch.stack(parts).sum(0)
        for name, parts in pieces.items()
    }


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|, NaN if there is one; in pieces, so that no float64 tensor of the case's size is made."""
    rows = max(1, CHUNK_ELEMENTS * len(value) // value.numel())
    parts = zip(value.split(rows), exact.split(rows), strict=True)  # not flat: in channels_last that were a copy
    extremes = [torch.stack(torch.aminmax(a - b)) for a, b in parts]
    return torch.stack(extremes).abs().max().item()


def slack(dtype: torch.dtype, exact: Tensor) -> float:
    """One unit in the last place of `dtype` at the largest magnitude in `exact`; more in float64."""
    largest = max(exact.max().item(), -exact.min().item())
    ulp = math.ldexp(torch.finfo(dtype).eps, math.frexp(largest)[1] - 1)
    return FLOAT64_SLACK_ULPS * ulp if dtype == torch.float64 else ulp
