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

from bench import cli, codegen, summary

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


@pytest.mark.skipif(release(metadata.version("triton")) < (3, 8), reason="older compilers find fewer registers")
def test_widths_of_models_that_would_spill_on_new_cards(kernel_cache):
    """Up to 16384 columns no plain norm spills on NVIDIA's cards, at even widths. These are the kernels that did."""
    calls = [
        ("sm_100", "add_layer_norm", "bf16", 16384),
        ("sm_100", "layer_norm", "mixed", 16384),
        ("sm_120", "add_layer_norm", "fp32", 8192),
    ]
    cells = [[[value] for value in call] for call in calls]
    done = run(kernel_cache, "-c", COMPILE, json.dumps(cells))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum("backward" in k["kernel"] for k in found) == len(cells)
    assert not {name(k): k["spilled"] for k in found if k["spilled"]}


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
    # Triton 3.5.1 takes 16 KiB for the moments of pixels
    most = 16384 if release(metadata.version("triton")) < (3, 6) else 8192
    assert not {name(k): k["shared"] for k in channel_kernels if k["shared"] > most}


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


FEATURES = "gated_rms_norm,gated_rms_norm_gate_first,modulated_layer_norm", "rms_norm_many,rms_norm_many_rotary"


@pytest.mark.parametrize("operations, cols", [*zip(FEATURES, (4096, 128), strict=True)], ids=["rows", "heads"])
def test_features_do_not_spill(kernel_cache, tmp_path, operations, cols):
    command = f"-m bench codegen --operations {operations} --targets sm_90 --widths {cols} --dtypes bf16"
    done = run(kernel_cache, *command.split(), "--providers", "fastnorm", "--jobs", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary.kernels_of(tmp_path / "codegen-custom.json")
    walking = [k for k in found if is_row_kernel(k)]
    assert {k["operation"] for k in walking} == set(operations.split(",")) and {k["cols"] for k in walking} == {cols}
    assert not any(k["spilled"] for k in found)


def test_the_command_prints_and_writes_what_it_found(kernel_cache, tmp_path):
    done = run(kernel_cache, "-m", "bench", "codegen", "--quick", "--jobs", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    kernels = summary.kernels_of(tmp_path / "codegen-quick.json")
    ours = [k for k in kernels if k["provider"] == "fastnorm"]
    assert {k["target"] for k in ours} == {"sm_90", "gfx942"}
    assert all(k["resident_warps"] >= 4 and not k["spilled"] for k in ours)
    assert {("rms_norm", "row_norm_forward"), ("layer_norm", "row_norm_backward"), ("clip_grad_norm_", "change")} <= {
        (k["operation"], k["kernel"]) for k in ours
    }
    assert all(f" {k['registers']} " in done.stdout for k in ours)
    text = (tmp_path / "codegen-quick.md").read_text(encoding="utf-8")
    assert "## gfx942" in text and "row_norm_backward" in text and codegen.LEGEND in text
    if importlib.util.find_spec("liger_kernel"):
        theirs = [k for k in kernels if k["provider"] == "liger" and k["target"] == "sm_90"]
        norms = {f"{norm}_{direction}" for norm in ("rms_norm", "layer_norm") for direction in ("forward", "backward")}
        assert {k["kernel"] for k in theirs} == norms
        assert all(k["cols"] == 4096 and k["registers"] > 8 for k in theirs)
    else:
        assert "liger, 8 calls: ModuleNotFoundError" in done.stdout


def test_a_kernel_of_ours_that_spills_fails_the_command_and_another_one_does_not(monkeypatch, tmp_path, capsys):
    example = {"warps": 4, "registers": 255, "shared": 0, "resident_warps": 8, "access": 16, "short_products": 0}
    example |= {"spilled": 8, "hash": ""}
    shape = {"target": "sm_90", "operation": "rms_norm", "kernel": "row_norm_forward", "dtype": "bf16", "cols": 64}
    monkeypatch.setattr(codegen.triton_kernels, "INTERPRETED", False)
    for provider, status in (("fastnorm", 1), ("liger", 0)):
        spilling = codegen.Kernel(**shape, **example, provider=provider)
        monkeypatch.setattr(codegen, "compile_all", lambda *_, spilling=spilling: iter([spilling]))
        assert cli.main(["codegen", "--targets", "sm_90", "--output", str(tmp_path)]) == status
        assert ("sm_90 rms_norm row_norm_forward bf16 64: spills 8 bytes" in capsys.readouterr().out) == bool(status)
