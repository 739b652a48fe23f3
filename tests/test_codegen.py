"""What the compilers make of the Triton kernels, read off the machine code; no GPU is needed.

`make test` compiles for sm_90, and what needs most registers of the row norms for gfx1100, gfx942 and sm_80;
`make test-codegen` takes more widths, and everything on six architectures.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.collection import shared_folder
from helpers.environment import release

pytest.importorskip("triton")

from bench import cli, codegen, control_flow, summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get("FASTNORM_TEST_CODEGEN") == "all"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100") if ALL else ("sm_90",)
WIDTHS = (128, 1024, 4096, 7168, 16384, 32768, 65536)
GREEDY = ("sm_80",), ("layer_norm", "add_layer_norm"), ("fp32",), (1793, 7168, 16384)
if ALL:
    WIDTHS = (96, 128, 1024, 1280, 1536, 2560, 4096, 5120, 6144, 7168, 8192, 12288, 16384, 32768, 65536)
    dtypes, widths = ("fp32", "mixed"), (64, 1793, 4096, 7168, 12288, 16384)
    GREEDY = ("sm_80", "sm_120", "gfx1100"), ("layer_norm", "add_layer_norm"), dtypes, widths
ROW_NORMS, CHANNEL_NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"), ("batch_norm", "group_norm")
CLIPS = ("clip_grad_norm_", "clip_grad_value_", "adaptive_clip_grad_")
# targets, operations, dtypes and widths of what is compiled
CELLS = [
    # the least and the most that a row norm does, at every number of tiles and rows of a program
    (TARGETS, ("rms_norm", "add_layer_norm"), ("bf16",), WIDTHS),
    GREEDY,  # what takes most registers, in other dtypes and at an odd width
    (("gfx1100",), ("rms_norm", "add_layer_norm"), ("bf16",), (7168, 32768)),
    (("gfx942",), ("add_rms_norm",), ("bf16",), (24576,)),  # fits in registers there, and on no NVIDIA card
    (TARGETS, CHANNEL_NORMS, ("bf16",), ()),  # at ResNet-50's and a UNet's images, in both layouts
    (TARGETS, CLIPS, ("bf16", "fp32"), ()),  # for every kind of norm
]
COMPILE = """
import json, sys
from dataclasses import asdict
from bench import compiled, problem
problems = [p for cells in json.loads(sys.argv[1]) for p in problem.problems_of(*cells)]
print(json.dumps([asdict(kernel) for kernel in compiled.compile_all(dict.fromkeys(problems), jobs=2)]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, kernel_cache) -> list[dict]:
    """The kernels of all cells; `python -m bench codegen` compiles all there is, which takes over half an hour. In a
    process of its own: in this one Triton's decorators may have made interpreted functions. Of several workers of one
    test run, one compiles and the others wait for what it found."""
    folder = shared_folder(tmp_path_factory)
    path = folder / "codegen.json"
    with FileLock(folder / "codegen.lock"):
        if not path.exists():
            done = run(kernel_cache, "-c", COMPILE, json.dumps(CELLS))
            assert done.returncode == 0, done.stderr
            path.write_text(done.stdout)
    return json.loads(path.read_text())


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python, which compiles into the folder `cache`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kernels(compiled) -> list[dict]:
    return [kernel for kernel in compiled if kernel["operation"] in ROW_NORMS]


@pytest.fixture(scope="module")
def channel_kernels(compiled) -> list[dict]:
    return [kernel for kernel in compiled if kernel["operation"] in CHANNEL_NORMS]


@pytest.fixture(scope="module")
def clip_kernels(compiled) -> list[dict]:
    return [kernel for kernel in compiled if kernel["operation"] in CLIPS]


def name(kernel: dict) -> str:
    return " ".join(str(kernel[key]) for key in ("target", "operation", "kernel", "dtype", "cols"))


def test_every_architecture_and_kernel_is_there(kernels):
    assert {k["target"] for k in kernels} == {*TARGETS, "sm_80", "gfx1100", "gfx942"}
    kinds = "forward", "long_forward", "backward", "long_backward"
    for operations in (("rms_norm", "add_rms_norm"), ("layer_norm", "add_layer_norm")):
        assert {f"row_norm_{kind}" for kind in kinds} <= {k["kernel"] for k in kernels if k["operation"] in operations}


def test_loops_that_are_unrolled_have_plain_bounds():
    """Before 3.6, Triton makes a tensor of min() of constants, and refuses it."""
    folder = ROOT / "triton_kernels"
    calls = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.static_range"]  # fmt: skip
    inner = {ast.unparse(call.func) for node in calls for bound in node.args for call in ast.walk(bound)
             if isinstance(call, ast.Call)}  # fmt: skip
    assert calls and inner <= {"len", "tl.constexpr"}


# bytes of a thread, which docs/verification.md tells of; of rows that are read twice the most at any width
KNOWN_SPILLS = {
    "sm_100 add_layer_norm row_norm_long_backward bf16 None": 16,
    "sm_120 add_layer_norm row_norm_long_backward bf16 None": 8,
    "gfx1100 layer_norm row_norm_backward mixed 1793": 108,
}


def test_row_kernels_do_not_spill(kernels):
    spilled: dict[str, int] = {}
    for kernel in kernels:
        if kernel["spilled"]:
            spilled[name(kernel)] = max(kernel["spilled"], spilled.get(name(kernel), 0))
    known, triton = dict(KNOWN_SPILLS), release(metadata.version("triton"))
    if triton < (3, 7):  # older compilers find no registers for these
        known["sm_90 rms_norm row_norm_backward bf16 16384"] = 16
    if triton < (3, 6):
        known["gfx1100 rms_norm row_norm_backward bf16 7168"] = 24
    for of_kernel, most in known.items():
        assert spilled.pop(of_kernel, 0) <= most
    assert not spilled


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"] if ALL else ["sm_90"])
def test_a_kernel_that_spills_is_seen_to(target, kernel_cache):
    """A row in registers of too few threads, 256 elements each: the guards above must be able to fail."""
    source = (
        "from bench import compiled, problem; from fastnorm.triton_kernels import row_launch;"
        "row_launch.row_tiles = lambda cols, *_, **__: row_launch.RowTiles(256, cols // 256, 1, 1, 1);"
        f"kernels = compiled.compile_problem(problem.Problem({target!r}, 'layer_norm', 'forward', 'fp32', 8192));"
        "print(max(kernel.spilled for kernel in kernels))"
    )
    done = run(kernel_cache, "-c", source)
    assert int(done.stdout) > 0, done.stderr


def test_shared_memory(kernels):
    """Beyond 48 KiB a kernel would need a card's permission, and fewer programs would fit."""
    assert not {name(k): k["shared"] for k in kernels if k["shared"] > 48 * 1024}


def test_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    """Where the width allows it. Beside a float32 stream, 8 bytes of bfloat16 go with 16 of the stream; and with 8
    bytes of each tile the backward's threads hold these widths, with few of them idle."""
    rows = [k for k in kernels if is_row_kernel(k) and not (k["cols"] and k["cols"] % 8)]
    narrow = {name(k): k["access"] for k in rows if k["access"] < (8 if k["dtype"] == "mixed" else 16)}
    widths = "1280", "2560", "5120", "7168", "12288"
    halved = {n: access for n, access in narrow.items() if "_backward bf16" in n and n.endswith(widths)}
    assert narrow == halved and set(halved.values()) == {8}


def test_addresses_of_rows_have_64_bits(kernels):
    assert not {name(k) for k in kernels if k["short_products"] and k["target"] == "sm_90" and is_row_kernel(k)}


def is_row_kernel(kernel: dict) -> bool:
    return "column_sum" not in kernel["kernel"]


CHANNEL_KERNELS = {f"{layout}_{kind}" for layout in ("planes", "pixels") for kind in (
    "moments", "normalize", "sums", "gradient")} | {"join_moments", "group_means"}  # fmt: skip


def test_channel_kernels_do_not_spill(channel_kernels):
    assert not {name(k): k["spilled"] for k in channel_kernels if k["spilled"]}
    for target in {k["target"] for k in channel_kernels}:
        assert {k["kernel"] for k in channel_kernels if k["target"] == target} >= CHANNEL_KERNELS
    assert {k["target"] for k in channel_kernels} == {*TARGETS}


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


def test_clip_kernels_do_not_spill(clip_kernels):
    assert {k["target"] for k in clip_kernels} == {*TARGETS}
    norms = ("norm", "fold_tensor", "total", "policy", "kept_units", "looped_unit")
    kinds = ("", "_magnitudes", "_maximum", "_powers")
    assert {k["kernel"] for k in clip_kernels} == {"change"} | {f"{norm}{kind}" for norm in norms for kind in kinds}
    assert not {name(k): k["spilled"] for k in clip_kernels if k["spilled"]}
    assert not {name(k): k["shared"] for k in clip_kernels if k["shared"] > 48 * 1024}


def test_clip_kernels_read_and_write_16_bytes_at_a_time(clip_kernels):
    streaming = [k for k in clip_kernels if not k["kernel"].startswith(("fold_tensor", "total", "policy"))]
    assert not {name(k): k["access"] for k in streaming if k["access"] < 16}


NVIDIA = """
kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0030*/               @P1 BRA `(.L_x_4) ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   STG.E.128 desc[UR4][R6.64], R8 ;
.L_x_3:
        /*0060*/                   LDG.E.U16 R9, desc[UR4][R2.64+0x20] ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
        /*0080*/              @!P3 BRA `(.L_x_1) ;
        /*0090*/                   BRA `(.L_x_9) ;
.L_x_4:
        /*00a0*/                   IMAD R1, R1, R1, RZ ;
        /*00b0*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*00c0*/                   STG.E.64 desc[UR4][R6.64], R8 ;
        /*00d0*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*00e0*/                   EXIT ;
.L_x_10:
        /*00f0*/                   BRA `(.L_x_10);
        /*0100*/                   NOP;
"""
AMD = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\ts_waitcnt lgkmcnt(0)
.LBB0_1:                                ; =>This Loop Header: Depth=1
\t.loc\t1 2 0
\tglobal_load_dwordx4 v[4:7], v0, s[0:1]
\ts_cbranch_vccnz .LBB0_3
; %bb.2:
\tglobal_store_b64 v0, v[4:5], s[2:3]
\ts_nop 0
.LBB0_3:
\ts_cbranch_scc1 .LBB0_1
; %bb.4:
\ts_endpgm
"""


# What a feature adds to a norm, in instructions an element: moving and converting its tensors, and arithmetic.
FEATURES = {
    ("gated_rms_norm", "forward"): ("rms_norm", 1.6 + 7),  # SiLU is five, its product with the norm two
    ("gated_rms_norm_gate_first", "forward"): ("rms_norm", 1.6 + 7),
    ("gated_rms_norm", "backward"): ("rms_norm", 2.3 + 14),  # SiLU and its slope, and the gate's gradient
    ("gated_rms_norm_gate_first", "backward"): ("rms_norm", 2.3 + 14),
    ("modulated_layer_norm", "forward"): ("add_layer_norm", 1.6 + 1),  # x's gate, and 1 + scale
    ("modulated_layer_norm", "backward"): ("add_layer_norm", 3.1 + 4),  # x is read, dresidual written; a third sum
}
ROTATIONS = {  # cos and sin are loaded and widened, and there are two products more
    ("rms_norm_many_rotary", "forward"): ("rms_norm_many", 1.6 + 2),
    ("rms_norm_many_rotary", "backward"): ("rms_norm_many", 1.6 + 2),
}


@pytest.mark.parametrize("features, cols", [(FEATURES, 4096), (ROTATIONS, 128)], ids=["rows", "heads"])
def test_features_cost_what_they_add(kernel_cache, tmp_path, features, cols):
    """Within 20 %, and none spills."""
    operations = ",".join(dict.fromkeys(name for (name, _), (plain, _) in features.items() for name in (plain, name)))
    command = f"-m bench codegen --operations {operations} --targets sm_90 --widths {cols} --dtypes bf16"
    done = run(kernel_cache, *command.split(), "--providers", "fastnorm", "--jobs", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = [k for k in summary.kernels_of(tmp_path / "codegen-custom.json") if k["instructions"] is not None]
    count = {(k["operation"], k["kernel"].rpartition("_")[2]): k["instructions"] for k in found}
    assert {k["cols"] for k in found} == {cols} and not any(k["spilled"] for k in found)
    for (operation, direction), (plain, added) in features.items():
        assert count[operation, direction] <= 1.2 * (count[plain, direction] + added), (operation, direction)


def test_instructions_are_those_of_a_turn_and_of_the_way_that_moves_most():
    """Of NVIDIA's: 4 in the loop before the inner one, not those of the other way, which moves half; 2 in the inner
    one for each of its turns; and the jump back. Neither what is around the loop nor the trap behind the end counts."""
    code = control_flow.parse(NVIDIA)
    assert code.steps(1) == [(32 + 2, 4 + 2 + 1)]
    assert code.steps(1, inner_bytes=20) == [(32 + 20, 4 + 20 + 1)]
    assert code.steps(0) == [(32 + 2, 2 + 7 + 2)]
    assert control_flow.parse(AMD).steps(1) == [(16 + 8, 4)]
    assert control_flow.parse(AMD).steps(1, least_bytes=16) == [(16, 3)]
    assert control_flow.parse(AMD).steps(2) == [(16 + 8, 4)]
    with pytest.raises(ValueError, match="no machine code"):
        control_flow.parse("nothing")


# of bf16, through the way that is counted: rows in and out, the weights (in the backward for each row), and a little
# for tables and statistics
MOVED = {
    ("rms_norm", "row_norm_forward"): 6, ("rms_norm", "row_norm_backward"): 8, ("layer_norm", "row_norm_forward"): 8,
    ("layer_norm", "row_norm_backward"): 8, ("clip_grad_norm_", "norm"): 2, ("clip_grad_norm_", "change"): 4,
}  # fmt: skip


def test_the_command_prints_and_writes_what_it_counted(kernel_cache, tmp_path):
    done = run(kernel_cache, "-m", "bench", "codegen", "--quick", "--jobs", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    kernels = summary.kernels_of(tmp_path / "codegen-quick.json")
    ours = [k for k in kernels if k["provider"] == "fastnorm"]
    assert {k["target"] for k in ours} == {"sm_90", "gfx942"}
    assert all(k["resident_warps"] >= 4 and not k["spilled"] for k in ours)
    for kernel, moved in MOVED.items():
        for found in (k for k in ours if (k["operation"], k["kernel"]) == kernel):
            # twice that much would be two turns of a loop taken for one, or both ways of a branch
            assert moved <= found["bytes"] <= 1.1 * moved + 0.1, found
            assert 2 <= found["instructions"] <= 24, found
            assert f"{found['instructions']:.1f}" in done.stdout
    finishing = ("column_sum", "fold_tensor", "total", "policy")
    assert all(k["instructions"] is None for k in ours if k["kernel"] in finishing)
    text = (tmp_path / "codegen-quick.md").read_text(encoding="utf-8")
    assert "## gfx942" in text and "row_norm_backward" in text and codegen.LEGEND in text
    if importlib.util.find_spec("liger_kernel"):
        theirs = [k for k in kernels if k["provider"] == "liger" and k["target"] == "sm_90"]
        norms = {f"{norm}_{direction}" for norm in ("rms_norm", "layer_norm") for direction in ("forward", "backward")}
        assert {k["kernel"] for k in theirs} == norms
        assert all(k["cols"] == 4096 and k["bytes"] > 5 and k["instructions"] > 8 for k in theirs)
    else:
        assert "liger, 8 calls: ModuleNotFoundError" in done.stdout


def test_a_kernel_of_ours_that_spills_fails_the_command_and_another_one_does_not(monkeypatch, tmp_path, capsys):
    example = {"warps": 4, "registers": 255, "shared": 0, "resident_warps": 8, "access": 16, "short_products": 0}
    example |= {"spilled": 8, "instructions": 9.5, "bytes": 6.0, "hash": ""}
    shape = {"target": "sm_90", "operation": "rms_norm", "kernel": "row_norm_forward", "dtype": "bf16", "cols": 64}
    monkeypatch.setattr(codegen.triton_kernels, "INTERPRETED", False)
    for provider, status in (("fastnorm", 1), ("liger", 0)):
        spilling = codegen.Kernel(**shape, **example, provider=provider)
        monkeypatch.setattr(codegen, "compile_all", lambda *_, spilling=spilling: iter([spilling]))
        assert cli.main(["codegen", "--targets", "sm_90", "--output", str(tmp_path)]) == status
        assert ("sm_90 rms_norm row_norm_forward bf16 64: spills 8 bytes" in capsys.readouterr().out) == bool(status)
