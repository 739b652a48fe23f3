"""Interleaved timing: all providers of a case take turns in one process, and ratios are paired by round.

Whatever slows the machine down for a while slows all providers of that round down, so that the median of the per-round
ratios is much steadier than the ratio of two medians taken minutes apart.
"""

import itertools
import math
import statistics
import time
import timeit
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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

    def run(self) -> None:
        """The call in its context."""
        with self.activate():
            self.call()


class CpuTimer:
    """Wall-clock time of a loop of calls, with the garbage collector off."""

    most_calls = 20_000

    def sample(self, call: Callable[[], object], calls: int) -> float:
        """Seconds per call."""
        return timeit.Timer(call, timer=time.perf_counter).timeit(calls) / calls

    def host_seconds(self, call: Callable[[], object]) -> None:
        """The host's share of a call: on a CPU the host does all of it."""


class CudaTimer:
    """Device time: between two events around each call, with the L2 cache flushed before it.

    The device sleeps before the first event until the host has launched the call, so that launches don't count as
    device time; of a call with more launches than the device's queue holds, about a thousand, some do. `cuda` stands
    for torch.cuda: a rehearsal without a card has another one.
    """

    most_calls = 200
    cycles_per_second = 2e9  # of torch.cuda._sleep, at most
    most_ahead = 50e-3  # seconds; the first call of all compiles
    host_calls = 50
    host_sample = 2e-3  # seconds, in which the host can't fill the device's queue

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self._cuda = cuda
        flush_bytes = 4 * cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(flush_bytes, 2**26), dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object], calls: int) -> float:
        """Mean seconds per call."""
        started = time.perf_counter()
        call()
        ahead = min(self.most_ahead, 2 * (time.perf_counter() - started))
        events = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in events:
            self._flush.zero_()
            self._cuda._sleep(int(ahead * self.cycles_per_second))
            start.record()
            call()
            stop.record()
        self._cuda.synchronize()
        return statistics.fmean(start.elapsed_time(stop) for start, stop in events) * 1e-3

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Mean seconds that the host takes for a call while the device is busy with something else."""
        timer = timeit.Timer(call, timer=time.perf_counter)
        calls = min(self.host_calls, max(1, int(self.host_sample / timer.timeit(1))))
        self._cuda.synchronize()
        self._cuda._sleep(int(0.02 * self.cycles_per_second))
        seconds = timer.timeit(calls) / calls
        self._cuda.synchronize()
        return seconds


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    """The timer that measures work on `device`."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(
    runners: dict[Hashable, Runner], timer: CpuTimer | CudaTimer, budget: Budget
) -> dict[Hashable, list[float]]:
    """Seconds per call of every runner in every round. Rounds come in pairs, there and back: ABBA BAAB of two."""
    samples: dict[Hashable, list[float]] = {name: [] for name in runners}
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
        first = done // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order[::-1] if done % 2 else order:
            with runners[name].activate():
                samples[name].append(timer.sample(runners[name].call, calls[name]))
    return samples


def _calibrate(runner: Runner, timer: CpuTimer | CudaTimer, min_sample: float) -> int:
    """How many calls make a sample of `min_sample` seconds; also the warm-up."""
    calls = 1
    with runner.activate():
        while True:
            seconds = calls * timer.sample(runner.call, calls)
            if calls == timer.most_calls:
                return calls
            if seconds >= min_sample:  # again: the first two calls compile and record, and any may be interrupted
                seconds = calls * min(timer.sample(runner.call, calls) for _ in range(2))
            if seconds >= min_sample:
                return calls
            # in steps, for the same reason
            calls = min(timer.most_calls, max(calls + 1, min(10 * calls, round(1.2 * calls * min_sample / seconds))))


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    several = samples if len(samples) > 1 else 2 * samples
    return tuple(statistics.quantiles(several, n=4, method="inclusive"))


def paired_ratio(baseline: list[float], samples: list[float]) -> float:
    """Median over the rounds of baseline / sample: above one, `samples` are faster."""
    return statistics.median(base / sample for base, sample in zip(baseline, samples, strict=True))


Interval = tuple[float | None, float, float | None]


def median_interval(samples: list[float], confidence: float = 0.95) -> Interval:
    """(low, median, high): the true median is from low to high with this confidence, whatever the distribution.

    That is the sign test's interval, from the k-th smallest to the k-th largest sample: fewer than k of n tosses of a
    coin are heads with a probability of (1 − confidence) / 2 at most. None where the samples are too few.
    """
    n, ordered = len(samples), sorted(samples)
    probability, k = 0.0, 0  # of fewer than k heads
    while (probability := probability + math.comb(n, k) / 2**n) <= (1 - confidence) / 2:
        k += 1
    return ordered[k - 1] if k else None, statistics.median(ordered), ordered[n - k] if k else None
