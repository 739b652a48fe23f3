"""What the compilers make of the Triton kernels, read off the machine code; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
# LayerNorm's backward keeps two parameter sums. Of the widest rows they fill half of the registers, and ptxas keeps a
# few addresses in memory, which are read once for each row. Bytes a thread.
WIDEST = {7168, 12288, 16384}
ADDRESSES = 32
# LLVM's scheduler for AMD: the same kernel by the columns at which it hoists too many loads
HOISTED = {("gfx1100", 1280): 208, ("gfx942", 4096): 8}


def compiled(factory: pytest.TempPathFactory, name: str, *options: str) -> list[dict]:
    """Compiles in a process of its own: in this one Triton's decorators may have made interpreted functions. Of several
    workers of one test run, one compiles and the others wait for what it found."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = factory.getbasetemp().parent / name if is_worker else factory.mktemp(name)
    folder.mkdir(exist_ok=True)
    path = folder / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "bench.codegen", "--jobs", "2", "--json", str(path), *options]
    with FileLock(folder / "lock"):
        if not path.exists():
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert path.exists(), done.stderr
        return json.loads(path.read_text())


WIDTHS = "96,128,768,1024,1280,1536,2048,2560,3072,4096,5120,6144,7168,8192,12288,16384,32768,65536"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    """Every model width on every architecture; what takes most registers, by dtypes, residuals and odd widths, on the
    two whose compilers are most wasteful. `python -m bench.codegen` compiles all there is, which takes half an hour."""
    plain = ["--operations", "rms_norm,layer_norm", "--dtypes", "bf16", "--widths", WIDTHS]
    every = "rms_norm,layer_norm,add_rms_norm,add_layer_norm"
    widths = ["--widths", "1793,3585,4096,7168,16384"]
    greedy = ["--operations", every, "--targets", "sm_100,gfx1100", "--dtypes", "fp32,mixed", *widths]
    return compiled(tmp_path_factory, "plain", *plain) + compiled(tmp_path_factory, "greedy", *greedy)


def name(kernel: dict) -> str:
    return " ".join(str(kernel[key]) for key in ("target", "kernel", "dtype", "cols"))


def test_every_architecture_and_kernel_is_there(kernels):
    assert {k["target"] for k in kernels} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"}
    norms = {f"{norm}_{kind}" for norm in ("rms_norm", "layer_norm") for kind in (
        "forward", "long_forward", "backward", "long_backward_rows", "long_backward_columns")}  # fmt: skip
    assert norms <= {k["kernel"].strip("_").removesuffix("_kernel") for k in kernels}


def test_no_spills_but_the_known_ones(kernels):
    assert not {name(k): k["spilled"] for k in kernels if k["spilled"] > known_spill(k)}


def known_spill(kernel: dict) -> int:
    if kernel["kernel"] != "layer_norm_backward":
        return 0
    is_wide = kernel["cols"] in WIDEST and kernel["target"].startswith("sm_")
    return ADDRESSES if is_wide else HOISTED.get((kernel["target"], kernel["cols"]), 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])
def test_a_kernel_that_spills_is_seen_to(target, tmp_path):
    """A held row with far too few threads: the guards above must be able to fail."""
    source = (
        "from bench import codegen; from fastnorm.triton_kernels import launch; import dataclasses, json;"
        "launch.row_tiles = lambda cols, *_, **__: launch.RowTiles(256, cols // 256, 1, 1, 1);"
        f"kernels = codegen.compile_problem(codegen.Problem({target!r}, 'layer_norm', 'forward', 'fp32', 16384));"
        "print(max(kernel.spilled for kernel in kernels))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert int(done.stdout) > 0, done.stderr


def test_shared_memory(kernels):
    """Beyond 48 KiB a kernel would need a card's permission, and fewer programs would fit."""
    assert not {name(k): k["shared"] for k in kernels if k["shared"] > 48 * 1024}


def test_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    """Where the width allows it. Beside a float32 stream, 8 bytes of bfloat16 go with 16 of the stream."""
    rows = [k for k in kernels if is_row_kernel(k) and not (k["cols"] and k["cols"] % 8)]
    assert not {name(k): k["access"] for k in rows if k["access"] < (8 if k["dtype"] == "mixed" else 16)}


def test_addresses_of_rows_have_64_bits(kernels):
    assert not {name(k) for k in kernels if k["short_products"] and k["target"] == "sm_90" and is_row_kernel(k)}


def is_row_kernel(kernel: dict) -> bool:
    return "column_sum" not in kernel["kernel"]


CHANNEL_KERNELS = {f"{layout}_{kind}" for layout in ("planes", "pixels") for kind in (
    "moments", "normalize", "sums", "gradient")} | {"join_moments", "group_means"}  # fmt: skip


@pytest.fixture(scope="module")
def channel_kernels(tmp_path_factory) -> list[dict]:
    """batch_norm and group_norm at ResNet-50's and a UNet's images, in both layouts, on every architecture."""
    options = ["--operations", "batch_norm,group_norm", "--dtypes", "bf16"]
    return compiled(tmp_path_factory, "channels", *options)


def test_channel_kernels_do_not_spill(channel_kernels):
    assert not {name(k): k["spilled"] for k in channel_kernels if k["spilled"]}
    for target in {k["target"] for k in channel_kernels}:
        assert {k["kernel"] for k in channel_kernels if k["target"] == target} >= CHANNEL_KERNELS
    assert len({k["target"] for k in channel_kernels}) == 6


def test_channel_kernels_leave_room_for_several_programs(channel_kernels):
    """Memory is waited for by warps that take turns."""
    walking = [k for k in channel_kernels if k["kernel"] in CHANNEL_KERNELS and k["target"].startswith("sm_")]
    assert not {name(k): k["resident_warps"] for k in walking if k["resident_warps"] < 8}
    assert not {name(k): k["shared"] for k in channel_kernels if k["shared"] > 8192}


def test_aligned_images_are_read_and_written_16_bytes_at_a_time(channel_kernels):
    """Rows of a multiple of 8 elements: each kernel has such a variant, and channels_last has no other one."""
    streaming = [k for k in channel_kernels if k["kernel"].endswith(("normalize", "sums", "gradient"))]
    for target in {k["target"] for k in streaming}:
        here = [k for k in streaming if k["target"] == target]
        assert {k["access"] for k in here if k["kernel"].startswith("pixels")} == {16}
        for kernel in ("planes_normalize", "planes_sums", "planes_gradient"):
            assert 16 in {k["access"] for k in here if k["kernel"] == kernel}
