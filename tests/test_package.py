"""The package as its users get it: wheel, sdist, editable install, machines without Triton or without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastnorm
from fastnorm import backend
from fastnorm.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="asks a compiler to fail")
needs_extension = pytest.mark.skipif(not backend.statuses()["native"].available, reason="the extension is not built")


def run(*command, cwd, **env) -> subprocess.CompletedProcess:
    """Runs Python away from the checkout; an environment variable given as None is unset."""
    environment = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, text=True, capture_output=True)


def copy_of_the_tree(folder: Path) -> Path:
    """The sources without what was built from them: a build may write into its folder."""
    for name in ("fastnorm", "triton_kernels", "csrc", "tests", "bench", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    texts = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", *texts):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_of_the_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, "."]
    built = run(*command, cwd=tree, FASTNORM_BUILD_NATIVE="0")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def python_files(folder: str, under: Path = ROOT) -> set[str]:
    return {path.relative_to(under).as_posix() for path in (under / folder).rglob("*.py")}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {f"fastnorm/{name}" for name in python_files("triton_kernels")}
    assert {name for name in names if name.endswith(".py")} == kernels | python_files("fastnorm")
    assert "fastnorm/triton_kernels/__init__.py" in kernels and "fastnorm/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"fastnorm", "fastnorm_torch"}
    sources = {f"fastnorm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "csrc").rglob("*.[hc]*")}
    assert {name for name in names if "/csrc/" in name} == sources, "what `python -m fastnorm build` compiles"
    assert not [name for name in names if name.endswith(".so")]
    assert wheel.name == f"fastnorm_torch-{fastnorm.__version__}-py3-none-any.whl", "pure Python fits every machine"


def test_wheel_imports_from_where_it_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib.util as u, fastnorm; print(fastnorm.__file__);"
        "print(u.find_spec('fastnorm.triton_kernels').origin); print(u.find_spec('triton_kernels'))"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    package = tmp_path / "site" / "fastnorm"
    expected = [str(package / "__init__.py"), str(package / "triton_kernels" / "__init__.py"), "None"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_sdist_holds_what_a_build_needs(tree, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = run("-c", code, tmp_path, cwd=tree)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("fastnorm_torch-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[hc]*")}
    assert csrc and csrc | python_files("triton_kernels") | python_files("fastnorm") | python_files("tests") <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "fastnorm/py.typed"} <= names
    assert not [name for name in names if name.startswith("bench/results") and name.endswith(".png")]


def editable_install(tree: Path, folder: Path, **env) -> subprocess.CompletedProcess:
    """What `pip install -e` does, into a folder of its own."""
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    done = run("-c", code, folder, cwd=tree, **env)
    for built in folder.glob("*.whl"):
        zipfile.ZipFile(built).extractall(folder)
    return done


def test_editable_install_reads_the_checkout(tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    tree.mkdir(), site.mkdir()
    assert editable_install(copy_of_the_tree(tree), site, FASTNORM_BUILD_NATIVE="0").returncode == 0
    code = (
        f"import site; site.addsitedir({str(site)!r}); import importlib.util as u;"
        "print(u.find_spec('fastnorm').origin); print(u.find_spec('fastnorm.triton_kernels').origin);"
        "print(u.find_spec('triton_kernels'))"
    )
    # -S: the environment's own .pth files stay unread, among them that of the checkout under test. The new folder comes
    # first, because both installs have a finder module of the same name.
    path = os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])
    done = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    expected = [str(tree / "fastnorm" / "__init__.py"), str(tree / "triton_kernels" / "__init__.py"), "None"]
    assert done.stdout.splitlines() == expected, done.stderr


WITHOUT_TRITON = """
import importlib.abc, runpy, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch, fastnorm
assert not fastnorm.backend.statuses()["triton"].available
x = torch.randn(5, 33, requires_grad=True)
for norm, stock in ((fastnorm.RMSNorm, torch.nn.RMSNorm), (fastnorm.LayerNorm, torch.nn.LayerNorm)):
    y, expected = norm(33)(x), stock(33)(x)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients)
y, h = fastnorm.AddRMSNorm(33)(x, x)
torch.testing.assert_close(h, 2 * x)
sys.argv = ["fastnorm"]
runpy.run_module("fastnorm", run_name="__main__")
"""


HEAVY = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.tensor", "torch.distributed.fsdp",
         "torch.fx.experimental.symbolic_shapes", "torch.testing", "sympy", "mpmath", "onnx", "matplotlib", "pandas",
         "scipy", "transformers", "timm")  # fmt: skip


def test_the_import_loads_nothing_heavy(tmp_path):
    """Beyond what torch has loaded: the compiler alone takes two seconds, and who needs it has it loaded by its use."""
    code = "import sys, torch; old = {*sys.modules}; import fastnorm; print(*{*sys.modules} - old)"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "fastnorm.ops.sync_batch_norm" in loaded
    assert not [name for name in loaded if f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY))]


def test_everything_but_triton_works_without_triton(tmp_path):
    done = run("-c", WITHOUT_TRITON, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout and "pip install" in done.stdout.partition("to get what is missing")[2]


@pytest.mark.parametrize("asked_for", [None, "1"])
def test_without_a_compiler_the_extension_is_left_out_with_a_message(tree, asked_for):
    command = ["setup.py", "build_ext", "--inplace"]
    done = run(*command, cwd=tree, CXX="/nonexistent/c++", FASTNORM_BUILD_NATIVE=asked_for)
    assert done.returncode == (1 if asked_for else 0)
    assert "No C++ compiler: '/nonexistent/c++' was not found" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(tree.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize("asked_for", [None, "1"])
def test_a_compile_error_is_told_as_such(tmp_path, asked_for):
    tree, site = tmp_path / "tree", tmp_path / "site"
    tree.mkdir(), site.mkdir()
    for source in (copy_of_the_tree(tree) / "csrc").rglob("*.c*"):
        source.unlink()
    (tree / "csrc" / "ops.cpp").write_text("this is not C++\n")
    done = editable_install(tree, site, FASTNORM_BUILD_NATIVE=asked_for, FASTNORM_BUILD_CUDA="0")
    assert "The C++ extension did not compile" in " ".join(done.stderr.split())
    assert (done.returncode, len(list(site.glob("*.whl")))) == ((1, 0) if asked_for else (0, 1)), done.stderr


def test_report_names_versions_devices_and_who_serves_what(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert any(torch.__version__ in line for line in lines)
    for name, status in backend.statuses().items():
        assert any(line.split()[:2] == [name, "yes:" if status.available else "no:"] for line in lines)
    for operation in backend.OPERATIONS:
        choice = fastnorm.explain(torch.empty(1, 64), op=operation)
        assert any(line.startswith(f"  {operation} on cpu ") and choice.backend in line for line in lines)


def test_report_ends_quietly_when_its_reader_does():
    command = [sys.executable, "-m", "fastnorm"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_report_says_how_to_get_what_is_missing(capsys, monkeypatch):
    absent = backend.Status("native", False, "no compiler here", "pip install --no-build-isolation .")
    monkeypatch.setattr(backend, "statuses", lambda: {"native": absent})
    main([])
    text = capsys.readouterr().out
    assert "fastnorm._C  not built" in text and "no: no compiler here" in text
    assert text.partition("to get what is missing")[2].split() == [":", "native", *absent.remedy.split()]


@needs_extension
def test_build_info_describes_this_build():
    from fastnorm import native

    info = native.build_info()
    assert info["torch"] == torch.__version__.partition("+")[0], "built against another torch: build it again"
    assert info["openmp"] is (sys.platform != "darwin")
    assert "-O3" in info["flags"] and info["compiler"].split()[0] in ("gcc", "clang")
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
