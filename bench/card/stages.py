"""Runs the stages, each in a process of its own and with a time limit; none stops the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import summary

ROOT = Path(__file__).parents[2]
FULL = 9  # minutes that the limits below are for
RESERVE = 10  # seconds that the summary may take
GRACE = 10  # seconds between the interrupt, at which pytest writes what it has, and the end
WORKERS = 12
INSTALL = ["-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
FITS = (
    "import sys, torch; from fastnorm import backend, native;"
    "sys.exit('no build' if backend._native is None else None if not torch.cuda.is_available()"
    " else None if 'cuda' in backend._native_clip_devices and native.covers(0) else 'not for this card')"
)


@dataclass(frozen=True)
class Command:
    """seconds: its limit, of nine minutes; command: what follows the program; is_vital: whether its failure is one of
    the whole run."""

    name: str
    seconds: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    program: list[str] = field(default_factory=lambda: [sys.executable])
    is_vital: bool = True


def planned(rehearse: bool, records: Path) -> Iterator[Command]:
    """The stages in their order; what a stage before them has built is there when they are asked for."""
    # the package itself is imported from the source folder; pip only tells the others where it is
    system = {"FASTNORM_BUILD_NATIVE": "0", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    if not rehearse:
        yield Command("install", 30, INSTALL, system, is_vital=False)
    if subprocess.run([sys.executable, "-c", FITS], cwd=ROOT, capture_output=True).returncode:
        yield Command("build", 100, ["-m", "fastnorm", "build"])

    def module(name: str, seconds: float, environment: dict[str, str] | None = None, file: str = "") -> Command:
        options = ["--name", name, "--records", str(records), "--seconds", f"{seconds:.0f}"]
        command = ["-m", f"bench.card.{file or name}", *options, *(["--rehearse"] if rehearse else [])]
        return Command(name, seconds, command, environment or {})

    yield module("smoke", 70, interpreted)  # compiles a hundred kernels, one after the other
    chosen = ["-n", str(min(WORKERS, os.cpu_count() or 1)), "-m", "card"]
    chosen += ["-k", "eps and add_rms"] if rehearse else []  # the others are `make test`'s
    pytest = ["-m", "pytest", "-q", "--dist", "load", "--tb=short", "-p", "no:cacheprovider", *chosen]
    pytest.append("--continue-on-collection-errors")  # files whose other tests need what isn't installed
    tests = {"CARD_RECORDS": str(records), "OMP_NUM_THREADS": "1"}
    where = "tests/test_row_norms.py" if rehearse else "tests"
    yield Command("tests", 240, [*pytest, "-p", "bench.card.outcomes", where], tests | interpreted)
    yield module("times", 150)
    yield module("questions", 90, interpreted)
    if not rehearse:
        yield from _profilers(module("memcheck", 60, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, file="smoke"))


def _profilers(smoke: Command) -> Iterator[Command]:
    """Only where they are installed."""
    if memcheck := shutil.which("compute-sanitizer"):
        # errors of calls that torch handles are not ours; and in torch's own pool nothing is out of bounds
        options = ["--report-api-errors", "no", "--error-exitcode", "9", sys.executable]
        yield replace(smoke, program=[memcheck, *options])
    if ncu := shutil.which("ncu"):
        metrics = "dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum"
        # left to itself it would set the card's clocks
        options = ["--clock-control", "none", "--csv", "--metrics", metrics]
        options += ["--kernel-name", "regex:norm|planes|pixels"]
        yield Command("profile", 40, ["-m", "bench.card.kernels"], program=[ncu, *options, sys.executable])


def run_all(options: Namespace) -> int:
    """Run every stage that there is time for, and write what they found after each; 0 if all of it is right."""
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve()
    for old in folder.glob("card.*"):
        old.unlink()
    end = time.monotonic() + 60 * options.minutes - RESERVE
    done, is_well = [], True
    (folder / "card.jsonl").touch()
    with (folder / "card.log").open("w", encoding="utf-8") as log:
        for stage in planned(options.rehearse, folder / "card.jsonl"):
            limit = min(stage.seconds * options.minutes / FULL, end - time.monotonic())
            done.append(_run(stage, limit, log) if limit > 1 else {"stage": stage.name, "ended": "not reached"})
            is_well &= done[-1]["ended"] == "well" or not stage.is_vital
            print(json.dumps(done[-1]), flush=True)
            failures = summary.write(folder, done, options.rehearse)["failures"]
    print(summary.text(folder))
    return int(bool(failures) or not is_well)


def _run(stage: Command, limit: float, log) -> dict:
    """How the stage ended: well, with a status, or cut short: first by an interrupt, then for good."""
    command = [*stage.program, *stage.command]
    if "--seconds" in command:  # it begins nothing new when nine tenths are over
        command[command.index("--seconds") + 1] = f"{0.9 * limit:.1f}"
    log.write(f"\n== {stage.name}, at most {limit:.0f} s: {' '.join(command)}\n")
    log.flush()
    started = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(limit)
        ended = "well" if status == 0 else f"with status {status}"
    except subprocess.TimeoutExpired:
        ended = "cut short"
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers too
    process.wait()
    seconds = round(time.monotonic() - started, 1)
    return {"stage": stage.name, "ended": ended, "seconds": seconds, "limit": round(limit)}
