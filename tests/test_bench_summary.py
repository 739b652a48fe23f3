"""The documents' tables are those of the files that the benchmark wrote."""

import json
import shutil

import pytest

pytest.importorskip("pandas")

from bench import summary
from bench.cli import main


def result(shape: str, mode: str, speedup: float, provider: str = "fastnorm", **more) -> dict:
    case = {"operation": "rms_norm", "shape": shape, "layout": "contiguous", "dtype": "fp32", "mode": mode}
    times = {"median_s": 0.002, "speedup_vs_torch": speedup, "speedup_vs_compile": None}
    return {**case, **times, "provider": provider, **more}


@pytest.fixture
def results(tmp_path, monkeypatch):
    cases = [
        *(result("8x64", "forward", 1.5), result("8x64", "forward", 9.0, "torch")),
        *(result("64x64", "forward", 0.97), result("64x256", "forward", 3.0), result("8x64", "forward_backward", 2.0)),
        result("2x8x4x4", "forward_backward", 0.981, layout="channels_last"),
    ]
    (tmp_path / "some.json").write_text(json.dumps({"results": cases}))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    return tmp_path


def filled(results, kind: str, more: str = "") -> list[list[str]]:
    """The cells of a table's rows, in a document that had another one."""
    document = results / "document.md"
    document.write_text(f"above\n<!-- {kind} some.json{more} -->\n| old |\n<!-- end -->\nbelow\n")
    assert main(["summary", str(document)]) == 0
    first, marker, *table, end, last = document.read_text().splitlines()
    assert (first, end, last) == ("above", "<!-- end -->", "below") and kind in marker
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_cells(results):
    rows = filled(results, "cells")
    assert len(rows) == 5, "those of the other providers are left out"
    assert rows[0] == ["`rms_norm`", "forward", "8 × 64", "fp32", "2", "1.50×", ""]
    assert rows[1][5] == "0.97× ▼" and rows[4][2:6] == ["2 × 8 × 4 × 4, channels_last", "fp32", "2", "0.98×"]


def test_operations(results):
    rows = filled(results, "operations")
    assert rows[0] == ["`rms_norm`", "8 × 64", "1.50×", "2.00×"]
    assert rows[1] == ["`rms_norm`", "64 × 64", "0.97× ▼", ""]


def test_spread(results):
    forward, both = filled(results, "spread")
    assert forward[3:] == ["0.97×", "1.50×", "3.00×", "1 of 3 ▼ (64 × 64: 0.970)"]
    assert both[3:] == ["0.98×", "1.49×", "2.00×", "0 of 2"]


@pytest.mark.parametrize("document", summary.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_up_to_date(document, tmp_path):
    copy = shutil.copy(document, tmp_path)
    assert summary.BLOCK.search(document.read_text(encoding="utf-8")), "no table is filled in"
    assert not summary.fill(tmp_path / document.name), f"python -m bench summary changes {document.name}: {copy}"


def test_kernels(results):
    """Of what the line names: those that walk over rows. Accesses are named where they are narrow."""
    fields = ("provider", "target", "operation", "kernel", "dtype", "cols", "registers", "access", "spilled")
    kernels = [
        ("fastnorm", "sm_90", "rms_norm", "row_norm_forward", "bf16", 4096, 32, 16, 0),
        ("liger", "sm_90", "rms_norm", "rms_norm_forward", "bf16", 4096, 255, 8, 16),
        ("fastnorm", "gfx942", "rms_norm", "row_norm_forward", "bf16", 4096, 40, 16, 0),
        ("fastnorm", "sm_90", "rms_norm", "row_norm_forward", "bf16", 1024, 24, 16, 0),
        ("fastnorm", "sm_90", "rms_norm", "row_norm_forward", "fp32", 4096, 48, 16, 0),
        ("fastnorm", "sm_90", "layer_norm", "row_norm_forward", "bf16", 4096, 34, 16, 0),
        ("fastnorm", "sm_90", "add_rms_norm", "row_norm_backward", "bf16", 4096, 64, 8, 0),
        ("fastnorm", "sm_90", "add_rms_norm", "column_sum", "bf16", None, 20, 16, 0),
    ]
    (results / "some.json").write_text(json.dumps({"fields": fields, "kernels": kernels}))
    first, second = filled(results, "kernels", " rms_norm,add_rms_norm bf16 4096,any")
    assert first == ["`rms_norm`", "forward", "bf16", "4096", "32 / 255, 8 B (spills 16)", "40 / –"]
    assert second == ["`add_rms_norm`", "backward", "bf16", "4096", "64, 8 B / –", "– / –"]


def test_models(results):
    more = {"norms": 20, "mode": "inference", "dtype": "fp32", "original_s": 0.2, "share": 0.125}
    models = [
        {"model": "small", "speedup": [0.9, 0.95, 1.1], "agrees": True, **more},
        {"model": "large", "speedup": [None, 1.07, None], "agrees": False, **more},
    ]
    (results / "some.json").write_text(json.dumps({"results": models}))
    assert filled(results, "models") == [
        ["small, 20 norms", "inference", "fp32", "200 ms", "0.95x ▼ (0.90 to 1.10)", "12%"],
        ["large, 20 norms", "inference", "fp32", "200 ms", "1.07x WRONG", "12%"],
    ]
