"""Check, then time: from a plan to results."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .ceiling import Ceilings
from .check import FACTOR_FOR_OTHERS, Reference
from .operations import OPERATIONS, Operation
from .presets import DTYPES
from .providers import COMPILE, PROVIDERS, STOCK, Provider, one_line, serving_backend, why_absent
from .timing import Budget, Runner, interleave, paired_ratio, quartiles, timer_for
from .workload import Workload

OK, INEXACT, WRONG, FAILED = "ok", "INEXACT", "WRONG", "FAILED"
TIMED = (OK, INEXACT)


@dataclass(frozen=True)
class Plan:
    """What to benchmark, by the names that the command line uses."""

    operations: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    device: torch.device
    budget: Budget


@dataclass
class Result:
    """One provider in one case; times and speed-ups stay None if `status` is WRONG or FAILED.

    `error_of_allowed` is the largest error in units of what the rule of `check.py` allows, None for a NaN or for a
    result of another shape or dtype.
    """

    operation: str
    mode: str
    rows: int
    cols: int
    dtype: str
    provider: str
    backend: str = ""
    status: str = OK
    detail: str = ""
    error_of_allowed: float | None = None
    rounds: int = 0
    median_s: float | None = None
    first_quartile_s: float | None = None
    third_quartile_s: float | None = None
    compulsory_bytes: int = 0
    gb_per_s: float | None = None
    ceiling_gb_per_s: float | None = None
    percent_of_ceiling: float | None = None
    speedup_vs_torch: float | None = None
    speedup_vs_compile: float | None = None


class Bench:
    """A plan on its device, with the timer and the ceilings that its cases share."""

    def __init__(self, plan: Plan):
        self.plan = plan
        _settle_malloc()
        self.timer = timer_for(plan.device)
        self.ceilings = Ceilings(plan.device, self.timer)
        self.absent = self._find_absent()

    def cases(self) -> int:
        """How many lists `run_operation` yields over all operations."""
        plan = self.plan
        return len(plan.operations) * len(plan.shapes) * len(plan.dtypes) * len(plan.modes)

    def run_operation(self, name: str) -> Iterator[list[Result]]:
        """Yield the results of each case, a list with one entry per provider: for each shape, dtype, then mode."""
        providers = [PROVIDERS[p] for p in self.plan.providers if p not in self.absent.get(name, {})]
        for rows, cols in self.plan.shapes:
            for dtype in self.plan.dtypes:
                yield from self._run_workload(OPERATIONS[name], rows, cols, dtype, providers)

    def _find_absent(self) -> dict[str, dict[str, str]]:
        """Why a provider is missing, by operation and provider name; what isn't named here runs."""
        absent: dict[str, dict[str, str]] = {}
        for name in self.plan.operations:
            for provider in self.plan.providers:
                reason = why_absent(PROVIDERS[provider], OPERATIONS[name], self.plan.device)
                if reason is not None:
                    absent.setdefault(name, {})[provider] = reason
        return absent

    def _run_workload(
        self, operation: Operation, rows: int, cols: int, dtype: str, providers: list[Provider]
    ) -> Iterator[list[Result]]:
        torch.compiler.reset()  # every shape gets its own static graph, and none runs into the recompilation limit
        workload = Workload.make(operation, rows, cols, DTYPES[dtype], self.plan.device)
        reference = Reference(workload, max(self.plan.modes, key=len))  # forward_backward holds forward's values too
        functions = {provider.name: provider.build(operation) for provider in providers}
        ceiling = self.ceilings.at(rows * cols * DTYPES[dtype].itemsize).best
        for mode in self.plan.modes:
            results = {p.name: Result(operation.name, mode, rows, cols, dtype, p.name) for p in providers}
            runners = {}
            for provider in providers:
                result, function = results[provider.name], functions[provider.name]
                _check(result, provider, function, reference)
                if result.status in TIMED:
                    runners[provider.name] = Runner(workload.runner(function, mode), provider.activate)
            samples = interleave(runners, self.timer, self.plan.budget)
            moved = operation.compulsory_bytes(mode, rows, cols, DTYPES[dtype])
            for name, seconds in samples.items():
                _fill_times(results[name], seconds, samples, moved, ceiling)
            yield list(results.values())


def _settle_malloc() -> None:
    """Frees one block of the size from which glibc's malloc keeps what is freed below it.

    Until then it hands the memory of every call's outputs back to the system, and all providers are timed at faulting
    it in again: 4 of 5 ms at (2048, 1024) in float32. A process that has run a model for a moment is past that.
    """
    torch.ones(31 * 2**20, dtype=torch.uint8)


def _check(result: Result, provider: Provider, function: Callable, reference: Reference) -> None:
    """Judge one provider's values, and write the verdict into its result."""
    try:
        with provider.activate():
            verdict = reference.judge(function, result.mode)
        x = next(iter(reference.workload.inputs.values()))
        result.backend = serving_backend(provider, OPERATIONS[result.operation], x)
    except Exception as error:  # noqa: BLE001 - a provider that breaks is a row of the table, not the run's end
        result.status, result.detail = FAILED, one_line(error)
        return
    result.error_of_allowed = verdict.worst if math.isfinite(verdict.worst) else None  # JSON has no infinity
    if verdict.worst > 1:
        tolerable = not provider.ours and verdict.worst <= FACTOR_FOR_OTHERS
        result.status, result.detail = (INEXACT if tolerable else WRONG), verdict.detail


def _fill_times(
    result: Result, seconds: list[float], samples: dict[str, list[float]], moved: int, ceiling: float
) -> None:
    result.rounds = len(seconds)
    result.first_quartile_s, result.median_s, result.third_quartile_s = quartiles(seconds)
    result.compulsory_bytes = moved
    result.gb_per_s = moved / result.median_s / 1e9
    result.ceiling_gb_per_s = ceiling
    result.percent_of_ceiling = 100 * result.gb_per_s / ceiling
    if STOCK in samples:
        result.speedup_vs_torch = paired_ratio(samples[STOCK], seconds)
    if COMPILE in samples:
        result.speedup_vs_compile = paired_ratio(samples[COMPILE], seconds)
