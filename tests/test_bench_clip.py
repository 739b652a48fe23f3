"""The clip's benchmark: its lists, its verdicts and its files; nothing here depends on how fast anything is."""

import csv
import json
import math

import pytest
import torch

from bench import cli, clip

TINY = ["--repeats", "2", "--min-time", "0.001", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tiny_list(monkeypatch):
    monkeypatch.setattr(clip, "LISTS", {"tiny": lambda: [(8, 4), (8,), (2, 3, 3, 3)]})
    monkeypatch.setattr(clip, "USUAL", ("tiny",))


def results_of(folder):
    (path,) = folder.glob("clip-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_lists_are_what_they_are_called(monkeypatch):
    monkeypatch.undo()
    sizes = {name: [math.prod(shape) for shape in shapes()] for name, shapes in clip.LISTS.items()}
    assert len(sizes["resnet50"]) == 161 and sum(sizes["resnet50"]) == 25_557_032
    assert len(sizes["transformer"]) == 148 and 100e6 < sum(sizes["transformer"]) < 103e6
    assert sizes["small"] == [64] * 2000


def test_command_writes_table_csv_and_json(tmp_path, capsys):
    assert cli.main(["clip", "--dtypes", "fp32,bf16", "--output", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    assert "clip_grad_norm_, not clipped" in printed and "tiny: 3 x" in printed and "adaptive_clip_grad_" in printed
    document = results_of(tmp_path)
    assert document["machine"]["cpu"] and document["absent"]["clip_grad_norm_"]["apex"]
    results = document["results"]
    cases = {(r["operation"], r["case"], r["dtype"]) for r in results}
    assert len(cases) == 4 * 2 * 2
    assert {"fastnorm-deferred", "fastnorm-autoclip", "fastnorm-adagc"} <= {r["provider"] for r in results}
    for r in results:
        assert r["status"] == "ok" or (r["status"] == "INEXACT" and not r["provider"].startswith("fastnorm"))
        assert r["error"] < 1e-2 and r["median_s"] > 0 and r["elements"] == 32 + 8 + 54
        assert r["gb_per_s"] == pytest.approx(r["compulsory_bytes"] / r["median_s"] / 1e9)
        assert r["provider"] != r["baseline"] or r["speedup"] == 1
    (csv_path,) = tmp_path.glob("*.csv")
    lines = [line for line in csv_path.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
    assert [float(row["median_s"]) for row in csv.DictReader(lines)] == [r["median_s"] for r in results]
    (markdown,) = tmp_path.glob("*.md")
    assert "### clip and AdamW step, clipped" in markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize(("damage", "status"), [(1 + 1e-4, "INEXACT"), (1.1, "WRONG"), (math.nan, "WRONG")])
def test_the_check_sees_damage_and_takes_less_from_fastnorm(damage, status):
    workload = clip.Workload([(8, 4), (8,)], torch.float32, torch.device("cpu"))
    operation = clip.OPERATIONS["clip_grad_norm_"]
    bound = operation.bounds(workload.norm)[clip.CLIPPED]

    def damaged(workload, bound):
        total_norm = torch.nn.utils.clip_grad_norm_(workload.params, bound)
        workload.params[1].grad[3] *= damage
        return total_norm

    def judge(ours):
        provider = clip.Provider("someone", lambda operation: damaged, ours=ours)
        return clip.judge(provider, operation, damaged, workload, bound)

    assert judge(ours=False)["status"] == status
    ours = judge(ours=True)
    assert ours["status"] == (status if ours["backend"] == "reference" else "WRONG")


def test_clipped_stays_clipped_over_many_calls():
    workload = clip.Workload([(8, 4), (8,)], torch.float32, torch.device("cpu"))
    for label, operation in clip.OPERATIONS.items():
        workload.reset()
        bounds = clip._bounds(operation.bounds(workload.norm)[clip.CLIPPED], clip.CLIPPED)
        call = operation.fused
        for _ in range(50):
            before = [p.grad.clone() for p in workload.params]
            call(workload, next(bounds))
            assert not any(torch.equal(p.grad, g) for p, g in zip(workload.params, before, strict=True)), label
        workload.reset()
        call(workload, operation.bounds(workload.norm)[clip.NOT_CLIPPED])
        assert all(torch.equal(p.grad, g) for p, g in zip(workload.params, workload._grads, strict=True))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--lists", "huge"], "unknown list 'huge'"), (["--device", "meta"], "only cpu and cuda")],
)
def test_bad_arguments_are_named(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["clip", *arguments])
    assert complaint in capsys.readouterr().err
