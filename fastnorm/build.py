"""The compiled extension: where it is, whether it fits this Python and torch, and `python -m fastnorm build`.

`pip install --no-build-isolation` and `make install` put it into the package, `python -m fastnorm build` into the
user's cache. The cache has a folder for each combination of fastnorm's C++ sources, torch and Python, and in it one
for each set of compiler options; the newest of these is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TextIO

import torch

from . import __version__, extension

PACKAGE = Path(__file__).resolve().parent
COMMAND = "python -m fastnorm build"


class BuildError(Exception):
    """Why `build` failed, and what to do."""


def load() -> ModuleType:
    """Returns fastnorm._C. Raises ImportError, which says what to do, where no build fits this Python and torch."""
    reasons = []
    finders: tuple[Callable[[], Path | None], ...] = (lambda: in_folder(PACKAGE), cached)
    for find in finders:
        try:
            path = find()
            module = None if path is None else _import(path)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
            reasons.append(str(error))
            continue
        if module is not None:
            return module
    raise ImportError(f"{'; '.join(reasons) or f'the C++ extension is not built: {_absence()}'}; run: {COMMAND}")


def _import(path: Path) -> ModuleType:
    if (reason := mismatch(path)) is not None:
        raise ImportError(reason)
    spec = importlib.util.spec_from_file_location(f"{__package__}._C", path)
    assert spec is not None and spec.loader is not None, "the suffix is an extension module's"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"the build for torch {torch.__version__} can't be loaded: {error}") from error
    sys.modules[spec.name] = module
    return module


def _public(version: str) -> str:
    """A version without its local part, such as +cu130."""
    return version.partition("+")[0]


def _absence() -> str:
    """Why no build was found."""
    if any(cache_folder().glob(f"{__version__}-*/*/{extension.RECORD}")):
        return f"the builds in {cache_folder()} are for another torch, Python or version of the sources"
    return extension.recorded(PACKAGE).get("reason", "no build was found").rstrip(".")


def mismatch(path: Path) -> str | None:
    """Why a build must not be loaded: one for another torch may crash while it loads. None where it fits."""
    built_for = extension.recorded(path.parent).get("torch", "one that is not recorded")
    if _public(built_for) == _public(torch.__version__):
        return None
    return f"{path} was built for torch {built_for}, and this is torch {torch.__version__}"


def in_folder(folder: Path) -> Path | None:
    """The path of the extension for this Python in a folder, if there is one."""
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists()), None)


def cached() -> Path | None:
    """The path of the cache's newest build for these sources, this torch and Python, if there is one."""
    found = filter(None, map(in_folder, builds_folder().glob("*")))
    return max(found, key=lambda path: path.parent.stat().st_mtime, default=None)


def cache_folder() -> Path:
    """$FASTNORM_CACHE_DIR, or the folder fastnorm in the user's cache."""
    if folder := os.environ.get("FASTNORM_CACHE_DIR"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fastnorm"


def sources_folder() -> Path:
    """csrc: inside an installed package, beside the package in the source folder."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def builds_folder() -> Path:
    """The cache's folder of builds for these sources, this torch and Python."""
    digest = hashlib.sha256()
    for path in sorted(sources_folder().rglob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    python = sysconfig.get_config_var("SOABI")
    return cache_folder() / f"{__version__}-{digest.hexdigest()[:12]}-torch-{torch.__version__}-{python}"


def target_folder() -> Path:
    """The cache's folder for a build with the options of this environment."""
    options = json.dumps(extension.options(), sort_keys=True)
    return builds_folder() / hashlib.sha256(options.encode()).hexdigest()[:12]


def build(force: bool = False) -> Path:
    """Compiles the extension for this torch into the user's cache, printing progress; returns its path.

    An earlier build with the same options is kept if it can be loaded, unless `force`. Processes that build at the
    same time wait for each other. A build that fails or is interrupted leaves the cache as it was.

    Raises BuildError, which says what to do.
    """
    try:
        target = target_folder()
        cache_folder().mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(), tempfile.TemporaryDirectory(dir=cache_folder(), prefix="building-") as scratch:
            if force or load_error(target) is not None:
                result = _compile(Path(scratch))
                if (reason := load_error(result)) is not None:
                    raise BuildError(f"What was built in {cache_folder()} can't be loaded: {reason}")
                target.parent.mkdir(exist_ok=True)
                if target.exists():  # moved, not deleted: another process may be loading it
                    target.rename(Path(scratch) / "old")
                result.rename(target)
            os.utime(target)  # the newest is loaded
    except extension.CannotBuild as error:
        raise BuildError(str(error)) from error
    except BrokenPipeError:  # the reader of the progress has gone
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        raise BuildError(f"{error}: set FASTNORM_CACHE_DIR to a folder that can be written to") from error
    path = in_folder(target)
    assert path is not None, "it has been built or loaded"
    return path


def load_error(folder: Path) -> str | None:
    """Why this torch can't load the folder's extension, tried in another process; None where it can."""
    path = in_folder(folder)
    if path is None or (reason := mismatch(path)) is not None:
        return "there is none" if path is None else reason
    code = (
        "import sys, torch, importlib.util as util; spec = util.spec_from_file_location('fastnorm._C', sys.argv[1]);"
        "spec.loader.exec_module(util.module_from_spec(spec))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1]


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(cache_folder() / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is building in {cache_folder()}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compile(scratch: Path) -> Path:
    """Builds in the scratch folder; returns the folder with the extension and its record."""
    arguments = [sources_folder(), scratch / "lib", scratch / "objects"]
    # runpy keeps the folder of extension.py off sys.path.
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, extension.__file__, *map(str, arguments)]
    for left in cache_folder().glob("building-*"):  # left by killed builds, as only one runs at a time
        if left != scratch:
            shutil.rmtree(left, ignore_errors=True)
    log = cache_folder() / "build.log"
    scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"  # where pip puts ninja
    with log.open("w") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=scratch,
        env=os.environ | {"PATH": scripts}, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None, "it is a pipe"
        try:
            for name in _compiled(process.stdout, file):
                print(f"  {name}", flush=True)
        except BaseException:  # an interrupt must end the compilers too
            os.killpg(process.pid, signal.SIGTERM)
            raise
    result = scratch / "lib" / "fastnorm"
    if process.returncode or in_folder(result) is None:
        output = log.read_text().splitlines()
        errors = [line for line in output if re.search(r"error\b", line, re.IGNORECASE)]
        raise BuildError("\n".join(["The build failed:", *(errors or output)[:10], f"The whole output is in {log}."]))
    return result


def _compiled(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    """Yields each source that the build compiles, with ninja's count if any, and writes all lines to the log."""
    seen = set()
    for line in lines:
        log.write(line)
        if match := re.search(r"^(\[\d+/\d+\] )?.* -c (?:-c )?\S*/(csrc/\S+\.(?:cpp|cu))\b", line):
            if match[2] not in seen:
                yield (match[1] or "") + match[2]
            seen.add(match[2])
