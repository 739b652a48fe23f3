"""Packages, and the optional C++/CUDA extension; everything else is in pyproject.toml.

FASTNORM_BUILD_NATIVE=0 leaves the extension out, =1 makes it an error that it can't be built; unset, it is built where
it can be. fastnorm/extension.py has the build itself and its other environment variables.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError

NATIVE = os.environ.get("FASTNORM_BUILD_NATIVE")


def load(path: str):
    """Imports a module without its package, whose import needs torch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


extension = load("fastnorm/extension.py")


def give_up(reason: str) -> None:
    """Says that the extension is left out and why; ends the build where the extension was asked for."""
    if NATIVE == "1":
        sys.exit(f"\nfastnorm: {reason} FASTNORM_BUILD_NATIVE=1 asks for the C++ extension: the build stops here.\n")
    text = (
        f"fastnorm: {reason} The C++ extension is left out. The package works without it, but slower on CPUs; to build "
        "it after the installation: python -m fastnorm build"
    )
    print("\n" + textwrap.fill(text, 100) + "\n", file=sys.stderr, flush=True)


def build_python(reason: str) -> type:
    """build_py that records why the extension was left out, for `python -m fastnorm`."""

    class BuildPython(build_py):
        def run(self):
            super().run()
            folder = Path("fastnorm") if self.editable_mode else Path(self.build_lib, "fastnorm")
            if not list(folder.glob("_C*.so")):  # an editable install keeps an extension built in place
                extension.record(folder, {"reason": reason})

    return BuildPython


def native() -> dict:
    """The arguments of setup() that build the extension, or that record why there is none."""
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}
    if NATIVE == "0":
        return {"cmdclass": {"build_py": build_python("FASTNORM_BUILD_NATIVE=0 left it out of this installation.")}}
    try:
        arguments = extension.setup_arguments("csrc")
    except extension.CannotBuild as error:
        give_up(str(error))
        return {"cmdclass": {"build_py": build_python(str(error))}}

    class BuildNative(arguments["cmdclass"]["build_ext"]):
        failure = None

        def run(self):
            super().run()
            if self.failure:
                extension.record(Path(self.get_ext_fullpath("fastnorm._C")).parent, {"reason": self.failure})

        def build_extensions(self):
            try:
                super().build_extensions()
            except (CCompilerError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                self.extensions[0].optional = True  # or an editable install fails: the file is missing
                give_up(f"The C++ extension did not compile ({error}); see the compiler's output above.")
                self.failure = f"The compiler failed: {error}."

    return arguments | {"cmdclass": {"build_ext": BuildNative}}


if __name__ == "__main__":
    csrc = ["fastnorm.csrc", "fastnorm.csrc.cpu", "fastnorm.csrc.cuda"]  # from which every installation can build
    setup(
        packages=[*find_packages(include=["fastnorm", "fastnorm.*"]), "fastnorm.triton_kernels", *csrc],
        package_dir={"fastnorm.triton_kernels": "triton_kernels", "fastnorm.csrc": "csrc"},
        package_data={name: ["*.h", "*.cpp", "*.cu", "*.cuh"] for name in csrc},
        **native(),
    )
