"""What the stages share: their options, their records, and what stands for torch.cuda in a rehearsal."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..providers import one_line
from ..timing import Budget, CudaTimer

BUDGET = Budget(repeats=5, min_time=0.05, max_time=2.0)
REHEARSAL = Budget(repeats=1, min_time=1e-3, max_time=0.1, min_sample=1e-4)


class Stage:
    """A stage's process. `left` is how many seconds it may still take; `record` appends a line to the file of records.

    An error of CUDA's own, such as an access out of bounds, stays for the rest of a process: the attempts after it are
    made by a new one.
    """

    def __init__(self, description: str | None, arguments: list[str] | None = None):
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--name", default="stage", help="that its records have")
        parser.add_argument("--records", type=Path, required=True, help="the file of JSON lines that is appended to")
        parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing new after that many")
        parser.add_argument("--rehearse", action="store_true", help="without a card")
        parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N attempts")
        options = parser.parse_args(arguments)
        self.name, self.rehearse, self._records = options.name, options.rehearse, options.records
        self._end = time.monotonic() + options.seconds
        self._skip, self._attempts = options.skip, 0
        self.device = torch.device("cpu" if options.rehearse else "cuda")
        self.budget = REHEARSAL if options.rehearse else BUDGET
        # Triton's interpreter cuts numbers off to bfloat16, where every card rounds
        self.dtype = "fp32" if options.rehearse else "bf16"

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def record(self, **facts: Any) -> None:
        """One line, written at once."""
        with self._records.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.name} | facts, ensure_ascii=False) + "\n")

    def attempt(self, name: str, call: Callable[[], str | None]) -> None:
        """Records whether the call went well: it returns what is wrong, or raises. Nothing, once the time is over."""
        self._attempts += 1
        if self._attempts <= self._skip:
            return
        if self.left <= 0:
            self.record(left_out=name)
            return
        started = time.monotonic()
        try:
            complaint = call()
        except Exception as error:  # noqa: BLE001 - one that fails must not stop the others
            complaint = one_line(error)
        seconds = round(time.monotonic() - started, 2)
        self.record(name=name, ok=complaint is None, detail=complaint or "", seconds=seconds)
        if is_sticky(complaint or ""):
            sys.stdout.flush()
            again = [*sys.orig_argv[1:], "--skip", str(self._attempts), "--seconds", f"{self.left:.1f}"]
            os.execv(sys.executable, [sys.executable, *again])

    def timer(self) -> CudaTimer:
        """The one for a GPU; in a rehearsal its events are read off a clock."""
        if not self.rehearse:
            return CudaTimer(self.device)
        timer = CudaTimer(self.device, _clock())
        timer.most_calls = timer.host_calls = 2
        return timer


def is_sticky(complaint: str) -> bool:
    """Whether this process can do nothing more on its card."""
    return "CUDA error" in complaint or "Triton Error [CUDA]" in complaint


def _clock() -> SimpleNamespace:
    """Of torch.cuda, what CudaTimer uses."""

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, stop: "Event") -> float:
            return 1e3 * (stop.at - self.at)

    properties = SimpleNamespace(L2_cache_size=2**10)
    return SimpleNamespace(
        Event=Event, get_device_properties=lambda _: properties, synchronize=lambda: None, _sleep=lambda _: None
    )
