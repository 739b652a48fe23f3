"""One case, whatever is benchmarked: every provider is judged, and those whose values are good enough take turns."""

from collections.abc import Callable, Sequence
from typing import Any

from . import memory
from .providers import Provider, one_line
from .timing import Budget, CpuTimer, CudaTimer, Runner, interleave, quartiles

OK, INEXACT, WRONG, FAILED = "ok", "INEXACT", "WRONG", "FAILED"
Result = dict[str, Any]  # one provider in one case, as the JSON has it
TIMES = ("median_s", "first_quartile_s", "third_quartile_s", "host_s")


def measure(
    case: Result, more: Result, providers: Sequence[Provider], judge: Callable[[Provider], Result],
    call: Callable[[Provider], Callable[[], object]], timer: CpuTimer | CudaTimer, budget: Budget, moved: int,
) -> tuple[dict[str, Result], dict[str, list[float]]]:
    """The results, and the samples of those that were timed, both by the provider's name.

    case: what names it, with the state of the memory, if calls are timed in a particular one; more: the benchmark's own
    entries, as they are without a time. `judge` gives those of the verdict: `backend`, the one of fastnorm's that
    served, `status`, and `detail`, which says what is off. `call` gives
    what is timed, in which a provider can't but move `moved` bytes. The times stay None if `status` is WRONG or FAILED;
    host_s is what the host takes for a call on a GPU, beside the device's time.
    """
    untimed = {"backend": "", "status": OK, "detail": "", "rounds": 0} | dict.fromkeys(TIMES)
    untimed |= {"compulsory_bytes": 0, "gb_per_s": None}
    results = {provider.name: case | {"provider": provider.name} | untimed | more for provider in providers}
    for provider in providers:
        try:
            with provider.activate():
                results[provider.name] |= judge(provider)
        except Exception as error:  # noqa: BLE001 - a provider that breaks is a row of the table, not the run's end
            results[provider.name] |= {"status": FAILED, "detail": one_line(error)}
    good = [provider for provider in providers if results[provider.name]["status"] in (OK, INEXACT)]
    runners = {provider.name: Runner(call(provider), provider.activate) for provider in good}
    state = case.get("memory", memory.AS_IT_IS)
    with memory.entered(state):
        if state == memory.IN_USE:
            memory.settle([runner.run for runner in runners.values()])
        samples = interleave(runners, timer, budget)
        for name, seconds in samples.items():
            first, median, third = quartiles(seconds)
            with runners[name].activate():
                times = (median, first, third, timer.host_seconds(runners[name].call))
            facts = {"rounds": len(seconds), "compulsory_bytes": moved, "gb_per_s": moved / median / 1e9}
            results[name] |= facts | dict(zip(TIMES, times, strict=True))
    return results, samples
