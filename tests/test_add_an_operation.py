"""CONTRIBUTING.md's "Add an operation", step by step, in a copy of the package; and how a build that lacks it is told.

In processes of their own: what is registered stays for the rest of a process.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastnorm import backend, build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
needs_extension = pytest.mark.skipif(backend._native is None, reason="the extension is not built")

FORMULA = '''

def scale_shift(x, scale, shift):
    """y = x · scale + shift."""
    return x * scale + shift
'''

SCHEMAS = """

@operator("(Tensor x, Tensor scale, Tensor shift) -> Tensor")
def scale_shift_forward(x, scale, shift):
    return _like(x, x.dtype)


@operator("(Tensor dy, Tensor x, Tensor scale) -> (Tensor dx, Tensor dscale, Tensor dshift)")
def scale_shift_backward(dy, x, scale):
    return _like(x, x.dtype), _like(scale, x.dtype), _like(scale, x.dtype)
"""

OPERATION = """
import torch

from .. import backend, reference


class ScaleShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, impl):
        ctx.save_for_backward(x, scale, shift)
        ctx.impl = impl
        return impl.scale_shift_forward(x, scale, shift)

    @staticmethod
    def backward(ctx, dy):
        x, scale, shift = ctx.saved_tensors
        if backend.backward_needs_formula(dy):
            return *reference.gradients(reference.scale_shift, (x, scale, shift), dy), None
        return *ctx.impl.scale_shift_backward(dy, x, scale), None


def scale_shift(x, scale, shift):
    if backend.needs_formula("scale_shift", x, scale, shift):
        return reference.scale_shift(x, scale, shift)
    impl = backend.pick("scale_shift", x)
    return reference.scale_shift(x, scale, shift) if impl is None else ScaleShiftFunction.apply(x, scale, shift, impl)
"""

KERNELS = """
launched = []


def scale_shift_forward(x, scale, shift):
    launched.append("forward")
    return (x * scale + shift).contiguous()


def scale_shift_backward(dy, x, scale):
    launched.append("backward")
    return dy * scale, (dy * x).sum(0), dy.sum(0)
"""

USE = """
import runpy, sys, torch, fastnorm
from fastnorm import backend
from fastnorm.functional import scale_shift
from fastnorm.triton_kernels.scale_shift import launched
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

x, scale, shift = torch.randn(5, 3), torch.randn(3), torch.randn(3)
expected = x * scale + shift
leaves = [t.double().requires_grad_() for t in (x, scale, shift)]

# the formula and the kernel, and derivatives of both orders
for name in ("reference", "triton"):
    with fastnorm.use(name):
        assert fastnorm.explain(op="ScaleShift").backend == name
        torch.testing.assert_close(scale_shift(x, scale, shift), expected)
        assert ("forward" in launched) == (name == "triton")
        torch.autograd.gradcheck(scale_shift, leaves)
        torch.autograd.gradgradcheck(scale_shift, leaves)
assert "backward" in launched

# the dispatcher's operators
ours = torch.ops.fastnorm_triton
torch.library.opcheck(ours.scale_shift_forward.default, (x, scale, shift))
torch.library.opcheck(ours.scale_shift_backward.default, (x, x, scale))
mode = FakeTensorMode()
with fastnorm.use("triton"):
    fake = scale_shift(*map(mode.from_tensor, (x, scale, shift)))
assert isinstance(fake, FakeTensor) and fake.shape == x.shape

# torch.compile sees the operator where the backend is named, else the formula
graphs = []
keep = lambda graph, inputs: graphs.append(graph) or graph.forward
for name in ("triton", None):
    torch._dynamo.reset()
    with fastnorm.use(name):
        compiled = torch.compile(scale_shift, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        torch.testing.assert_close(compiled(x, scale, shift), expected)
targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
assert [("fastnorm_triton.scale_shift_forward.default" in names) for names in targets] == [True, False], targets

assert not fastnorm.backend.statuses()["native"].available, "its build lacks the operation"
sys.argv = ["fastnorm"]
runpy.run_module("fastnorm", run_name="__main__")
"""


def copy_of_the_package(folder: Path) -> Path:
    """Python and, where there is one, the extension that is in use, with its record."""
    for name in ("fastnorm", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if backend._native is not None:
        built = Path(backend._native._C.__file__)
        shutil.copy(built, folder / "fastnorm")
        shutil.copy(built.parent / "_build.json", folder / "fastnorm")
    return folder


def insert(path: Path, before: str, text: str) -> None:
    """Text in front of the only place that matches."""
    source = path.read_text()
    (found,) = re.finditer(before, source, re.MULTILINE)
    path.write_text(source[: found.start()] + text + source[found.start() :])


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def run(folder: Path, code: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTNORM_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(backend._triton is None, reason="Triton is not installed")
def test_the_steps_add_an_operation(tmp_path):
    package, kernels = copy_of_the_package(tmp_path) / "fastnorm", tmp_path / "triton_kernels"
    append(package / "reference.py", FORMULA)
    append(package / "operators.py", SCHEMAS)
    entry = '    "scale_shift": Operation("toy", ("ScaleShift",)),\n'
    insert(package / "backend.py", r"(?<=^OPERATIONS = \{\n)", entry)
    (package / "ops" / "scale_shift.py").write_text(OPERATION)
    append(package / "functional.py", "\nfrom .ops.scale_shift import scale_shift\n")
    (kernels / "scale_shift.py").write_text(KERNELS)
    insert(kernels / "__init__.py", r"^# each operator", "from . import scale_shift\n\n")
    insert(kernels / "__init__.py", r"(?<=^_modules = )", "scale_shift, ")
    report = run(tmp_path, USE)
    assert "scale_shift on cpu" in report
    assert backend._native is None or "an older build, without scale_shift_forward" in report


CHANGES = {
    "an argument more": (
        "operators.py", "bool subtract_mean, bool zero_centered", "int count, ",
        "with another signature of row_norm_forward",
    ),
    "a function more": ("native.py", "^_library =", "del _C.shape_key\n", "without shape_key"),
    "definitions of its own": (
        "native.py", "^_library =", "_older = torch.library.Library('fastnorm', 'DEF')\n"
        "_older.define('batch_norm_statistics(Tensor x, MemoryFormat format) -> Tensor')\n",
        "with another signature of batch_norm_statistics",
    ),
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("file, place, text, difference", CHANGES.values(), ids=CHANGES)
def test_another_build_is_not_used(file, place, text, difference, tmp_path):
    """The dispatcher compares signatures when the operators are defined; the formula serves, and the reason is told."""
    insert(copy_of_the_package(tmp_path) / "fastnorm" / file, place, text)
    code = "import torch, fastnorm; print(fastnorm.backend.statuses()['native'].detail);"
    said = run(tmp_path, code + "print(fastnorm.RMSNorm(8)(torch.ones(2, 8)))")
    assert f"is an older build, {difference}: " in said and build.COMMAND in said
