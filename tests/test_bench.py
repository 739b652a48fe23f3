"""The benchmark's own arithmetic, verdicts and files; nothing here depends on how fast anything is."""

import csv
import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import ceiling, check, cli, labels, memory, models, monitor, plots, providers, report, run, timing
from bench.operations import OPERATIONS
from bench.workload import Workload

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TINY = ["--dtypes", "fp32", "--device", "cpu", "--repeats", "2", "--min-time", "0.001"]

# design: passes over x, reads + writes
BATCH_NORM_TRAINING = {"forward": 2 + 1, "backward": 4 + 1}
BATCH_NORM_EVALUATION = {"forward": 1 + 1, "backward": 2 + 1}
MODULATED = {"forward": 2 + 2, "backward": 4 + 2}  # x, which the gate's gradient needs; dx and dresidual
GATED = {"forward": 2 + 1, "backward": 3 + 2}  # the gate; its gradient
ALLOWED_PASSES = {
    "layer_norm": {"forward": 1 + 1, "backward": 2 + 1},
    "rms_norm": {"forward": 1 + 1, "backward": 2 + 1},
    "add_layer_norm": {"forward": 2 + 2, "backward": 3 + 1},
    "add_rms_norm": {"forward": 2 + 2, "backward": 3 + 1},
    "gated_rms_norm": GATED,
    "gated_rms_norm_gate_first": GATED,
    "gated_rms_norm_grouped": GATED,
    "modulated_layer_norm": MODULATED,
    "modulated_rms_norm": MODULATED,
    "rms_norm_many_rotary": {"forward": 1 + 1, "backward": 2 + 1},  # of queries and keys
    "rms_norm_many_latents": {"forward": 1 + 1, "backward": 2 + 1},
    "batch_norm_training": BATCH_NORM_TRAINING,
    "batch_norm_training_relu": BATCH_NORM_TRAINING,
    "batch_norm_training_add_relu": {"forward": 3 + 1, "backward": 4 + 2},  # the residual; its gradient
    "batch_norm_evaluation": BATCH_NORM_EVALUATION,
    "batch_norm_evaluation_relu": BATCH_NORM_EVALUATION,
    "batch_norm_evaluation_add_relu": {"forward": 2 + 1, "backward": 2 + 2},
    "group_norm_plain": {"forward": 1 + 1, "backward": 2 + 1},
    "group_norm_silu": {"forward": 1 + 1, "backward": 2 + 1},
}


@pytest.fixture(autouse=True)
def quick_commands(monkeypatch):
    """The copy beyond all caches takes a second, which the command's tests don't need. Nor do they need every state of
    the memory: tests/test_bench_memory.py has those."""
    monkeypatch.setattr(ceiling, "LARGE_BYTES", 2**16)
    monkeypatch.setattr(memory, "states", lambda device: (memory.IN_USE,))


def add_provider(monkeypatch, name, build, ours=False):
    monkeypatch.setitem(providers.PROVIDERS, name, providers.Provider(name, build, ours=ours))


def results_of(folder, stem="*"):
    (path,) = folder.glob(f"{stem}.json")
    return json.loads(path.read_text(encoding="utf-8"))["results"]


def test_command_writes_table_csv_json_and_png(tmp_path, capsys):
    chosen = ["rms_norm", "--shapes", "8x16,4x32", "--providers", "torch,fastnorm-reference", "--plots"]
    assert cli.main([*chosen, "--output", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    assert "rms_norm, forward + backward" in printed and "8 x 16" in printed and "cpu" in printed

    results = results_of(tmp_path)
    assert len(results) == 2 * 2 * 2  # shapes, modes, providers
    assert {(r["shape"], r["layout"]) for r in results} == {("8x16", "contiguous"), ("4x32", "contiguous")}
    for result in results:
        assert result["status"] == "ok" and result["median_s"] > 0 and result["rounds"] >= 2
        assert result["gb_per_s"] == pytest.approx(result["compulsory_bytes"] / result["median_s"] / 1e9)
        assert result["percent_of_ceiling"] == pytest.approx(100 * result["gb_per_s"] / result["ceiling_gb_per_s"])
        assert result["speedup_vs_compile"] is None  # it did not take part
        assert (result["speedup_vs_torch"] == 1) == (result["provider"] == "torch")

    (csv_path,) = tmp_path.glob("*.csv")
    lines = csv_path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    assert any(line.startswith("# torch: ") for line in comments)
    rows = list(csv.DictReader(lines[len(comments) :]))
    assert [float(row["median_s"]) for row in rows] == [result["median_s"] for result in results]

    (png,) = tmp_path.glob("*-rms_norm.png")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    (markdown,) = tmp_path.glob("*.md")
    assert "### rms_norm, forward" in markdown.read_text(encoding="utf-8")


def test_channel_norms_take_images_in_both_layouts(tmp_path, capsys):
    arguments = ["batch_norm", "--shapes", "2x8x3x3", "--providers", "torch,fastnorm-reference"]
    assert cli.main([*arguments, "--plots", "--output", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    assert "batch_norm_training_add_relu, forward + backward" in printed and "2 x 8 x 3 x 3, channels_last" in printed
    results = results_of(tmp_path, "*-batch_norm-custom")
    assert len(results) == 6 * 2 * 2 * 2  # forms, layouts, modes, providers
    assert {(r["shape"], r["layout"]) for r in results} == {("2x8x3x3", "contiguous"), ("2x8x3x3", "channels_last")}
    assert all(r["status"] == "ok" and r["median_s"] > 0 for r in results)
    pngs = [path.name for path in tmp_path.glob("*.png")]
    assert sum("batch_norm_evaluation" in name for name in pngs) == 3 and len(pngs) == 6


def test_a_grid_of_shapes_draws_the_map_of_speedups_too(tmp_path):
    results = [
        {"operation": "rms_norm", "mode": "forward", "shape": f"{rows}x{cols}", "layout": "contiguous", "dtype": "fp32",
         "provider": provider, "gb_per_s": 1.0, "ceiling_gb_per_s": 2.0, "speedup_vs_torch": rows / cols}
        for rows in (2, 4) for cols in (8, 16, 24) for provider in ("torch", "fastnorm")
    ]  # fmt: skip
    copied = {"nbytes": ceiling.LARGE_BYTES, "copy": 1.0, "clone": 1.5}
    document = {"machine": {"device": "A machine"}, "copy_ceilings_gb_per_s": [copied]}
    paths = plots.write(tmp_path, "machine", document | {"results": results})
    assert paths == [tmp_path / "machine-rms_norm.png", tmp_path / "machine-rms_norm-speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_wrong_and_failing_providers_get_no_time(tmp_path, capsys, monkeypatch):
    def off_by_a_percent(operation):
        return lambda *inputs: 1.01 * operation.stock(*inputs)

    def breaks_on_16_columns(operation):
        def call(x, *parameters):
            if x.shape[1] == 16:
                raise RuntimeError("no kernel for 16 columns")
            return operation.stock(x, *parameters)

        return call

    def missing(operation):
        raise providers.Unavailable("needs another machine")

    add_provider(monkeypatch, "wrong", off_by_a_percent)
    add_provider(monkeypatch, "failing", breaks_on_16_columns)
    add_provider(monkeypatch, "missing", missing)
    named = "torch,wrong,failing,missing"
    arguments = ["rms_norm", "--shapes", "8x16", "--providers", named, "--output", str(tmp_path), *TINY]
    assert cli.main(arguments) == 0  # none of them is fastnorm's

    results = {(r["provider"], r["mode"]): r for r in results_of(tmp_path)}
    assert {provider for provider, _ in results} == {"torch", "wrong", "failing"}
    for provider, status in (("wrong", "WRONG"), ("failing", "FAILED")):
        result = results[provider, "forward"]
        assert result["status"] == status
        assert result["median_s"] is result["gb_per_s"] is result["speedup_vs_torch"] is None
    assert results["torch", "forward"]["speedup_vs_torch"] == 1
    printed = capsys.readouterr().out
    assert "missing: needs another machine" in printed
    assert "WRONG: wrong, 8 x 16 fp32: y is off by" in printed
    assert "FAILED: failing, 8 x 16 fp32: RuntimeError: no kernel for 16 columns" in printed
    assert not list(tmp_path.glob("*.png"))


def test_what_is_above_the_rule_is_shown_with_its_error_and_fails_the_command_if_it_is_fastnorm(tmp_path, monkeypatch):
    def slightly_off(operation):
        return lambda *inputs: operation.stock(*inputs) * (1 + 6e-7)

    add_provider(monkeypatch, "peer", slightly_off)
    add_provider(monkeypatch, "fastnorm-sloppy", slightly_off, ours=True)
    monkeypatch.setattr(run, "serving_backend", lambda provider, op, x: "")
    arguments = ["--mode", "forward", "--shapes", "64x64", "--providers", "peer,fastnorm-sloppy"]
    assert cli.main(["rms_norm", *arguments, "--output", str(tmp_path), *TINY]) == 1
    peer, ours = results_of(tmp_path)
    assert peer["status"] == ours["status"] == "INEXACT"
    assert 1 < peer["error_of_allowed"] == ours["error_of_allowed"] < check.FACTOR_FOR_OTHERS
    assert peer["median_s"] > 0 and ours["median_s"] > 0
    arguments[arguments.index("peer,fastnorm-sloppy")] = "peer"
    assert cli.main(["rms_norm", *arguments, "--output", str(tmp_path), *TINY]) == 0


SMALL = ["rms_norm", "--shapes", "8x16", "--mode", "forward", "--providers", "torch,fastnorm-reference"]


def test_json_to_stdout_leaves_all_else_to_stderr(tmp_path, capsys):
    assert cli.main([*SMALL, "--json", "-", "--output", str(tmp_path), *TINY]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"] == results_of(tmp_path)
    assert "rms_norm, forward" in err and "Losing cells" in err
    assert cli.main([*SMALL, "--json", str(tmp_path / "given"), "--output", str(tmp_path), *TINY]) == 0
    assert json.loads((tmp_path / "given").read_text())["results"] == results_of(tmp_path)
    assert "rms_norm, forward" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "is_busy"), [(0.51, True), (0.49, False)])
def test_the_first_line_says_that_the_machine_is_busy(load, is_busy, tmp_path, capsys, monkeypatch):
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (load * cores, 0.0, 0.0))
    assert cli.main([*SMALL, "--output", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    if is_busy:
        assert printed.startswith(f"BUSY: the load average is {load * cores:.2f}, above 0.5 for each of {cores} cores")
    else:
        assert printed.startswith("device ") and "busy" not in printed.lower()


def test_losing_cells_come_last_in_one_block(tmp_path, capsys, monkeypatch):
    def ratio(baseline, samples):
        return 1.0 if baseline is samples else 0.8

    monkeypatch.setattr(run, "paired_ratio", ratio)
    assert cli.main([*SMALL, "--output", str(tmp_path), *TINY]) == 0
    title, empty, header, _, *rows = capsys.readouterr().out.partition("Losing cells: ")[2].splitlines()
    assert title == "fastnorm slower than stock torch eager: 1 of 1" and not empty and header.startswith("case  ")
    assert [row.split()[:6] for row in rows] == [["rms_norm,", "forward", "8", "x", "16", "fp32"]]
    assert "0.80x ▼" in rows[0]


def test_only_what_fastnorm_is_slower_at_is_losing():
    results = results_of(ROOT / "bench" / "results", "*-layer_norm-custom")
    text = report.losing(results, report.NORMS)
    assert text.splitlines()[0] == "Losing cells: fastnorm slower than stock torch eager: 1 of 4"
    assert len(text.splitlines()) == 5 and "64 x 256" in text.splitlines()[4]
    fast = [result | {"speedup_vs_torch": 0.996} for result in results]  # 1.00, as the tables show it
    assert report.losing(fast, report.NORMS).endswith("eager: none of 4")
    alone = [result | {"speedup_vs_torch": None} for result in results]
    assert report.losing(alone, report.NORMS).endswith("eager: nothing to compare")


RESULTS = [path for path in (ROOT / "bench" / "results").glob("*.json") if "copy_ceilings" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_files_of_results_are_what_their_json_makes(path, tmp_path, monkeypatch):
    monkeypatch.undo()  # the true size of a large copy
    report.write(tmp_path / path.stem, json.loads(path.read_text("utf-8")), report.NORMS)
    for suffix in (".json", ".csv", ".md"):
        written = (tmp_path / path.name).with_suffix(suffix).read_text("utf-8")
        assert written.splitlines() == path.with_suffix(suffix).read_text("utf-8").splitlines()


@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_are_those_of_the_design(name):
    shape = (5, 10, 4, 8, 2)[: len(OPERATIONS[name].family.probe)]
    elements = {"rms_norm_many_rotary": 5 * 10 * (4 + 8) * 2, "rms_norm_many_latents": 5 * (10 + 4)}.get(
        name, math.prod(shape)
    )
    mask_bits = 0 if "relu" not in name else 1 + (2 if "training" in name else 1)  # written once, read with every dy
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
        forward = OPERATIONS[name].compulsory_bytes("forward", shape, dtype)
        both = OPERATIONS[name].compulsory_bytes("forward_backward", shape, dtype)
        assert forward == ALLOWED_PASSES[name]["forward"] * elements * size
        assert both - forward == ALLOWED_PASSES[name]["backward"] * elements * size + mask_bits * elements // 8


def small(name, layout="contiguous", dtype=torch.float32):
    """A workload of any operation with five slices of 192 elements of x, more in a group norm."""
    shapes = {"row_norms": (5, 192), "gated_norms": (5, 192), "modulated_norms": (5, 3, 64),
              "batch_norm": (4, 5, 6, 8), "group_norm": (5, 64, 2, 3)}  # fmt: skip
    many = {"rms_norm_many_rotary": (1, 5, 3, 1, 64), "rms_norm_many_latents": (5, 192, 64)}
    shape = many[name] if name in many else shapes[OPERATIONS[name].family.name]
    return Workload.make(OPERATIONS[name], shape, layout, dtype, CPU)


@pytest.mark.parametrize("name", OPERATIONS)
def test_oracle_in_chunks_is_the_float64_result(name, monkeypatch):
    workload = small(name, OPERATIONS[name].family.layouts[-1])
    whole = workload.part(0, 5, torch.float64).evaluate(OPERATIONS[name].stock, "forward_backward")
    slice_elements = workload.inputs["x"].numel() // 5
    monkeypatch.setattr(check, "CHUNK_ELEMENTS", 2 * slice_elements)  # two slices at a time, one in the last chunk
    chunked = check.oracle(workload, "forward_backward")
    assert list(chunked) == list(whole)
    for key, value in whole.items():
        assert chunked[key].dtype == torch.float64
        torch.testing.assert_close(chunked[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.before_relu])
def test_a_fused_relu_may_cut_elsewhere_than_stock_within_rounding(name):
    """One rounding at the end, where stock has one before the residual, too, moves z across zero, and whole gradients
    with it."""
    workload = small(name, "channels_last", torch.bfloat16)

    def rounded_once(x, *rest):
        return workload.operation.stock(x.float(), *(tensor.float() for tensor in rest)).bfloat16()

    assert check.Reference(workload, "forward_backward").judge(rounded_once, "forward_backward").worst <= 1
    assert 0 < (workload.output_grads[0] == 0).float().mean() < 0.1


def test_calls_update_their_own_buffers_and_the_check_sees_them():
    workload = small("batch_norm_training")
    stock = workload.operation.stock
    before = workload.inputs["running_var"].clone()
    call = workload.runner(stock, "forward_backward")
    for _ in range(3):
        call()
    assert torch.equal(workload.inputs["running_var"], before)

    def biased(x, weight, bias, running_mean, running_var):
        old = running_var.clone()
        y = stock(x, weight, bias, running_mean, running_var)
        running_var.copy_(0.9 * old + 0.1 * x.var((0, 2, 3), correction=0))
        return y

    verdict = check.Reference(workload, "forward").judge(biased, "forward")
    assert verdict.worst > 1 and verdict.detail.startswith("running_var")


@pytest.mark.parametrize("damage", ["nan", "dtype", "shape", "gradient"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("rms_norm", (4, 8)), ("batch_norm_training_relu", (2, 4, 3, 3)), ("group_norm_silu", (2, 32, 2, 8))],
)
def test_the_check_sees_every_kind_of_damage(name, shape, damage):
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001

    workload = Workload.make(OPERATIONS[name], shape, "contiguous", torch.float32, CPU)
    stock = workload.operation.stock

    def damaged(*inputs):
        y = stock(*inputs)
        if damage == "nan":
            return torch.where(torch.arange(shape[-1]) == 2, torch.nan, y)
        return {"dtype": y.double(), "shape": y[:, :1], "gradient": WrongGradient.apply(y)}[damage]

    reference = check.Reference(workload, "forward_backward")
    assert reference.judge(stock, "forward_backward").worst <= 1
    mode = "forward_backward" if damage == "gradient" else "forward"
    verdict = reference.judge(damaged, mode)
    assert verdict.worst > 1
    assert verdict.detail.startswith("d" if damage == "gradient" else "y")
    if damage != "gradient":
        assert math.isinf(verdict.worst) and not verdict.is_tolerable


@pytest.mark.parametrize(("factor", "is_tolerable"), [(1 + 2**-9, True), (1 + 2**-6, False)])
def test_of_others_a_sum_in_the_precision_of_x_is_tolerable(factor, is_tolerable):
    workload = small("batch_norm_training", dtype=torch.bfloat16)

    def scales_dweight(x, weight, *rest):
        return workload.operation.stock(x, weight * factor - weight.detach() * (factor - 1), *rest)

    verdict = check.Reference(workload, "forward_backward").judge(scales_dweight, "forward_backward")
    assert verdict.worst > check.FACTOR_FOR_OTHERS and verdict.detail.startswith("dweight")
    assert verdict.is_tolerable == is_tolerable


def test_slack_is_one_ulp_of_the_largest_value():
    assert check.slack(torch.float32, torch.tensor([0.5, -1.5, 1.0])) == 2.0**-23
    assert check.slack(torch.bfloat16, torch.tensor([4.0, -7.0])) == 4 * 2.0**-7


def test_ratios_are_paired_by_round():
    baseline, samples = [2.0, 30.0, 4.0], [1.0, 10.0, 4.0]
    assert timing.paired_ratio(baseline, samples) == 2.0  # of 2, 3 and 1; the ratio of the medians would be 1
    with pytest.raises(ValueError, match="shorter than argument 1"):
        timing.paired_ratio(baseline, samples[:2])
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_intervals_of_medians():
    """Against tables of the sign test: of 10 samples the second to the ninth, of 25 the eighth to the eighteenth."""
    for n, k in ((6, 1), (10, 2), (25, 8), (100, 40)):
        assert timing.median_interval([float(x) for x in range(n, 0, -1)]) == (k, (n + 1) / 2, n + 1 - k)
    assert timing.median_interval([3.0, 1.0, 2.0]) == (None, 2.0, None)


def test_what_a_monitor_adds_is_weighted():
    """It measures the weights in one step of `updates_every`: a median over all steps would not see that."""
    samples = {"plain": [1.0, 2.0, 4.0] * 4, "ordinary": [1.01, 2.02, 4.04] * 4, "measuring": [2.01, 4.02, 8.04] * 4}
    found = monitor.summary(samples)
    assert found["plain_s"] == 2.0
    for name, share in (("ordinary", 0.01), ("measuring", 1.01), ("added", 0.03)):
        assert found[name] == pytest.approx((share, share, share))


def a_small_model():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def test_models_are_compared_and_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(models.MODELS, "small", models.Model(a_small_model, (3, 2, 6)))
    absent = models.Model(lambda: importlib.import_module("no_such_library"), (1, 1))
    monkeypatch.setitem(models.MODELS, "absent", absent)
    arguments = ["models", "small", "absent", "--output", str(tmp_path), "--dtypes", "fp32,bf16", *TINY[2:]]
    assert cli.main(arguments) == 0
    results = results_of(tmp_path)
    assert [(r["mode"], r["dtype"]) for r in results] == [(m, d) for d in ("fp32", "bf16") for m in models.MODES]
    assert all(r["norms"] == 1 and r["original_s"] > 0 and r["agrees"] for r in results)
    assert "absent is left out: ModuleNotFoundError" in capsys.readouterr().out
    monkeypatch.setattr(models, "TOLERANCE", dict.fromkeys(models.DTYPES, -1.0))
    assert cli.main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out


def test_models_lose_their_norms_and_nothing_else():
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU), nn.BatchNorm2d(4))
    forms, norms = models.forms_of(model)
    assert norms == 2
    assert [type(module) for module in forms[models.WITHOUT]] == [nn.Conv2d, nn.SiLU, nn.Identity]
    assert [type(module) for module in forms[models.ORIGINAL]] == list(map(type, model))
    rounds = {models.ORIGINAL: [2.0, 6.0], models.CONVERTED: [1.0, 2.0], models.WITHOUT: [1.5, 3.0]}
    found = models.summary(rounds)
    assert found == {"original_s": 4.0, "speedup": (None, 2.5, None), "share": 0.375}


def test_runners_take_turns_and_change_who_goes_first():
    class FakeTimer:
        most_calls = 1
        order = ""

        def sample(self, call, calls):
            type(self).order += call()
            return 1.0

    runners = {name: timing.Runner(lambda name=name: name) for name in "abc"}
    samples = timing.interleave(runners, FakeTimer(), timing.Budget(repeats=3, min_time=0))
    assert FakeTimer.order == "abc" + "abc" + "cba" + "bca"  # calibration, then three rounds
    assert samples == {name: [1.0] * 3 for name in "abc"}


def test_slow_first_calls_are_not_taken_for_the_time_of_a_call():
    class FakeTimer:
        most_calls = 1000
        seconds = iter([0.2, 0.1])  # of two calls, and then 1 ms

        def sample(self, call, calls):
            return next(self.seconds, 1e-3)

    assert timing._calibrate(timing.Runner(lambda: None), FakeTimer(), 5e-3) == 6
    assert timing._calibrate(timing.Runner(lambda: None), FakeTimer(), 9.0) == 1000


def test_losses_are_marked_and_times_have_three_digits():
    assert [labels.ratio(value) for value in (None, 1.5, 0.996, 0.994)] == ["–", "1.50x", "1.00x", "0.99x ▼"]
    assert [labels.duration(seconds) for seconds in (2.0, 0.0123, 123e-6, 5e-9)] == [
        "2.00 s",
        "12.3 ms",
        "123 µs",
        "5 ns",
    ]
