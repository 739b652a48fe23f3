"""What the numbers were measured on."""

import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from typing import Any

import torch
from torch.utils import collect_env

import fastnorm.backend

SIMD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
BUSY_LOAD = 0.5  # for each core: what runs beside the benchmark takes its cores and caches


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the software, in the order in which they are printed."""
    flags = [flag for flag in SIMD_FLAGS if flag in _cpu().get("flags", ())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "device": device_name(device), **(_gpu(device) if device.type == "cuda" else {}), "cpu": cpu_name(),
        "cores / threads used": f"{os.cpu_count()} / {torch.get_num_threads()}",
        "simd": f"{torch.backends.cpu.get_cpu_capability()} ({' '.join(flags) or 'flags unknown'})",
        "memory": f"{memory / 2**30:.0f} GiB", "os": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": version("triton"), "fastnorm": fastnorm.__version__,
        "backends": "; ".join(f"{s.name}: {s.detail}" for s in fastnorm.backend.statuses().values() if s.available),
        "load before the run": f"{_load():.2f}" + " (busy: expect noise)" * bool(busy_line()),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The name that results are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    limit = os.environ.get("ATEN_CPU_CAPABILITY")  # of PyTorch's kernels and of fastnorm's
    return f"{cpu_name()}{f' limited to {limit}' * bool(limit)}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """`name` as part of a file name: lowercase words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def cpu_name() -> str:
    """The processor's model, or its architecture where nothing tells."""
    return _cpu().get("brand_raw") or platform.processor() or platform.machine()


@functools.cache
def _cpu() -> dict[str, Any]:
    """py-cpuinfo's facts; none without it, as on a bare machine with a card."""
    try:
        from cpuinfo import get_cpu_info
    except ModuleNotFoundError:
        return {}
    return get_cpu_info()


def _load() -> float:
    """Processes that ran or waited for a core, on the average of the last minute; NaN where nothing tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def busy_line() -> str:
    """What a benchmark says first of all on a busy machine; "" on any other."""
    load, cores = _load(), os.cpu_count() or 1
    if not load > BUSY_LOAD * cores:
        return ""
    return f"BUSY: the load average is {load:.2f}, above {BUSY_LOAD} for each of {cores} cores: expect noise"


def _gpu(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu memory": f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": str(collect_env.get_nvidia_driver_version(collect_env.run)),
        "clocks": _clocks(device),
        "cuda / hip": f"{torch.version.cuda} / {torch.version.hip}",
    }


def _clocks(device: torch.device) -> str:
    """Those of this moment and the highest, as nvidia-smi tells them; they are read, never set."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(index).uuid}", f"--query-gpu={query}",
               "--format=csv,noheader"]  # fmt: skip
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    sm, highest, memory, power = (part.strip() for part in answer.strip().split(","))
    return f"SM {sm} (at most {highest}), memory {memory}, power limit {power}"


def version(distribution: str, absent: str = "not installed") -> str:
    """That of an installed package, or `absent`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return absent
