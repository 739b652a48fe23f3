"""What is recorded of one provider in one case, whatever is benchmarked."""

from collections.abc import Mapping
from dataclasses import dataclass

from .timing import Budget, CpuTimer, CudaTimer, Runner, interleave, quartiles

OK, INEXACT, WRONG, FAILED = "ok", "INEXACT", "WRONG", "FAILED"
TIMED = (OK, INEXACT)


@dataclass
class Measurement:
    """The verdict, and the times, which stay None if `status` is WRONG or FAILED; `detail` says what is off. On a GPU
    host_s is what the host takes for a call, beside the device's time.

    `backend` is the one of fastnorm's that served the case, "" for others. A result derives from this and, to have
    them filed first, from the fields that name the case.
    """

    backend: str = ""
    status: str = OK
    detail: str = ""
    rounds: int = 0
    median_s: float | None = None
    first_quartile_s: float | None = None
    third_quartile_s: float | None = None
    host_s: float | None = None
    compulsory_bytes: int = 0
    gb_per_s: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether the values were good enough to be timed."""
        return self.status in TIMED

    def record(self, seconds: list[float], moved: int) -> None:
        """Fill in the times: of a call in each round, in which it can't but move `moved` bytes."""
        self.rounds, self.compulsory_bytes = len(seconds), moved
        self.first_quartile_s, self.median_s, self.third_quartile_s = quartiles(seconds)
        self.gb_per_s = moved / self.median_s / 1e9


def take_turns(
    results: Mapping[str, Measurement], runners: dict[str, Runner], timer: CpuTimer | CudaTimer, budget: Budget, moved: int
) -> dict[str, list[float]]:
    """Time the runners interleaved, and write their times into the results of the same names; the samples."""
    samples = interleave(runners, timer, budget)
    for name, seconds in samples.items():
        results[name].record(seconds, moved)
        with runners[name].activate():
            results[name].host_s = timer.host_seconds(runners[name].call)
    return samples
