"""`make card`, rehearsed without a card: every stage's code runs, and what one leaves behind is there at once."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("pandas")
pytest.importorskip("triton")

from bench import summary as documents
from bench.card import kernels, stages, summary
from bench.cli import main as bench

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-c"]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, whose Triton isn't interpreted unless it says so."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


def test_a_rehearsal_runs_every_stage(tmp_path):
    done = python("-m", "bench.card", "--rehearse", "--minutes", "20", "--output", str(tmp_path), OMP_NUM_THREADS="1")
    document = json.loads((tmp_path / "card.json").read_text())
    log = (tmp_path / "card.log").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    assert [s["stage"] for s in document["stages"]][-4:] == ["smoke", "tests", "times", "questions"], log
    assert {s["ended"] for s in document["stages"]} == {"well"} and document["rehearsal"] and not document["failures"]
    assert document["checks"]["passed"] >= 28 and document["tests"]["passed"] > 3
    operations = {line["operation"] for line in document["results"]}
    assert operations == {"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "batch_norm_training_add_relu",
                          "group_norm_silu"}  # fmt: skip
    assert all(line["host_s"] > 0 and line["median_s"] > 0 for line in document["results"])
    assert {line["operation"] for line in document["clips"]} >= {"clip_grad_norm_", "adaptive_clip_grad_"}
    assert len({line["variant"] for line in document["questions"] if "median_s" in line}) == 8
    printed = done.stdout[done.stdout.index("REHEARSAL") :].splitlines()
    assert len(printed) <= 60 and len(list(tmp_path.iterdir())) == 4
    assert "REHEARSAL" in (tmp_path / "card.md").read_text()


def test_torch_and_the_standard_library_are_enough():
    """On a machine where nothing else is installed; pytest, which has a stage of its own, and Triton apart."""
    code = (
        "import sys; others = 'cpuinfo matplotlib pandas seaborn tabulate tqdm'; "
        "sys.modules.update(dict.fromkeys(others.split()))\n"
        "from bench.card import __main__, common, kernels, questions, smoke, stages, summary, times\n"
        "facts = times.machine.describe(common.torch.device('cpu')); print(facts['simd'], facts['cpu'])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "flags unknown" in done.stdout


def planned(*commands: tuple[str, float, str]) -> list[stages.Command]:
    return [stages.Command(name, seconds, [code], program=PYTHON) for name, seconds, code in commands]


def run(monkeypatch, folder, *commands: tuple[str, float, str]) -> tuple[int, dict]:
    monkeypatch.setattr(stages, "planned", lambda rehearse, records: iter(planned(*commands)))
    status = stages.run_all(Namespace(output=folder, minutes=9, rehearse=False))
    return status, json.loads((folder / "card.json").read_text())


def test_no_stage_stops_the_others_and_what_one_wrote_stays(monkeypatch, tmp_path):
    lines = json.dumps({"stage": "smoke", "name": "a", "ok": True, "detail": ""}) + "\n" + "half a li"
    slow = f"open('{tmp_path}/card.jsonl', 'a').write({lines!r}); import time; time.sleep(60)"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(stages, "GRACE", 0.5)
    assert run(monkeypatch, tmp_path, ("well", 9, "pass"))[0] == 0
    wrong = json.dumps({"stage": "smoke", "name": "a", "ok": False, "detail": "off"}) + "\n"
    assert run(monkeypatch, tmp_path, ("wrong", 9, f"open('{tmp_path}/card.jsonl', 'a').write({wrong!r})"))[0] == 1
    status, document = run(
        monkeypatch, tmp_path, ("breaks", 9, "raise SystemExit(3)"), ("smoke", 5, slow), ("stubborn", 2, stubborn),
        ("last", 20, "print('reached')"),
    )  # fmt: skip
    assert status == 1
    assert [(s["stage"], s["ended"]) for s in document["stages"]] == [
        ("breaks", "with status 3"), ("smoke", "cut short"), ("stubborn", "cut short"), ("last", "well"),
    ]  # fmt: skip
    assert document["checks"] == {"passed": 1} and "reached" in (tmp_path / "card.log").read_text()
    assert run(monkeypatch, tmp_path, ("last", 20, "pass"))[1]["checks"] == {}, "an earlier run's results are gone"


def result(provider: str, median: float, **more) -> dict:
    case = {"kind": "norm", "operation": "rms_norm", "shape": "8192x4096", "layout": "contiguous", "dtype": "bf16"}
    case |= {"mode": "forward_backward", "median_s": median, "gb_per_s": 2500.0, "percent_of_ceiling": 91.2}
    speedups = {"speedup_vs_torch": 2.0, "speedup_vs_compile": None}
    return case | speedups | {"host_s": 4.4e-5, "status": "ok", "detail": "", "provider": provider} | more


@pytest.fixture
def card(tmp_path):
    """What a card might have left."""
    inexact = result("fastnorm", 1.0, dtype="fp32", status="INEXACT", detail="dx is off")
    times = [{"machine": {"device": "Some Card"}}, result("torch", 3e-4), result("fastnorm", 1.5e-4),
             result("liger", 1.2e-4), inexact]  # fmt: skip
    smoke = [{"name": "group_norm_silu", "ok": False, "detail": "dx is off by 1"}, {"name": "graph", "ok": True},
             {"left_out": "stream"}]  # fmt: skip
    failed = {"test": "tests/test_gpu.py::test_x", "outcome": "failed", "seconds": 1, "why": ["E   boom"]}
    question = {"kind": "question", "operation": "rms_norm", "cols": 4096}
    questions = [question | {"variant": "as it is", "median_s": 1e-4},
                 question | {"variant": "row kept", "median_s": 2e-4},
                 question | {"variant": "8-byte accesses", "failed": "no"}]  # fmt: skip
    found = {"times": times, "smoke": smoke, "tests": [failed], "questions": questions}
    lines = [json.dumps({"stage": stage} | line) for stage, lines in found.items() for line in lines]
    (tmp_path / "card.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "card.log").write_text('== profile\n"ID","Metric"\n')
    summary.write(tmp_path, [{"stage": "smoke", "ended": "well", "seconds": 1.0}], False)
    return tmp_path


def test_the_summary_shows_failures_losses_and_the_choices(card):
    text = summary.text(card)
    page = (card / "card.md").read_text()
    assert '"ID","Metric"' in page and "- smoke: stream" in page and "checks: {'failed': 1, 'passed': 1}" in page
    assert text.startswith("Some Card\n") and "failures: 3" in text
    assert "FAILED smoke: group_norm_silu: dx is off by 1" in text and "test_x: E   boom" in text
    assert "FAILED times: rms_norm 8192x4096 fp32 fastnorm: INEXACT: dx is off" in text
    row = next(line for line in text.splitlines() if "8192x4096" in line and "both" in line and "bf16" in line)
    assert row.split()[4:] == ["150.0", "2500", "91", "44", "2.00×", "0.80×", "▼"]
    choices = next(line for line in text.splitlines() if line.startswith("rms_norm backward"))
    assert choices.split()[2:] == ["4096", "100.0", "2.00", "failed"]


def test_what_comes_after_an_error_that_stays_is_tried_in_a_new_process(tmp_path):
    code = (
        "import os; from bench.card.common import Stage; stage = Stage(None); pid = os.getpid()\n"
        "def breaks(): global broken; broken = True; raise RuntimeError('CUDA error: an illegal memory access')\n"
        "broken = False\n"
        "stage.attempt('breaks', breaks); stage.attempt('next', lambda: 'still broken' if broken else None)"
    )
    done = python("-c", code, "--records", str(tmp_path / "found"), "--rehearse", "--name", "x")
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    told = [(f["stage"], f["name"], f["ok"]) for f in found]
    assert told == [("x", "breaks", False), ("x", "next", True)], done.stderr


@pytest.mark.parametrize("kind, expected", [("card", "| rms_norm"), ("headline", "| rms_norm")])
def test_documents_have_a_cards_results_once_there_are_some(kind, expected, card, monkeypatch, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(documents, "RESULTS", results)
    document = tmp_path / "document.md"
    document.write_text(f"<!-- {kind} card-*.json -->\n<!-- end -->\n")
    bench(["summary", str(document)])
    assert "not been measured" in document.read_text()
    found = json.loads((card / "card.json").read_text())
    (results / "card-rehearsed.json").write_text(json.dumps(found | {"rehearsal": True}))
    bench(["summary", str(document)])
    assert "not been measured" in document.read_text()
    (results / "card-some.json").write_text(json.dumps(found))
    bench(["summary", str(document)])
    assert "Some Card" in document.read_text() and expected in document.read_text()
    assert "not been measured" not in document.read_text()


def test_each_choice_that_is_asked_about_changes_the_kernel(kernel_cache):
    """At one of its widths; their programs' number apart, which is no part of the code."""
    code = (
        "import json; from bench import compiled, problem; from bench.card import questions\n"
        "found = {}\n"
        "for name, activate in questions.variants().items():\n"
        "  with activate():\n"
        "    cases = [problem.Problem('sm_90', 'layer_norm', 'backward', 'bf16', n) for n in questions.WIDTHS]\n"
        "    kernels = [kernel for case in cases for kernel in compiled.compile_problem(case)]\n"  # those that are new
        "  found[name] = [k.hash for k in kernels if 'backward' in k.kernel]\n"
        "print(json.dumps(found))"
    )
    done = python("-c", code, TRITON_CACHE_DIR=str(kernel_cache))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("half the programs") == found.pop("twice the programs") == []
    assert len(found) == 6 and all(found.values())


def test_the_profiler_has_its_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "SHAPES", {"rms_norm": (4, 64), "group_norm_silu": (2, 64, 4, 4)})
    kernels.main("cpu")
