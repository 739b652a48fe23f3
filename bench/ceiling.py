"""What the memory can do: measured copies, against which GB/s are read.

A copy of a tensor reads it once and writes it once. Two figures: a copy of the case's own size, whose data may sit in a
cache as the case's does (the better of a copy into a warm buffer and a clone into a fresh one), and one too large for
any cache.
"""

from dataclasses import asdict, dataclass

import torch

from .timing import Budget, CpuTimer, CudaTimer, Runner, interleave

LARGE_BYTES = 256 * 2**20
COPY_BUDGET = Budget(repeats=9, min_time=0.02, max_time=3.0)


@dataclass(frozen=True)
class Ceiling:
    """GB/s (read + written) of copying `nbytes`: into a buffer in use, and into newly allocated memory."""

    nbytes: int
    copy: float
    clone: float

    @property
    def best(self) -> float:
        """The ceiling that percentages refer to."""
        return max(self.copy, self.clone)


class Ceilings:
    """Copy ceilings of one device, each size measured once."""

    def __init__(self, device: torch.device, timer: CpuTimer | CudaTimer):
        self._device, self._timer = device, timer
        self._measured: dict[int, Ceiling] = {}

    def at(self, nbytes: int) -> Ceiling:
        """The ceiling for tensors of `nbytes`."""
        if nbytes not in self._measured:
            self._measured[nbytes] = self._measure(nbytes)
        return self._measured[nbytes]

    def large(self) -> Ceiling:
        """The ceiling where no cache helps."""
        return self.at(LARGE_BYTES)

    def to_dicts(self) -> list[dict]:
        """All that was measured, smallest first."""
        return [asdict(self._measured[nbytes]) for nbytes in sorted(self._measured)]

    def _measure(self, nbytes: int) -> Ceiling:
        source = torch.rand(max(1, nbytes // 4), dtype=torch.float32, device=self._device)
        target = torch.zeros_like(source)
        runners = {"copy": Runner(lambda: target.copy_(source)), "clone": Runner(source.clone)}
        samples = interleave(runners, self._timer, COPY_BUDGET)
        # the fastest sample and not the median: a ceiling is what the memory can do
        rates = {name: 2 * source.nbytes / min(seconds) / 1e9 for name, seconds in samples.items()}
        return Ceiling(nbytes, **rates)
