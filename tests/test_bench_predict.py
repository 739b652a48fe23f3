"""`python -m bench predict`, with a timing model that answers at once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import predict as predictions
from bench import summary

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "__init__.py": "",
    "problem.py": """
from collections import namedtuple
shape = "rows cols image layout residual activation provider"
Problem = namedtuple("Problem", "target operation direction dtype " + shape, defaults=(None,) * 7)
""",
    "__main__.py": """
from types import SimpleNamespace as Space

def machine_of(target, latency):
    return Space(latency=latency, bandwidth=4e12)

def predict_problem(problem, machine):
    n, c, h, w = problem.image or (1, problem.rows, problem.cols, 1)
    assert (32 << 20) - c * h * w < n * c * h * w <= 32 << 20
    assert problem.activation == {"batch_norm": "relu", "group_norm": "silu"}.get(problem.operation)
    bound, latency = "latency" if problem.direction == "backward" else "dram", machine.latency
    if problem.provider == "liger":
        latency *= 0.96 if problem.direction == "backward" else 0.98
    return Space(us=100.04 * latency, share=0.914 / latency, bound=bound, kernels=[Space(spilled=0), Space(spilled=8)])
""",
}


CELL = ("--operations", "rms_norm", "--targets", "sm_90", "--dtypes", "bf16")


def predict(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", "predict", "--output", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "gputime").mkdir()
    for name, text in MODEL.items():
        (tmp_path / "gputime" / name).write_text(text)
    return tmp_path


def test_cells_are_predicted_written_and_shown(model, monkeypatch):
    done = predict(model, "--quick", *CELL)
    assert done.returncode == 0, done.stderr
    document = json.loads((model / "predictions-quick.json").read_text())
    forward, backward = document["results"]
    assert (forward["us"], forward["percent_of_copy"], forward["spilled"], forward["cols"]) == (100.0, 91, 8, 4096)
    assert backward["direction"] == "backward" and document["latency"] == 1 and "triton" in document["machine"]
    page = model / "page.md"
    page.write_text("<!-- predictions predictions-quick.json -->\n<!-- end -->\n")
    monkeypatch.setattr(summary, "RESULTS", model)
    assert summary.fill(page)
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if "rms_norm" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["`rms_norm` forward", "bf16", "32 M", "H100", "91"], ["`rms_norm` backward", "bf16", "32 M", "H100", "91 l"],
    ]  # fmt: skip


def test_another_latency_has_a_file_of_its_own(model):
    assert predict(model, "--quick", *CELL).returncode == 0
    before = (model / "predictions-quick.json").read_text()
    done = predict(model, "--quick", *CELL, "--latency", "1.5")
    assert done.returncode == 0, done.stderr
    assert (model / "predictions-quick.json").read_text() == before
    document = json.loads((model / "predictions-latency-1.5-quick.json").read_text())
    assert document["latency"] == 1.5 and [r["us"] for r in document["results"]] == [150.1, 150.1]


def test_norms_over_channels_have_a_table_of_images(model):
    """Per cent of a copy of the passes that are needed: 4 forward, 6 backward, of 41 images in bf16."""
    cell = ["--operations", "rms_norm,batch_norm_training_add_relu", "--targets", "sm_90", "--dtypes", "bf16"]
    done = predict(model, "--quick", *cell)
    assert done.returncode == 0, done.stderr
    results = json.loads((model / "predictions-quick.json").read_text())["results"]
    percent = [100 * passes * 41 * 256 * 56 * 56 * 2 / 4e12 / 100.04e-6 for passes in (4, 4, 6, 6)]
    assert [r["percent_of_copy"] for r in results if "image" in r] == [round(p) for p in percent]
    rows, images = summary.prediction_tables(results, {"sm_90": "H100"})
    assert [*rows.columns] == ["call", "dtype", "elements", "GPU", "4096"]
    assert [*images.columns] == ["call", "dtype", "elements", "GPU", "256 × 56 × 56"]
    calls = [f"`batch_norm_training_add_relu` {d}, {m}" for d in ("forward", "backward") for m in predictions.LAYOUTS]
    assert [*images["call"]] == calls
    wider = [results[0] | {"operation": "gated_rms_norm", "cols": cols} for cols in (8192, 2048)]
    tables = summary.prediction_tables(results + wider, {"sm_90": "H100"})
    assert [[*table.columns[4:]] for table in tables] == [["4096"], ["256 × 56 × 56"], ["2048", "8192"]]


def test_another_library_stands_beside_ours(model):
    """Where our time is more than 3 per cent above its, a mark says so; what it doesn't have is ours alone."""
    (model / "liger_kernel.py").write_text("")
    cell = ("--operations", "rms_norm,add_layer_norm,group_norm_silu", *CELL[2:])
    done = predict(model, "--quick", *cell, "--providers", "fastnorm,liger")
    assert done.returncode == 0, done.stderr
    results = json.loads((model / "predictions-quick.json").read_text())["results"]
    assert [r["operation"] for r in results if r["provider"] == "liger"] == 2 * ["rms_norm"]
    ours, _, beside = summary.prediction_tables(results, {"sm_90": "H100"})
    assert len(ours) == 4 and [*beside["4096"]] == ["0.98×", "0.96× ▼"]
    alone = [r for r in results if r["provider"] == "liger"]
    assert [*summary.prediction_tables(alone, {"sm_90": "H100"})[0]["4096"]] == ["", ""]
    done = predict(model, "--quick", "--operations", "add_layer_norm", "--providers", "liger")
    assert done.returncode == 1 and "nothing to predict" in done.stderr and "Traceback" not in done.stderr


def test_without_another_library_it_says_what_to_install(model):
    if importlib.util.find_spec("liger_kernel") is not None:
        (model / "sitecustomize.py").write_text("import sys\nsys.modules['liger_kernel'] = None\n")
    done = predict(model, "--quick", *CELL, "--providers", "liger")
    assert done.returncode == 1 and "pip install --no-deps liger-kernel" in done.stderr and "Trace" not in done.stderr


def test_without_the_model_it_says_what_is_missing(tmp_path):
    done = predict(tmp_path, "--quick")
    assert done.returncode == 1 and "gputime" in done.stderr and "Traceback" not in done.stderr
