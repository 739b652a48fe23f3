"""What the compilers make of the Triton kernels, read off the machine code; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
# Known spills, in bytes a thread. LayerNorm's backward keeps two parameter sums: at these widths a few of the 255
# registers are missing, and what is spilled stays in the first-level cache, where reading the rows again would not.
TIGHT_WIDTHS = {2560, 5120, 7168, 12288, 16384}
SPILLS = {"nvidia": 128, "gfx942": 128, "gfx1100": 700}
A_REGISTER_PAIR = 8  # ptxas trades one against a further program on the multiprocessor in some float32 forwards


def compiled(folder: Path, *options: str) -> list[dict]:
    """Compiles in a process of its own: in this one Triton's decorators may have made interpreted functions."""
    path = folder / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "bench.codegen", "--jobs", "2", "--json", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    """Every model width on one architecture, and on the others the widths that need most registers."""
    folder = tmp_path_factory.mktemp("codegen")
    here = compiled(folder, "--targets", "sm_90", "--dtypes", "bf16", "--widths", "96,128,768,1024,1280,1536,2048,2560,"
                    "3072,4096,5120,6144,7168,8192,12288,16384,32768,65536")  # fmt: skip
    others = "sm_80,sm_100,sm_120,gfx942,gfx1100"
    widths = ["--operations", "rms_norm,layer_norm", "--widths", "4096,16384"]
    there = compiled(folder, "--targets", others, "--dtypes", "bf16,fp32", *widths)
    return here + there


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
    if "layer_norm_backward" in kernel["kernel"] and kernel["cols"] in TIGHT_WIDTHS:
        return SPILLS.get(kernel["target"], SPILLS["nvidia"])
    if "rms_norm_backward" in kernel["kernel"] and kernel["cols"] == 16384 and kernel["dtype"] == "fp32":
        return 3 * A_REGISTER_PAIR
    return A_REGISTER_PAIR if "norm_forward" in kernel["kernel"] else 0


def test_shared_memory(kernels):
    """Beyond 48 KiB a kernel would need a card's permission, and fewer programs would fit."""
    assert not {name(k): k["shared"] for k in kernels if k["shared"] > 48 * 1024}


def test_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    widest = {"gfx942": 8}  # its warps have 64 threads, and the tiles are cut for 32
    rows = [k for k in kernels if is_row_kernel(k)]
    assert not {name(k): k["access"] for k in rows if k["access"] < widest.get(k["target"], 16)}


def test_addresses_of_rows_have_64_bits(kernels):
    assert not {name(k) for k in kernels if k["short_products"] and k["target"] == "sm_90" and is_row_kernel(k)}


def is_row_kernel(kernel: dict) -> bool:
    return "column_sum" not in kernel["kernel"]
