"""Lists of tensors and their exact norms; and the clip's CUDA kernels on a virtual GPU: nvcc compiles them alone, the
host code that plans their launches is compiled by the C++ compiler, and what it plans is launched on CPU tensors.
"""

import ctypes
import functools
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm.policy_rules import ADAGC, HEADER

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FEW, MANY, BLOCK = 192, 1600, 256
F32, F64 = torch.float32, torch.float64
ROUNDING = {F32: 2e-7, F64: 1e-12}  # of a norm: one rounding of the result, and short float32 sums of few terms
SHIM = """
#include "agc_plan.h"
using namespace fastnorm::cuda;
using Launch = void(const void* arguments, size_t bytes, uint32_t blocks);

namespace {
std::vector<Item> items_of(int count, const uint64_t* addresses, const int64_t* sizes, const int* dtypes) {
  std::vector<Item> items;
  for (int i = 0; i < count; ++i) items.push_back({addresses[i], sizes[i], dtypes[i]});
  return items;
}
}

extern "C" {
int kind(double p) { return kind_of(p); }

int64_t workspace(int count, const uint64_t* addresses, const int64_t* sizes, const int* dtypes) {
  return norm_workspace(items_of(count, addresses, sizes, dtypes));
}

void norm(int count, const uint64_t* addresses, const int64_t* sizes, const int* dtypes, int few,
          const NormRequest* request, Launch* launch) {
  const auto go = [&](const auto& a, uint32_t blocks) { launch(&a, sizeof(a), blocks); };
  const auto items = items_of(count, addresses, sizes, dtypes);
  few ? cut_norm<FEW>(items, *request, go) : cut_norm<MANY>(items, *request, go);
}

void change(int count, const uint64_t* addresses, const int64_t* sizes, const int* dtypes, int few,
            ChangeRequest request, Launch* launch) {
  const auto go = [&](const auto& a, uint32_t blocks) { launch(&a, sizeof(a), blocks); };
  for (const auto& part : disjoint(items_of(count, addresses, sizes, dtypes))) {
    few ? cut_change<FEW>(part, request, go) : cut_change<MANY>(part, request, go);
    request.first += static_cast<uint32_t>(part.size());
  }
}

void agc(int count, const uint64_t* addresses, const int64_t* sizes, const int* dtypes, const uint64_t* parameters,
         const int* parameter_dtypes, const int64_t* units, const AgcRequest* request, Launch* launch) {
  std::vector<Gradient> gradients;
  const auto items = items_of(count, addresses, sizes, dtypes);
  for (int i = 0; i < count; ++i) gradients.push_back({items[i], parameters[i], parameter_dtypes[i], units[i]});
  for (const auto& part : disjoint(gradients)) {
    cut_agc(part, *request, [&](const AgcArguments& a, uint32_t blocks) { launch(&a, sizeof(a), blocks); });
  }
}

// The units as items of the clip's kernels: gradients, then parameters.
int units(int64_t size, int64_t units, int dtype, int parameter_dtype, uint64_t address, uint64_t parameter,
          uint64_t* addresses, int64_t* sizes, int* dtypes) {
  const Gradient gradient{{address, size, dtype}, parameter, parameter_dtype, units};
  if (!gradient.is_long()) return 0;
  int count = 0;
  for (const Item& item : unit_items({gradient})) {
    addresses[count] = item.address;
    sizes[count] = item.size;
    dtypes[count++] = item.dtype;
  }
  return count;
}
}
"""


class Policy(ctypes.Structure):
    _fields_ = [
        ("state", ctypes.c_uint64), ("size", ctypes.c_int64), ("constants", 6 * ctypes.c_double),
        ("rule", ctypes.c_int),
    ]  # fmt: skip


class NormRequest(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_double), ("max_norm", ctypes.c_double), ("policy", Policy), ("workspace", ctypes.c_uint64),
        ("tickets", ctypes.c_uint64), ("norms", ctypes.c_uint64), ("total", ctypes.c_uint64),
        ("coefficient", ctypes.c_uint64), ("nonfinite", ctypes.c_uint64), ("kind", ctypes.c_int),
        ("wide", ctypes.c_int),
    ]  # fmt: skip


class ChangeRequest(ctypes.Structure):
    _fields_ = [
        ("coefficient", ctypes.c_uint64), ("norms", ctypes.c_uint64), ("bound", ctypes.c_double),
        ("clip_factor", ctypes.c_double), ("eps", ctypes.c_double), ("first", ctypes.c_uint32),
        ("per_tensor", ctypes.c_int), ("wide", ctypes.c_int),
    ]  # fmt: skip


class AgcRequest(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_double), ("clip_factor", ctypes.c_double), ("eps", ctypes.c_double), ("kind", ctypes.c_int),
    ]  # fmt: skip


_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32)


@functools.cache
def planner() -> ctypes.CDLL:
    """The host code that plans launches, by itself."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/plan.so"
        command = [shutil.which("c++"), "-std=c++17", "-shared", "-fPIC", f"-I{CUDA}", "-x", "c++", "-", "-o", library]
        subprocess.run(command, input=SHIM, text=True, check=True)
        loaded = ctypes.CDLL(library)
    loaded.workspace.restype = ctypes.c_int64
    loaded.kind.argtypes = [ctypes.c_double]
    return loaded


@functools.cache
def kernels(arch: str) -> dict[str, Any]:
    import ptxsim

    found = {}
    for file in ("multi_tensor.cu", "agc.cu"):
        found |= ptxsim.cuda_kernels(str(CUDA / file), arch, ("-O3", "-std=c++17"))
    return found


def kernel(name: str, arch: str = "sm_90") -> Any:
    """By the start of its mangled name and template arguments."""
    (key,) = [key for key in kernels(arch) if re.search(rf"\d{name}", key)]
    return kernels(arch)[key]


@dataclass
class Run:
    """The outputs of a call, and the counters of its launches."""

    launches: list[Any] = field(default_factory=list)
    total: Tensor | None = None
    coefficient: Tensor | None = None
    nonfinite: Tensor | None = None
    norms: Tensor | None = None

    def read(self, *tensors: Tensor) -> int:
        """Distinct bytes of these tensors that the launches read."""
        return sum(self._of(t, "read") for t in tensors)

    def written(self, *tensors: Tensor) -> int:
        return sum(self._of(t, "written") for t in tensors)

    def _of(self, tensor: Tensor, what: str) -> int:
        name = str(tensor.untyped_storage().data_ptr())
        return sum(getattr(b, what) for c in self.launches for b in c.buffers if b.name == name)


class VirtualGPU:
    """Memory with the tensors that were given to it; options are those of ptxsim's launches."""

    def __init__(self, arch: str = "sm_90", **options: Any):
        import ptxsim

        self.arch, self.memory, self.tickets = arch, ptxsim.GlobalMemory(), torch.zeros(4096, dtype=torch.int32)
        self.options = {"races": "global", "uninit_shared": "error", "inactive_shuffle": "error", **options}

    def address(self, tensor: Tensor) -> int:
        return self.memory.add(tensor, str(tensor.untyped_storage().data_ptr())) if tensor.numel() else 0

    def _items(self, tensors: Sequence[Tensor]) -> tuple:
        count = len(tensors)
        return (
            count,
            (ctypes.c_uint64 * count)(*map(self.address, tensors)),
            (ctypes.c_int64 * count)(*(t.numel() for t in tensors)),
            (ctypes.c_int * count)(*(DTYPES[t.dtype] for t in tensors)),
        )

    def _launcher(self, run: Run, name: str) -> Callable:
        def launch(arguments: int, size: int, blocks: int) -> None:
            data = ctypes.string_at(arguments, size)
            found = kernel(name, self.arch)
            run.launches.append(found.launch(blocks, [data], block=BLOCK, memory=self.memory, **self.options))

        return _LAUNCH(launch)

    def norm(
        self, tensors: Sequence[Tensor], p: float = 2.0, max_norm: float = 1.0, policy: Policy | None = None
    ) -> Run:
        wide = any(t.dtype == torch.float64 for t in tensors)
        return self._norm(self._items(tensors), p, max_norm, torch.float64 if wide else torch.float32, policy)

    def policy(self, state: Tensor, rule: int, constants: Sequence[float]) -> Policy:
        return Policy(self.address(state), state.numel() - HEADER, (ctypes.c_double * 6)(*constants), rule)

    def _norm(self, items: tuple, p: float, max_norm: float, dtype: torch.dtype, policy: Policy | None = None) -> Run:
        few, wide = p == 2 and items[0] <= FEW, dtype == torch.float64
        nan = functools.partial(torch.full, fill_value=float("nan"), dtype=dtype)
        coefficients = items[0] if policy and policy.rule == ADAGC else 1
        run = Run([], nan((1,)), nan((coefficients,)), torch.full((1,), float("nan")), nan((items[0],)))
        workspace = torch.full((planner().workspace(*items),), float("nan"), dtype=torch.float64)
        kind = planner().kind(p)
        outputs = (workspace, self.tickets, run.norms, run.total, run.coefficient, run.nonfinite)
        request = NormRequest(p, max_norm, policy or Policy(), *map(self.address, outputs), kind, wide)
        kinds = f"ILi{kind if kind in (0, 1, 4) else 'n1'}ELb{int(policy is not None)}E"
        template = f"norm_kernel{kinds}Li{FEW if few else MANY}E"
        planner().norm(*items, few, ctypes.byref(request), self._launcher(run, template))
        assert not self.tickets.any(), "the kernels leave the tickets as they were"
        # what the last block reads, the tickets put in order; the virtual GPU knows no order of blocks
        races = [race for launch in run.launches for race in launch.races]
        assert all("ld.global.cg.f" in race for race in races), races
        return run

    def _change(self, name: str, items: tuple, request: ChangeRequest) -> Run:
        run, few = Run(), name == "Scale" and items[0] <= FEW
        template = rf"change_kernelI.*{name}ELi{FEW if few else MANY}E"
        planner().change(*items, few, request, self._launcher(run, template))
        assert not any(launch.races for launch in run.launches)
        return run

    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> Run:
        request = ChangeRequest(coefficient=self.address(coefficient), wide=coefficient.dtype == torch.float64,
                                per_tensor=coefficient.dim())  # fmt: skip
        return self._change("Scale", self._items(tensors), request)

    def clamp_(self, tensors: Sequence[Tensor], bound: float) -> Run:
        return self._change("Clamp", self._items(tensors), ChangeRequest(bound=bound))

    def agc_(self, grads, params, units, clip_factor=0.01, eps=1e-3, p=2.0) -> Run:
        run, count, kind = Run(), len(grads), planner().kind(p)
        request = AgcRequest(p, clip_factor, eps, kind)
        planner().agc(
            *self._items(grads), *self._items(params)[1::2], (ctypes.c_int64 * count)(*units),
            ctypes.byref(request), self._launcher(run, f"agc_kernelILi{0 if kind == 0 else 'n1'}E"),
        )  # fmt: skip
        return run

    def agc_long_(self, grads: Tensor, params: Tensor, units: int, clip_factor=0.01, eps=1e-3) -> Run:
        """Units that are long enough for the clip's own kernels to take them, each as a tensor."""
        arrays = (ctypes.c_uint64 * (2 * units))(), (ctypes.c_int64 * (2 * units))(), (ctypes.c_int * (2 * units))()
        count = planner().units(
            ctypes.c_int64(grads.numel()), ctypes.c_int64(units), DTYPES[grads.dtype], DTYPES[params.dtype],
            ctypes.c_uint64(self.address(grads)), ctypes.c_uint64(self.address(params)), *arrays,
        )  # fmt: skip
        assert count == 2 * units
        norms = self._norm((count, *arrays), 2.0, 1.0, torch.float64).norms
        request = ChangeRequest(norms=self.address(norms), clip_factor=clip_factor, eps=eps)
        return self._change("ClipUnits", (units, *arrays), request)


class Cuda:
    """The CUDA kernels with the functions of a backend."""

    def __init__(self, **options) -> None:
        pytest.importorskip("ptxsim", reason="the CUDA kernels run on a virtual GPU, which is not installed")
        self.gpu, self.run = VirtualGPU(**options), Run()

    def multi_tensor_norm(self, tensors, norm_type, max_norm):
        self.run = run = self.gpu.norm(tensors, norm_type, max_norm)
        return run.total[0], run.coefficient[0], run.nonfinite[0], run.norms

    def multi_tensor_policy(self, tensors, norm_type, state, rule, constants):
        self.run = run = self.gpu.norm(tensors, norm_type, 0.0, self.gpu.policy(state, rule, constants))
        return run.total[0], run.coefficient if rule == ADAGC else run.coefficient[0], run.nonfinite[0], run.norms

    def multi_tensor_scale_(self, tensors, coefficient):
        self.run = self.gpu.scale_(tensors, coefficient)

    def multi_tensor_clamp_(self, tensors, bound):
        self.run = self.gpu.clamp_(tensors, bound)

    def multi_tensor_agc_(self, grads, params, units, clip_factor, eps, norm_type):
        self.run = self.gpu.agc_(grads, params, units, clip_factor, eps, norm_type)


def exact_norms(tensors: Sequence[Tensor], p: float) -> tuple[Tensor, Tensor]:
    """The total norm and the tensors' norms, in float64; of an empty tensor, what is neutral among the others."""
    rest = tensors[0].new_tensor(0.0 if p >= 0 else math.inf, dtype=F64)
    norms = torch.stack([torch.linalg.vector_norm(t.double(), p) if t.numel() else rest for t in tensors])
    return torch.linalg.vector_norm(norms, p), norms


def assert_norms(kernels, tensors: Sequence[Tensor], p: float = 2.0, max_norm: float = 1.0) -> None:
    total, coefficient, nonfinite, norms = kernels.multi_tensor_norm(tensors, p, max_norm)
    dtype = F64 if any(t.dtype == F64 for t in tensors) else F32
    exact_total, exact = exact_norms(tensors, p)
    assert total.dtype == coefficient.dtype == norms.dtype == dtype and nonfinite.dtype == F32
    # of a float32 tensor in a float64 list, too, the sums begin in float32
    rounding = ROUNDING[F64 if all(t.dtype == F64 for t in tensors) else F32]
    close = functools.partial(torch.testing.assert_close, rtol=rounding, atol=0, equal_nan=True)
    close(norms.double(), exact)
    close(total.double(), exact_total)
    close(coefficient.double(), torch.clamp(max_norm / (total.double() + 1e-6), max=1.0))
    assert nonfinite.item() == float(not math.isfinite(total.item()))


def randn(count: int, dtype: torch.dtype, offset: int = 0, scale: float = 1.0) -> Tensor:
    """`offset` elements behind the start of its storage, which lies on a 64-byte boundary."""
    return (torch.randn(count + offset) * scale).to(dtype)[offset:]
