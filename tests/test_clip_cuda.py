"""What the clip's CUDA kernels move, in which launches, with which fences and registers.

They run on a virtual GPU, whose memory is sequentially consistent: it can't show what a missing fence would break. So
the fences are looked for in the code.
"""

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from fastnorm import backend, policy_rules
from helpers.clip_kernels import Cuda, assert_norms, kernel, randn

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parents[1]
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.mark.parametrize("count", (192, 193, 1601))
def test_lists_longer_than_a_launch(count):
    """Up to 192 tensors travel in 4 KB of arguments, up to 1,600 in 32 KB; what is longer takes a launch more. The
    total is formed once, by the last block of the last launch."""
    kernels = Cuda()
    storage = torch.randn(17 * count)
    tensors = list(storage.split(17))
    assert_norms(kernels, tensors)
    launches = math.ceil(count / 1600)
    assert len(kernels.run.launches) == launches
    expected = storage * torch.tensor(0.5)
    kernels.multi_tensor_scale_(tensors, torch.tensor(0.5))
    assert len(kernels.run.launches) == launches and torch.equal(storage, expected)


def test_traffic():
    """Not clipped 1 + 0 passes, clipped 2 + 1, and 16 bytes an access."""
    kernels = Cuda()
    tensors = [randn(40000, F32), randn(16384, BF16), randn(2048, F64), randn(4096, F16)]
    size = sum(t.nbytes for t in tensors)
    _, coefficient, _, _ = kernels.multi_tensor_norm(tensors, 2.0, 1e9)
    (norm,) = kernels.run.launches
    assert kernels.run.read(*tensors) == size and kernels.run.written(*tensors) == 0
    wide = [a for a in norm.accesses if a.kind == "global load" and re.search(r"\.v4\.\w32|\.v2\.\w64", a.text)]
    assert sum(a.bytes for a in wide) == size and norm.loads.bytes < 1.05 * size

    kernels.multi_tensor_scale_(tensors, coefficient)
    assert coefficient == 1 and kernels.run.read(*tensors) == kernels.run.written(*tensors) == 0
    kernels.multi_tensor_scale_(tensors, torch.tensor(0.5))
    (scale,) = kernels.run.launches
    assert kernels.run.read(*tensors) == kernels.run.written(*tensors) == scale.stores.bytes == size
    assert scale.stores.efficiency == 1 and norm.loads.efficiency > 0.98


def test_traffic_of_values_that_squares_would_lose():
    """They are squared again from registers, not from memory; zeros aren't even that."""
    for value in (1e30, 1e-30, 0.0):
        kernels = Cuda()
        x = torch.full((20000,), value)
        kernels.multi_tensor_norm([x], 2.0, 1.0)
        (norm,) = kernels.run.launches
        assert x.nbytes <= norm.loads.bytes < 1.05 * x.nbytes


def test_clamp_writes_what_it_changes():
    kernels = Cuda()
    x = torch.zeros(8192)
    x[4096:4100] = 2.0
    kernels.multi_tensor_clamp_([x], 1.0)
    assert kernels.run.read(x) == x.nbytes and kernels.run.written(x) == 16


def test_traffic_of_adaptive_clipping():
    """2 + 0 passes, and 1 for the units that are clipped: from chip, up to 32 KiB of a unit's gradient."""
    kernels = Cuda()
    for shape, held in (((64, 256), True), ((4, 8192), True), ((2, 12288), False)):
        grads, params = torch.randn(shape), torch.randn(shape)
        grads[shape[0] // 2 :] *= 1e-4
        kernels.multi_tensor_agc_([grads], [params], [shape[0]], 0.01, 1e-3, 2.0)
        (launch,) = kernels.run.launches
        assert kernels.run.read(grads) == kernels.run.read(params) == grads.nbytes
        assert kernels.run.written(grads) == grads.nbytes // 2
        rest = 0 if held else (shape[1] - 8192) * 4 * shape[0] // 2
        loads = sum(a.bytes for a in launch.accesses if a.kind == "global load")
        assert loads == 2 * grads.nbytes + rest
        assert not launch.races


@pytest.mark.parametrize("rule", (policy_rules.AUTOCLIP, policy_rules.ADAGC))
def test_a_policy_takes_no_launch_more(rule):
    """The last block of the last launch decides, once, whichever block that is."""
    tensors = list(torch.randn(17 * 1601).split(17))
    found = []
    for listed, order in ((tensors[:9], "reversed"), (tensors[:9], "shuffled"), (tensors, "sequential")):
        kernels = Cuda(order=order, blocks_at_once=2)
        state = torch.full((policy_rules.HEADER + len(listed),), math.inf, dtype=F64)
        state[: policy_rules.HEADER] = 0
        results = kernels.multi_tensor_policy(listed, 2.0, state, rule, (0.5, 1.0, 1.05, 0.98, 0.0))
        assert len(kernels.run.launches) == math.ceil(len(listed) / 1600)
        assert state[policy_rules.COUNT] == state[policy_rules.STEPS] == state[policy_rules.CLIPPED] == 1
        found.append((*results, state))
    assert all(map(torch.equal, found[0], found[1]))


@pytest.mark.parametrize("policy", (0, 1))
def test_fences(policy):
    """Every ticket is drawn behind a fence, and where it was the last one there is another before anything is read."""
    Cuda()
    text = kernel(f"norm_kernelILi0ELb{policy}ELi192E", "sm_90").module.text
    atomics = [m.start() for m in re.finditer(r"atom\.global\.inc", text)]
    fence = r"(?:membar\.gl|fence\.(?:acq_rel|sc)\.gpu)"
    assert atomics
    for place in atomics:
        assert re.search(rf"{fence};[^@]*$", text[:place]), "no fence before an atomic"
        after = text[place : text.index("ld.global.cg", place)]
        assert "bar.sync" in after and re.search(fence, after)


def cuda_resources(folder: Path) -> str:
    """What cuobjdump tells: of the extension if it has the kernels, of every architecture; otherwise of sm_90."""
    triton = pytest.importorskip("triton")
    native = backend._native
    if native is not None and native.build_info()["cuda"]:
        files = [native._C.__file__]
    else:
        Cuda()  # skips where there is no nvcc either
        files = [str(folder / f"{name}.cubin") for name in ("multi_tensor", "agc")]
        for file in files:
            source = ROOT / "csrc" / "cuda" / f"{Path(file).stem}.cu"
            subprocess.run(["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-cubin", source, "-o", file], check=True)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
    return "".join(subprocess.run([*command, f], check=True, capture_output=True, text=True).stdout for f in files)


def test_resources(tmp_path):
    """No spills, and registers for four blocks of 256 threads on a multiprocessor."""
    report = cuda_resources(tmp_path)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    kernels = [name for name, *_ in found if re.search(r"(norm|change|agc)_kernel", name)]
    assert len(kernels) >= 11
    for name, registers, stack, shared, local in found:
        assert int(stack) == int(local) == 0 and int(registers) <= 64 and int(shared) <= 48 * 1024, name
