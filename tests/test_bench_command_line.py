"""What the bench's command line takes, and how it complains."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import arguments, cli, commands, monitor, presets
from bench.operations import FAMILIES, OPERATIONS

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_a_command_line_without_a_command_is_one_of_norms():
    for arguments_ in ([], ["rms_norm"], ["--quick"], ["norms", "rms_norm"]):
        assert cli.parse(arguments_).run is commands.norms
    assert cli.parse(["clip", "--quick"]).run is commands.clips
    assert cli.parse(["real-model", "--device", "cpu"]).device == CPU
    assert cli.parse(["monitor", "--quick"]).run is monitor.main


def test_missing_packages_are_named_with_the_remedy():
    code = "import runpy, sys; sys.modules.update(pandas=None, cpuinfo=None); runpy.run_module('bench')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "python -m bench needs py-cpuinfo, pandas: pip install -e '.[bench]'\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["group_hug"], "unknown operation 'group_hug'; known: row_norms, gated_norms, modulated_norms, rms_norm_man"),
        (["--dtypes", "fp32,int8"], "argument --dtypes: unknown dtype 'int8'; known: fp32"),
        (["--providers", "abacus"], "argument --providers: unknown provider 'abacus'; known: torch"),
        (["--mode", "backward"], "argument --mode: unknown mode 'backward'"),
        (["--shapes", "64by64"], "'64by64' is neither a shape, ROWSxCOLS, SAMPLESxROWSxCOLS, ROWSxCOLSxKVCOLS, NxC"),
        (["--shapes", "0x64"], "'0x64' is neither"),
        (["--shapes", "4x8x2x3x5x6"], "no operation takes all that is asked for"),
        (["batch_norm", "--shapes", "64x64"], "64x64 doesn't fit: batch_norm_training takes NxCxHxW"),
        (["rms_norm", "--shapes", "2x32x4x4"], "2x32x4x4 doesn't fit: rms_norm takes ROWSxCOLS"),
        (
            ["batch_norm", "--shapes", "1x64x1x1"],
            "1x64x1x1 doesn't fit: batch_norm_training trains on more than 1 value",
        ),
        (["group_norm", "--shapes", "2x100x8x8"], "group_norm_plain has 32 groups, which can't share 100 channels"),
        (["rms_norm_many", "--shapes", "1x2x4x1x7"], "rms_norm_many_rotary rotates pairs, and 7 columns are odd"),
        (["rms_norm", "--layouts", "channels_last"], "argument --layouts: rms_norm has only contiguous"),
        (["--repeats", "0"], "'0' is not above zero"),
        (["--min-time", "soon"], "'soon' is not a number"),
        (["--device", "toaster"], "'toaster' is no device of PyTorch's"),
        (["--device", "meta"], "only cpu and cuda can be timed"),
    ],
)
def test_bad_arguments_are_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_folders_that_cant_be_made_are_named_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "file").touch()
    for option, path in (("--output", tmp_path / "file"), ("--json", tmp_path / "file" / "results.json")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["rms_norm", option, str(path)])
        assert stopped.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


def test_presets_are_shapes_and_combine():
    assert arguments.shapes("quick,3x5,quick") == (*presets.SHAPES["quick"], (3, 5))
    assert all(length > 0 for shapes in presets.SHAPES.values() for shape in shapes for length in shape)
    assert {rows for rows, _ in presets.SHAPES["grid"]} >= {8, 8192}
    assert {cols for _, cols in presets.SHAPES["grid"]} >= {64, 16384}
    for operation in OPERATIONS.values():
        presets_of_it = (operation.family.probe, *presets.SHAPES[operation.family.preset])
        assert all(
            operation.misfit(shape) is None for shape in (*presets_of_it, *presets.SHAPES[operation.family.quick])
        )


def chosen(*arguments):
    return commands._problems(cli.parse(list(arguments)))


def test_operations_by_default_are_those_that_take_the_shapes():
    assert chosen().keys() == OPERATIONS.keys()
    assert chosen("--shapes", "2x100x8x8").keys() == set(FAMILIES["batch_norm"])
    assert chosen("--shapes", "qk").keys() == {*FAMILIES["row_norms"], *FAMILIES["gated_norms"]}
    assert chosen("group_norm", "rms_norm")["rms_norm"] == presets.SHAPES["models"]
    assert chosen("group_norm_silu", "--quick") == {"group_norm_silu": presets.SHAPES["unet-quick"]}
    quick = chosen("--quick")
    assert set(FAMILIES["row_norms"]) < quick.keys() < OPERATIONS.keys()
