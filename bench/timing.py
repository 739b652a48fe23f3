"""Interleaved timing: all providers of a case take turns in one process, and ratios are paired by round.

Whatever slows the machine down for a while slows all providers of that round down, so that the median of the per-round
ratios is much steadier than the ratio of two medians taken minutes apart.
"""

import itertools
import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Budget:
    """How long a case is timed, in seconds.

    At least `repeats` rounds and `min_time` for each provider; a case that takes longer than `max_time` stops after
    the round it is in, though not before its third.
    """

    repeats: int = 15
    min_time: float = 0.3
    max_time: float = 12.0
    min_sample: float = 2e-3


@dataclass(frozen=True)
class Runner:
    """A call to time, and the context in which its samples are taken (entered outside the timed part)."""

    call: Callable[[], object]
    activate: Callable[[], AbstractContextManager] = nullcontext


class CpuTimer:
    """Wall-clock time of a loop of calls, with the garbage collector off."""

    most_calls = 20_000

    def sample(self, call: Callable[[], object], calls: int) -> float:
        """Seconds per call."""
        return timeit.Timer(call, timer=time.perf_counter).timeit(calls) / calls


class CudaTimer:
    """Time between two events around each call, with the L2 cache flushed before it."""

    most_calls = 200

    def __init__(self, device: torch.device):
        flush_bytes = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        # the flush also runs long enough for the host to get ahead, so that launches don't count as device time
        self._flush = torch.empty(max(flush_bytes, 256 * 2**20), dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object], calls: int) -> float:
        """Mean seconds per call."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in events:
            self._flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize(self._flush.device)
        return statistics.fmean(start.elapsed_time(stop) for start, stop in events) * 1e-3


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer that measures work on `device`."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(runners: dict[str, Runner], timer: CpuTimer | CudaTimer, budget: Budget) -> dict[str, list[float]]:
    """Seconds per call of every runner in every round; the runner that goes first changes from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in runners}
    if not runners:
        return samples
    calls = {name: _calibrate(runner, timer, budget.min_sample) for name, runner in runners.items()}
    names = list(runners)
    started = time.perf_counter()
    for done in itertools.count():
        elapsed = time.perf_counter() - started
        if done >= budget.repeats and elapsed >= budget.min_time * len(names):
            break
        if done >= FEWEST_ROUNDS and elapsed >= budget.max_time:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            with runners[name].activate():
                samples[name].append(timer.sample(runners[name].call, calls[name]))
    return samples


def _calibrate(runner: Runner, timer: CpuTimer | CudaTimer, min_sample: float) -> int:
    """How many calls make a sample of `min_sample` seconds; also the warm-up."""
    calls = 1
    with runner.activate():
        while (seconds := calls * timer.sample(runner.call, calls)) < min_sample and calls < timer.most_calls:
            # the first call of all is often slow by far: grow in steps instead of trusting it
            calls = min(timer.most_calls, max(calls + 1, min(10 * calls, round(1.2 * calls * min_sample / seconds))))
    return calls


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third


def paired_ratio(baseline: list[float], samples: list[float]) -> float:
    """Median over the rounds of baseline / sample: above one, `samples` are faster."""
    return statistics.median(base / sample for base, sample in zip(baseline, samples, strict=True))
