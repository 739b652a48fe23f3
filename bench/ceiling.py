"""What the memory can do: measured copies, against which GB/s are read.

A copy of a tensor reads it once and writes it once. Two figures: a copy of the case's own size, whose data may sit in a
cache as the case's does (in newly allocated memory a clone; in memory in use the better of that and a copy into a warm
buffer), and one too large for any cache.
"""

from functools import partial

import torch

from . import memory
from .timing import Budget, CpuTimer, CudaTimer, Runner, interleave

LARGE_BYTES = 256 * 2**20
COPY_BUDGET = Budget(repeats=9, min_time=0.02, max_time=3.0)


class Ceilings:
    """GB/s (read + written) of copies on one device, each size measured once."""

    def __init__(self, device: torch.device, timer: CpuTimer | CudaTimer):
        self._device, self._timer = device, timer
        self._measured: dict[int, dict[str, float]] = {}

    def at(self, nbytes: int, state: str = memory.IN_USE) -> float:
        """The ceiling that percentages refer to, for tensors of `nbytes` and a state of the memory."""
        if nbytes not in self._measured:
            self._measured[nbytes] = self._measure(nbytes)
        rates = self._measured[nbytes]
        return rates["clone"] if state == memory.NEW else max(rates.values())

    def to_dicts(self) -> list[dict]:
        """All that was measured, smallest first."""
        return [{"nbytes": nbytes, **rates} for nbytes, rates in sorted(self._measured.items())]

    def _measure(self, nbytes: int) -> dict[str, float]:
        """Of a copy into a buffer in use, and into newly allocated memory."""
        source = torch.rand(max(1, nbytes // 4), dtype=torch.float32, device=self._device)
        target = torch.zeros_like(source)
        clone = Runner(source.clone, partial(memory.entered, memory.NEW))
        runners = {"copy": Runner(lambda: target.copy_(source)), "clone": clone}
        samples = interleave(runners, self._timer, COPY_BUDGET)
        # the fastest sample and not the median: a ceiling is what the memory can do
        return {name: 2 * source.nbytes / min(seconds) / 1e9 for name, seconds in samples.items()}
