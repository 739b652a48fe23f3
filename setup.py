"""Packages, and the optional C++/CUDA extension; everything else is in pyproject.toml.

FASTNORM_BUILD_NATIVE=0 leaves the extension out, =1 makes it an error that it can't be built; unset, it is built where
it can be. FASTNORM_BUILD_CUDA=0 leaves its CUDA part out. CXX, MAX_JOBS and TORCH_CUDA_ARCH_LIST work as usual.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from functools import partial
from glob import glob
from importlib.util import find_spec

from setuptools import find_packages, setup
from setuptools.errors import CCompilerError

NATIVE = os.environ.get("FASTNORM_BUILD_NATIVE")
run = partial(subprocess.run, text=True, capture_output=True)


def say(text: str) -> None:
    """One wrapped paragraph on stderr; pip shows it with -v, and always when the build fails."""
    print("\n" + textwrap.fill(f"fastnorm: {text}", 100) + "\n", file=sys.stderr, flush=True)


def give_up(reason: str) -> dict:
    """Says that the extension is left out and why; ends the build where the extension was asked for."""
    if NATIVE == "1":
        sys.exit(f"\nfastnorm: {reason} FASTNORM_BUILD_NATIVE=1 asks for the C++ extension: the build stops here.\n")
    say(f"{reason} The C++ extension fastnorm._C is left out: the package works without it, but slower on CPUs.")
    return {}


def obstacle(cxx: list[str]) -> str | None:
    """Why the extension can't be built on this machine, in a sentence; None if it can."""
    check = [*cxx, "-fsyntax-only", "-x", "c++", "-"]
    if shutil.which(cxx[0]) is None:
        return f"No C++ compiler: '{cxx[0]}' was not found (install g++ or clang++, or name a compiler in CXX)."
    if run([*check, f"-I{sysconfig.get_path('include')}"], input="#include <Python.h>").returncode:
        return f"'{cxx[0]}' finds no Python.h: install Python's headers (python3-dev on Debian and Ubuntu)."
    if sys.platform != "darwin" and run([*check, "-fopenmp"], input="#include <omp.h>").returncode:
        return f"'{cxx[0]}' can't compile OpenMP: use g++, or install libomp-dev for clang."
    if find_spec("torch") is None:
        return "torch can't be imported here: install it, then use pip install --no-build-isolation."
    return None


def cuda_root() -> str | None:
    """The CUDA toolkit's folder: CUDA_HOME, or what nvcc says, which may be a wrapper script that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    dryrun = run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]).stderr if nvcc else ""
    top = re.search(r"^#\$ TOP=(.+?)\s*$", dryrun, re.MULTILINE)
    return os.path.realpath(top[1]) if top else None


def cuda_is_usable(torch_cuda: str | None) -> bool:
    """Whether the CUDA part can be built. Sets CUDA_HOME, which torch.utils.cpp_extension reads once, on import."""
    if torch_cuda is None or os.environ.get("FASTNORM_BUILD_CUDA") == "0" or (root := cuda_root()) is None:
        return False
    os.environ["CUDA_HOME"] = root
    nvcc = shutil.which("nvcc", path=os.path.join(root, "bin"))
    release = re.search(r"release (\d+)\.\d+", run([nvcc, "--version"]).stdout if nvcc else "")
    if release and release[1] == torch_cuda.split(".")[0]:
        return True
    found = f"nvcc {release[0]}" if release else "no working bin/nvcc"
    say(f"torch is built for CUDA {torch_cuda}, but {root} has {found}: only the CPU kernels are built.")
    return False


def native() -> dict:
    """setup()'s arguments for the extension; none where it can't be built or isn't wanted."""
    if NATIVE == "0" or {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}
    if reason := obstacle(shlex.split(os.environ.get("CXX", "c++"))):
        return give_up(reason)
    import torch

    cuda = cuda_is_usable(torch.version.cuda)
    from torch.utils import cpp_extension

    class BuildNative(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except (CCompilerError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                self.extensions[0].optional = True  # or an editable install fails for want of the file
                give_up(f"The C++ extension did not compile ({error}); the compiler's own words are above.")

    if cuda and not torch.cuda.is_available():  # no GPU to ask: of A100, H100, B200 and RTX 50 those that nvcc knows
        known = run([os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"), "--list-gpu-code"]).stdout
        archs = [arch for arch in ("8.0", "9.0", "10.0", "12.0") if f"sm_{arch.replace('.', '')}" in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs) + "+PTX")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))  # ninja would start two more, at about 1 GB each
    # Without OpenMP at::parallel_for has one thread; but on macOS a second libomp beside torch's own aborts.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    optimise = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # a user's own choice stands
    flags = [*optimise, "-fno-math-errno", *openmp]
    extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "fastnorm._C",
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp") + glob("csrc/cuda/*.c*[pu]") * cuda)],
        define_macros=[("FASTNORM_CXX_FLAGS", f'"{" ".join(flags)}"'), *([("FASTNORM_CUDA", "1")] if cuda else [])],
        extra_compile_args={"cxx": [*flags, "-g0", "-fvisibility=hidden"], "nvcc": ["-O3"]},
        extra_link_args=[*openmp, *(["-Wl,-s"] if sys.platform == "linux" else [])],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fastnorm", "fastnorm.*"]), "fastnorm.triton_kernels"],
        package_dir={"fastnorm.triton_kernels": "triton_kernels"},
        **native(),
    )
