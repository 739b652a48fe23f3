"""What the numbers were measured on."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess

import torch
from torch.utils import collect_env

import fastnorm.backend

SIMD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the software, in the order in which they are printed."""
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        facts |= _gpu(device)
    facts |= {
        "cpu": cpu_name(),
        "cores / threads used": f"{os.cpu_count()} / {torch.get_num_threads()}",
        "simd": f"{torch.backends.cpu.get_cpu_capability()} ({' '.join(_simd_flags()) or 'flags unknown'})",
        "memory": f"{_memory_bytes() / 2**30:.0f} GiB",
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastnorm": fastnorm.__version__,
        "backends": "; ".join(f"{s.name}: {s.detail}" for s in fastnorm.backend.statuses().values() if s.available),
        "load before the run": _load(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return facts


def device_name(device: torch.device) -> str:
    """The name that results are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """`name` as part of a file name: lowercase words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def cpu_name() -> str:
    """The processor's model, or its architecture where the system doesn't tell."""
    if platform.system() == "Darwin":
        sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(sysctl, capture_output=True, text=True, check=True).stdout.strip()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, "" where there is none."""
    if not os.path.exists("/proc/cpuinfo"):
        return ""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _simd_flags() -> list[str]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in SIMD_FLAGS if flag in flags]


def _memory_bytes() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    return f"{load:.2f}" + (" (the machine is busy: expect noise)" if load > 0.5 * (os.cpu_count() or 1) else "")


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


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
