"""The states of the memory in which the benchmark times a CPU's calls: what they do, and how they are shown."""

import json
import platform
from pathlib import Path

import pytest
import torch

from bench import ceiling, cli, commands, memory, report, summary

CPU = torch.device("cpu")
HAS_GLIBC = platform.libc_ver()[0] == "glibc"
HUGE_PAGE = 2 * 2**20
ROOT = Path(__file__).parents[1]


def test_only_a_cpu_with_glibc_has_both_states():
    assert memory.states(CPU) == (memory.STATES if HAS_GLIBC else (memory.AS_IT_IS,))
    assert memory.states(torch.device("cuda")) == (memory.IN_USE,)


@pytest.mark.parametrize("mib", [1, 8, 64])
def test_only_new_memory_makes_pages_in_every_call(mib):
    """Whatever was freed before: holes in the heap would serve calls whose memory is to be new."""
    with memory.entered(memory.IN_USE):
        hole, _above = torch.ones(64 * 2**20 // 4), torch.ones(1000)
        del hole
    nbytes = mib * 2**20
    for _ in range(2):  # they may follow each other in any order
        with memory.entered(memory.NEW):
            assert not HAS_GLIBC or memory.page_faults(nbytes) >= max(1, nbytes / HUGE_PAGE)
        with memory.entered(memory.IN_USE):
            assert not HAS_GLIBC or memory.page_faults(nbytes) == 0


def test_settling_ends_when_no_new_pages_are_written(monkeypatch):
    faults = iter([0, 50, 50, 50, 50, 90, 90, 90, 90, 90, 90, 90])  # before and after each round
    monkeypatch.setattr(memory, "_page_faults", lambda: next(faults))
    calls = []
    memory.settle([lambda: calls.append("a"), lambda: calls.append("b")])
    assert "".join(calls) == "ab" * 6
    monkeypatch.setattr(memory, "_page_faults", iter(range(0, 1000, 3)).__next__)
    memory.settle([lambda: calls.append("a")])
    assert len(calls) == 12 + memory._MOST_ROUNDS


def test_what_a_malloc_refuses_is_an_error(monkeypatch):
    class Refusing:
        mallopt = staticmethod(lambda parameter, value: 0)

    monkeypatch.setattr(memory, "_glibc", Refusing)
    with pytest.raises(RuntimeError, match="refused the parameter -4 = 0 of memory 'in use'"):
        memory.entered(memory.IN_USE).__enter__()


NORM = ["rms_norm", "--shapes", "8x16", "--dtypes", "fp32", "--device", "cpu", "--repeats", "2", "--min-time", "0.001"]


@pytest.mark.parametrize(("given", "states"), [([], ["in use", "new"]), (["--memory", "new"], ["new"])])
def test_every_case_is_timed_in_each_state(given, states, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceiling, "LARGE_BYTES", 2**16)
    monkeypatch.setattr(memory, "states", lambda device: memory.STATES)
    entered, set_state = [], memory._set
    monkeypatch.setattr(memory, "_set", lambda libc, state: (entered.append(state), set_state(libc, state)))
    providers = ["--mode", "forward", "--providers", "torch,fastnorm-reference"]
    assert cli.main([*NORM, *providers, *given, "--plots", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text("utf-8"))["results"]
    assert [(r["memory"], r["provider"]) for r in results] == [
        (state, provider) for state in states for provider in ("torch", "fastnorm-reference")
    ]
    assert not HAS_GLIBC or set(states) < set(entered)
    printed = capsys.readouterr().out
    assert all(f"vs torch, {state}" in printed for state in states) and "in use: malloc keeps" in printed
    assert ("vs torch, in use" in printed) == ("in use" in states)


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ([], memory.STATES, memory.STATES),
        (["--quick"], memory.STATES, (memory.IN_USE,)),
        (["--quick", "--memory", "new,in-use"], memory.STATES, (memory.NEW, memory.IN_USE)),
        ([], (memory.AS_IT_IS,), (memory.AS_IT_IS,)),
        (["--quick"], (memory.AS_IT_IS,), (memory.AS_IT_IS,)),
    ],
)
def test_both_states_are_the_default(given, known, expected, monkeypatch):
    monkeypatch.setattr(memory, "states", lambda device: known)
    assert commands._memory(cli.parse(["--device", "cpu", *given])) == expected


@pytest.mark.parametrize(
    ("given", "complaint"),
    [("old", "unknown memory 'old'; known: in-use, new"), ("new", "on cpu here memory is only in use")],
)
def test_states_that_are_not_there_are_named(given, complaint, capsys, monkeypatch):
    monkeypatch.setattr(memory, "states", lambda device: (memory.IN_USE,))
    with pytest.raises(SystemExit) as stopped:
        cli.main([*NORM, "--memory", given])
    assert stopped.value.code == 2 and f"argument --memory: {complaint}" in capsys.readouterr().err


def result(provider: str, state: str | None, ratio: float | None, **more) -> dict:
    case = {"operation": "rms_norm", "mode": "forward", "shape": "8x64", "layout": "contiguous", "dtype": "fp32"}
    times = dict.fromkeys(("median_s", "first_quartile_s", "third_quartile_s"), None if ratio is None else 1e-3)
    rest = {"backend": "", "status": "ok", "detail": "", "gb_per_s": 1.0, "percent_of_ceiling": 5.0,
            "speedup_vs_torch": ratio, "speedup_vs_compile": None, "error_of_allowed": 0.5}  # fmt: skip
    return case | {"provider": provider, **rest, **times, **({"memory": state} if state else {})} | more


def cells(text: str) -> list[list[str]]:
    """The rows of tables in Markdown, without what is no row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if "---" not in row[0]]


def test_the_table_has_a_speed_up_for_each_state():
    failed = {"status": "WRONG", "detail": "y is off"}
    results = [
        *(result("torch", "in use", 1.0), result("fastnorm", "in use", 2.0)),
        *(result("torch", "new", 1.0), result("fastnorm", "new", 0.5), result("peer", "new", None, **failed)),
    ]
    results.insert(2, result("peer", "in use", None, **failed))
    text = report.tables(results, report.NORMS, "github")
    headers, torch_, ours, peer = cells(text)
    assert headers[7:] == ["vs torch, in use", "vs torch, new", "vs compile, in use", "vs compile, new", "error"]
    assert torch_[7:9] == ["1.00x", "1.00x"] and ours[7:9] == ["2.00x", "0.50x ▼"] and peer[3] == "WRONG"
    assert text.count("WRONG: peer") == 1
    block = report.losing(results, report.NORMS)
    assert block.startswith("Losing cells: fastnorm slower than stock torch eager: 1 of 2")
    assert "fp32     new       fastnorm" in block and "0.50x" in block and "2.00x" not in block


def test_results_that_name_no_state_were_in_use():
    old = [result("torch", None, 1.0), result("fastnorm", None, 0.5)]
    named = [result("torch", "in use", 1.0), result("fastnorm", "in use", 0.5)]
    assert report.tables(old, report.NORMS) == report.tables(named, report.NORMS)
    assert report.losing(old, report.NORMS) == report.losing(named, report.NORMS)
    assert report.legend(old, report.NORMS) == report.legend(named, report.NORMS) == report.NORMS.legend
    new = [result("torch", "new", 1.0), result("fastnorm", "new", 0.25)]
    assert "vs torch, in use    vs torch, new" in report.tables(old + new, report.NORMS)
    assert "in use    fastnorm" in report.losing(old + new, report.NORMS)


@pytest.mark.parametrize("kind", ["cells", "operations", "spread"])
def test_documents_tell_states_apart(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    cases = {"old.json": [result("fastnorm", None, 2.0)], "new.json": [result("fastnorm", "new", 0.5)]}
    for name, results in cases.items():
        (tmp_path / name).write_text(json.dumps({"results": results}))
    alone, both = summary._table(kind, ["old.json"]), summary._table(kind, cases)
    assert "memory" not in alone and "2.00×" in alone
    assert "forward, memory in use" in both and "forward, memory new" in both and "0.50×" in both
