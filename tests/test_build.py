"""`python -m fastnorm build`, what setup.py records, and which build is loaded."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastnorm
from fastnorm import backend, build, extension
from fastnorm.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="compiles")
# Small enough to be compiled in a second; what the real one says of its torch.
MODULE = """
#include <Python.h>
#include <torch/version.h>
static PyObject* build_info(PyObject*, PyObject*) { return Py_BuildValue("{s:s}", "torch", TORCH_VERSION); }
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
"""


def install(folder: Path, monkeypatch) -> Path:
    """An installation whose csrc is MODULE alone, and an empty cache."""
    package = folder / "site" / "fastnorm"
    for kind in ("cpu", "cuda"):
        (package / "csrc" / kind).mkdir(parents=True)
    (package / "csrc" / "ops.cpp").write_text(MODULE)
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "0")
    return package


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    package = install(tmp_path, monkeypatch)
    loaded = sys.modules.get("fastnorm._C")
    yield package
    sys.modules.pop("fastnorm._C", None)
    if loaded is not None:
        sys.modules["fastnorm._C"] = loaded


@pytest.fixture(scope="module")
def built_once(tmp_path_factory) -> Path:
    """The cache after a build."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(tmp_path_factory.mktemp("built"), monkeypatch)
        build.build()
        return build.cache_folder()


@pytest.fixture
def built(built_once, package) -> Path:
    """What `build.build()` has made for `package`, without the seconds that it takes."""
    shutil.copytree(built_once, build.cache_folder())
    return build.in_folder(build.target_folder())


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@needs_compiler
def test_what_is_built_is_loaded_and_not_built_twice(package, capsys, monkeypatch):
    with pytest.raises(ImportError, match="no build was found"):
        build.load()
    before = listing(package)
    main(["build"])
    output = capsys.readouterr().out
    assert "csrc/ops.cpp" in output and "built in" in output
    assert listing(package) == before, "a package may lie where nobody can write"
    path = Path(build.load().__file__)
    assert path.is_relative_to(build.cache_folder()) and build.load().build_info()["torch"] in torch.__version__

    stamp = path.stat().st_mtime_ns
    main(["build"])
    assert "csrc/ops.cpp" not in capsys.readouterr().out and path.stat().st_mtime_ns == stamp
    main(["build", "--check"])
    output = capsys.readouterr().out
    assert str(path) in output and output.split()[-2:] == ["built", "yes"] and torch.__version__ in output

    monkeypatch.setenv("CFLAGS", "-O1")
    main(["build", "--check"])
    assert "-O1" in (output := capsys.readouterr().out) and output.split()[-1] == "no", "other flags, another build"
    main(["build"])
    assert Path(build.load().__file__).parent == build.target_folder() != path.parent
    monkeypatch.delenv("CFLAGS")
    main(["build"])
    assert build.load().__file__ == str(path), "what was asked for last"


@needs_compiler
def test_a_build_for_another_torch_is_not_loaded(built):
    note = built.parent / extension.RECORD
    note.write_text(json.dumps({"torch": "2.1.0+cu118", "cuda": None}))
    with pytest.raises(ImportError, match=r"built for torch 2\.1\.0\+cu118, and this is torch "):
        build.load()
    for unclear in ("", '{"reason": "the compiler failed"}', '{"torch": '):
        note.write_text(unclear)
        with pytest.raises(ImportError, match="built for torch one that is not recorded"):
            build.load()
    note.write_text(json.dumps({"torch": torch.__version__}))
    built.write_bytes(b"no library")
    with pytest.raises(ImportError, match="can't be loaded"):
        build.load()
    build.builds_folder().rename(build.cache_folder() / f"{fastnorm.__version__}-0123-torch-2.1.0-cpython-38")
    with pytest.raises(ImportError, match="for another torch, Python or version"):
        build.load()


@needs_compiler
@pytest.mark.parametrize("fault", ["torch", "library"])
def test_the_command_that_is_named_repairs_a_build(built, fault, capsys, monkeypatch, tmp_path):
    """What the compiler makes is there already: that it is called and waited for, others test."""
    copy = shutil.copytree(built.parent, tmp_path / "compiled")
    monkeypatch.setattr(build, "_compile", lambda scratch: shutil.copytree(copy, scratch / "lib"))
    if fault == "torch":
        (built.parent / extension.RECORD).write_text(json.dumps({"torch": "2.1.0"}))
    else:
        built.write_bytes(b"no library")
    with pytest.raises(ImportError, match=f"run: {build.COMMAND}"):
        build.load()
    main(["build", "--check"])
    assert capsys.readouterr().out.split()[-1] == "no"
    main(["build"])
    assert build.load().__file__ == str(built)


@needs_compiler
def test_a_build_that_is_ended_leaves_no_compiler_running(package, tmp_path, capsys):
    """By SIGTERM; the next build finds the lock free, and nothing in its way."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *"-c "*slow.cpp*) touch {tmp_path}/began; sleep 600 ;; esac
exec c++ "$@"
""")
    compiler.chmod(0o755)
    (package / "csrc" / "cpu" / "slow.cpp").write_text("")
    code = (
        "import sys; from pathlib import Path; from fastnorm import build, __main__\n"
        "build.PACKAGE = Path(sys.argv[1]); __main__.main(['build'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CXX": str(compiler)}
    process = subprocess.Popen([sys.executable, "-c", code, str(package)], env=environment, stderr=subprocess.PIPE)
    while not (tmp_path / "began").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.splitlines()[-1].endswith(b"interrupted; the cache is as it was")
    for _ in range(200):  # ninja ends what it started
        if str(compiler) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a compiler goes on")
    with build._one_at_a_time():
        assert "waiting" not in capsys.readouterr().out
    assert listing(build.cache_folder()) <= {"lock", "build.log"}


@needs_compiler
def test_a_broken_build_in_the_package_does_not_hide_the_one_in_the_cache(package, built):
    (package / built.name).write_bytes(b"no library")
    assert build.load().__file__ == str(built)


@needs_compiler
def test_a_failed_build_says_why_and_leaves_the_cache_as_it_was(package, built):
    (package / "csrc" / "ops.cpp").write_text("this is not C++\n")
    before = listing(build.cache_folder())
    with pytest.raises(build.BuildError, match=r"(?s)The build failed.*error: .*build\.log"):
        build.build()
    assert listing(build.cache_folder()) == before and built.exists()


@needs_compiler
def test_processes_that_build_at_once_build_once(package, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fastnorm import build\n"
        "build.PACKAGE = Path(sys.argv[1]); print(build.build())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", code, str(package)]
    running = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(output.count("csrc/ops.cpp") for output in outputs) == 1
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]


@needs_compiler
def test_a_forced_build_replaces_the_older_one_and_clears_what_killed_builds_leave(built, capsys):
    left, stamp = build.cache_folder() / "building-of-another", built.stat().st_mtime_ns
    (left / "objects").mkdir(parents=True)
    main(["build", "--force"])
    assert "csrc/ops.cpp" in capsys.readouterr().out and built.stat().st_mtime_ns > stamp
    assert build.load().__file__ == str(built)
    assert [path.name for path in build.cache_folder().iterdir() if path.name.startswith("building")] == []


def test_without_a_cache_there_is_none(package, monkeypatch):
    """A user without a home, or one that may not be read: fastnorm imports all the same."""
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build, "cache_folder", no_home)
    with pytest.raises(ImportError, match="home directory"):
        build.load()


@needs_compiler
def test_a_build_in_place_is_recorded(tmp_path):
    """By setup.py, as for an editable installation."""
    for name in ("fastnorm", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build*"))
    for kind in ("cpu", "cuda"):
        (tmp_path / "csrc" / kind).mkdir(parents=True)
    (tmp_path / "csrc" / "ops.cpp").write_text(MODULE)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FASTNORM_BUILD_NATIVE": "1", "FASTNORM_BUILD_CUDA": "0"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert build.in_folder(tmp_path / "fastnorm")
    assert extension.recorded(tmp_path / "fastnorm") == {"torch": torch.__version__}


def test_a_cache_that_cannot_be_written_is_named(package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="set FASTNORM_CACHE_DIR to a folder"):
        build.build()


@pytest.mark.parametrize(("command", "message"), [("/no/c++", "'/no/c++' was not found"), ("false", "C++20")])
def test_a_compiler_that_will_not_do_is_named(package, monkeypatch, command, message):
    monkeypatch.setenv("CXX", command)
    for arguments in (["build"], ["build", "--check"]):
        with pytest.raises(SystemExit, match="fastnorm: ") as error:
            main(arguments)
        assert message in str(error.value)


def test_an_isolated_installation_records_why_it_has_no_extension(tmp_path):
    """pip builds where torch is not: only setuptools is."""
    import setuptools

    tree, site, only = tmp_path / "tree", tmp_path / "site", tmp_path / "only"
    for name in ("fastnorm", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    only.mkdir()
    for path in Path(setuptools.__file__).parents[1].glob("*"):
        if path.name.startswith(("setuptools", "_distutils_hack")):
            (only / path.name).symlink_to(path)
    command = [sys.executable, "-S", "setup.py", "-q", "build", f"--build-lib={site}"]
    environment = {k: v for k, v in os.environ.items() if k != "FASTNORM_BUILD_NATIVE"} | {"PYTHONPATH": str(only)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason = extension.recorded(site / "fastnorm")["reason"]
    assert "built without torch" in reason
    assert build.COMMAND in " ".join(done.stderr.split()), "what pip shows with -v"
    environment = os.environ | {"PYTHONPATH": str(site), "FASTNORM_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "fastnorm"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"installed {site}" in done.stdout and reason.rstrip(".") in done.stdout, done.stderr
    assert build.COMMAND in done.stdout.partition("to get what is missing")[2]


@pytest.mark.parametrize("missing", ["_C", "triton_kernels"])
def test_the_tests_do_not_run_without_what_they_test(tmp_path, missing):
    """A build that can't be loaded, or kernels that can't be imported: their tests would be skipped, the rest green."""
    for name in ("fastnorm", "triton_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if missing == "_C":
        (tmp_path / "fastnorm" / f"_C{build.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
        expected = "is there, but not in use"
    else:
        pytest.importorskip("triton")
        (tmp_path / "triton_kernels" / "launch.py").write_text("raise ImportError('not today')")
        expected = "Triton is there, but fastnorm's kernels are not: not today"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_inplace_neighbours.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "FASTNORM_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and expected in done.stderr, done.stdout


NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo "#\\$ _HERE_=x" >&2; echo "#\\$ TOP=$(dirname "$0")/.." >&2 ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\n' ;;
  *) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A CUDA 12.4 toolkit whose nvcc is on PATH only as a wrapper script, as some distributions have it."""
    nvcc, wrapper = tmp_path / "cuda-12.4" / "bin" / "nvcc", tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True), wrapper.parent.mkdir()
    nvcc.write_text(NVCC)
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    nvcc.chmod(0o755), wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTNORM_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cuda-12.4"


def test_the_toolkit_is_found_behind_a_wrapper(toolkit, monkeypatch):
    assert extension.cuda_root() == str(toolkit)
    assert extension.without_cuda("12.8") is None, "minor versions of CUDA are compatible"
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert extension.cuda_root() == "/elsewhere"


def test_cuda_is_left_out_where_it_does_not_fit(toolkit, monkeypatch):
    assert "without CUDA" in extension.without_cuda(None)
    reason = extension.without_cuda("13.0")
    assert "torch is built for CUDA 13.0" in reason and "release 12.4" in reason
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert "no working bin/nvcc" in extension.without_cuda("13.0")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("FASTNORM_BUILD_CUDA", "0")
    assert extension.without_cuda("12.4") == "FASTNORM_BUILD_CUDA=0"


def test_the_cuda_part_has_ptx_that_every_newer_card_can_compile(toolkit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert extension.cuda_archs() == "8.0+PTX;9.0", "of those that this nvcc knows"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6), (9, 0))[i])
    assert extension.cuda_archs() == "8.6+PTX;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert extension.cuda_archs() == "Hopper"


def test_a_card_that_the_build_does_not_cover_takes_triton(monkeypatch):
    native = SimpleNamespace(covers=lambda index: index == 1, build_info=lambda: {"cuda_archs": ["sm_90"]})
    triton = SimpleNamespace(serves=lambda device: device == "cuda")
    monkeypatch.setattr(backend, "_native", native)
    monkeypatch.setattr(backend, "_triton", triton)
    monkeypatch.setattr(backend, "_native_clip_devices", ("cpu", "cuda"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        covered, other = torch.empty(3, device="cuda:1"), torch.empty(3, device="cuda:0")
    for op in backend.CLIPS:
        assert backend.explain(covered, op).backend == "native" and backend.explain(other, op).backend == "triton"
        with fastnorm.use("native"):
            choice = backend.explain(other, op)
        assert choice.backend == "none" and "built for sm_90, which cuda:0 is not" in choice.reason
