"""How the C++ extension fastnorm._C is built: for setup.py, and for `python -m fastnorm build`.

setup.py loads this file where torch may be missing, so that the module's own imports are of the standard library alone.
FASTNORM_BUILD_CUDA=0 leaves the CUDA part out; CXX, CFLAGS, MAX_JOBS and TORCH_CUDA_ARCH_LIST work as usual.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CXX_STANDARD = "-std=c++20"  # torch before 2.12 would compile as C++17
CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0")  # A100, H100, B200, RTX 50
RECORD = "_build.json"  # beside the extension or in its place: what it was built for, or why it was left out
run = partial(subprocess.run, text=True, capture_output=True)


class CannotBuild(Exception):
    """Why the extension can't be built on this machine, in a sentence that says what to do."""


def compiler() -> list[str]:
    """The command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX") or "c++")


def check_compiler() -> None:
    """Raises CannotBuild unless torch, setuptools and a suitable compiler are there."""
    cxx = compiler()
    if find_spec("torch") is None:
        raise CannotBuild("this installation was built without torch, as every wheel from PyPI is.")
    if find_spec("setuptools") is None:
        raise CannotBuild("setuptools is missing: pip install setuptools ninja.")
    if shutil.which(cxx[0]) is None:
        raise CannotBuild(
            f"No C++ compiler: '{cxx[0]}' was not found (install g++ or clang++, or name a compiler in CXX)."
        )
    check = partial(run, [*cxx, CXX_STANDARD, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"])
    if check(input="#include <bit>\nstatic_assert(std::endian::native == std::endian::little);").returncode:
        raise CannotBuild(f"'{cxx[0]}' doesn't compile C++20: use gcc 10 or newer, or clang, and name it in CXX.")
    if check(input="#include <Python.h>").returncode:
        raise CannotBuild(f"'{cxx[0]}' finds no Python.h: install Python's headers (python3-dev on Debian and Ubuntu).")
    if sys.platform != "darwin" and run([*cxx, "-fopenmp", "-fsyntax-only", "-x", "c++", "-"],
                                        input="#include <omp.h>").returncode:  # fmt: skip
        raise CannotBuild(f"'{cxx[0]}' can't compile OpenMP: use g++, or install libomp-dev for clang.")


def cuda_root() -> str | None:
    """The CUDA toolkit's folder: CUDA_HOME, or what nvcc reports, which may be a wrapper script in another folder."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    dryrun = run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]).stderr if nvcc else ""
    top = re.search(r"^#\$ TOP=(.+?)\s*$", dryrun, re.MULTILINE)
    return os.path.realpath(top[1]) if top else None


def _required_cuda_root() -> str:
    root = cuda_root()
    assert root is not None, "without_cuda has found it"
    return root


def without_cuda(torch_cuda: str | None) -> str | None:
    """Why the CUDA part is left out; None where it can be built."""
    if torch_cuda is None:
        return "torch is built without CUDA"
    if os.environ.get("FASTNORM_BUILD_CUDA") == "0":
        return "FASTNORM_BUILD_CUDA=0"
    root = cuda_root()
    if root is None:
        return f"no nvcc was found (torch is built for CUDA {torch_cuda})"
    nvcc = shutil.which("nvcc", path=os.path.join(root, "bin"))
    release = re.search(r"release (\d+)\.\d+", run([nvcc, "--version"]).stdout if nvcc else "")
    if release and release[1] == torch_cuda.split(".")[0]:
        return None
    found = f"nvcc {release[0]}" if release else "no working bin/nvcc"
    return f"torch is built for CUDA {torch_cuda}, but {root} has {found}"


def cuda_archs() -> str:
    """The architectures to compile for: TORCH_CUDA_ARCH_LIST, or those of the visible cards, or CUDA_ARCHS.

    The lowest of those that aren't the user's own is compiled to PTX too: the driver compiles it for newer cards.
    """
    import torch

    if own := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return own
    known = run([os.path.join(_required_cuda_root(), "bin", "nvcc"), "--list-gpu-code"]).stdout
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    for wanted in ([f"{major}.{minor}" for major, minor in sorted(cards)], CUDA_ARCHS):
        if archs := [arch for arch in wanted if f"sm_{arch.replace('.', '')}" in known]:
            return ";".join([f"{archs[0]}+PTX", *archs[1:]])
    raise CannotBuild(f"nvcc of {cuda_root()} compiles for none of {', '.join(CUDA_ARCHS)}: set FASTNORM_BUILD_CUDA=0.")


def flags() -> list[str]:
    """The C++ compiler's flags, to which setuptools and torch add theirs."""
    # at::parallel_for needs OpenMP for more than one thread; on macOS a second libomp beside torch's aborts.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    optimise = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # the user's own choice holds
    return [*optimise, "-fno-math-errno", *openmp]


def options() -> dict[str, str]:
    """The compiler and the options of a build in this environment. Raises CannotBuild."""
    check_compiler()
    import torch

    left_out = without_cuda(torch.version.cuda)
    return {
        "compiler": " ".join([*compiler(), "=", run([*compiler(), "--version"]).stdout.partition("\n")[0]]),
        "flags": " ".join([*flags(), CXX_STANDARD, *(os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS"))]),
        "linker flags": os.environ.get("LDFLAGS", ""),
        "CUDA": f"left out: {left_out}" if left_out else f"{torch.version.cuda}, {cuda_archs()}",
    }


def setup_arguments(csrc: str) -> dict[str, Any]:
    """The arguments of setuptools.setup() that build the extension from the folder csrc. Raises CannotBuild."""
    check_compiler()
    import torch

    cuda = without_cuda(torch.version.cuda) is None
    if cuda:  # torch.utils.cpp_extension reads both, the first one at its import
        os.environ["CUDA_HOME"] = _required_cuda_root()
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # or, without ninja, objects built for another torch would count as up to date

        def run(self) -> None:
            super().run()  # copies an in-place build into the package
            if os.path.exists(path := self.get_ext_fullpath("fastnorm._C")):  # an optional build may have failed
                record(Path(path).parent, {"torch": torch.__version__, "cuda": torch.version.cuda if cuda else None})

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))  # ninja starts two more by default, of about 1 GB each
    openmp = [flag for flag in flags() if flag == "-fopenmp"]
    extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "fastnorm._C",
        [*sorted(glob(f"{csrc}/*.cpp") + glob(f"{csrc}/cpu/*.cpp") + glob(f"{csrc}/cuda/*.c*[pu]") * cuda)],
        define_macros=[("FASTNORM_CXX_FLAGS", f'"{" ".join(flags())}"'), *([("FASTNORM_CUDA", "1")] if cuda else [])],
        extra_compile_args={
            "cxx": [*flags(), CXX_STANDARD, "-g0", "-fvisibility=hidden"],
            "nvcc": ["-O3", CXX_STANDARD],
        },
        extra_link_args=[*openmp, *(["-Wl,-s"] if sys.platform == "linux" else [])],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def record(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the record into the folder: {"torch": …, "cuda": …} of a build, or {"reason": …} why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(facts) + "\n")
    new.replace(folder / RECORD)  # atomic: no reader sees half of it


def recorded(folder: Path) -> dict[str, Any]:
    """The record in the folder; empty where there is none."""
    try:
        facts = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in facts.items() if value is not None} if isinstance(facts, dict) else {}


if __name__ == "__main__":  # python extension.py <csrc> <folder for the extension> <folder for objects>
    from setuptools import setup

    csrc, output, objects = sys.argv[1:]
    setup(
        name="fastnorm",
        script_args=["build_ext", f"--build-lib={output}", f"--build-temp={objects}"],
        **setup_arguments(csrc),
    )
