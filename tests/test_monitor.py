"""fastnorm.Monitor: its numbers against plain computations, and that it never waits, leaks or stays."""

import copy
import csv
import gc
import io
import json
import math
import pickle
import sys
import types
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import monitor as package
from fastnorm.clip import observers
from fastnorm.monitor import measurements, rows

CLIPS = {  # what they return is the caller's, to be overwritten
    "none": lambda model, optimizer: None,
    "clip_grad_norm_": lambda model, optimizer: fastnorm.clip_grad_norm_(model.parameters(), 0.5).zero_(),
    "infinity norm": lambda model, optimizer: fastnorm.clip_grad_norm_(model.parameters(), 0.05, "inf"),
    "in optimizer": lambda model, optimizer: fastnorm.clip_grad_norm_in_optimizer(optimizer, 0.5).zero_(),
    "with norm": lambda model, optimizer: fastnorm.clip_grads_with_norm_(
        model.parameters(), 0.5, fastnorm.get_total_norm([p.grad for p in model.parameters()])
    ),
    "torch's": lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    "torch's, patched": None,
    "groups": lambda model, optimizer: fastnorm.clip_grad_groups_(model, {"0": 0.2, "*": 0.2}),
    "by layer": lambda model, optimizer: [fastnorm.clip_grad_norm_(p, 0.2) for p in model.parameters()],
}


@pytest.fixture(autouse=True)
def plain(compiled_kernels):
    yield
    assert observers._observers == [], "a monitor was not closed"


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), fastnorm.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))


def train(model, optimizer, steps, clip=lambda model, optimizer: None, change=None, zero=True):
    """Yields after each step. change(i): what happens to the gradients of step i before the clip."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        optimizer.zero_grad(set_to_none=zero)
        model(torch.randn(16, 6, generator=generator)).square().mean().backward()
        if change is not None:
            change(i)
        clip(model, optimizer)
        optimizer.step()
        yield i


def norm(tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


@pytest.mark.parametrize("name", CLIPS)
def test_values(name):
    """Against what hooks see that were registered around the monitor's."""
    clip, seen = CLIPS[name], []
    if clip is None:

        def clip(model, optimizer):
            with fastnorm.patch_torch_clip():
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)

    def before_clip(_):
        # a clip out of sight has changed the gradients when the monitor reads them
        copies = model if name != "torch's" else copy.deepcopy(model)
        for mine, p in zip(copies.parameters(), model.parameters(), strict=True):
            mine.grad = p.grad
        if name == "torch's":
            for p in copies.parameters():
                p.grad = p.grad.clone()
            torch.nn.utils.clip_grad_norm_(copies.parameters(), 0.5)
        seen.append({n: (norm(p.grad), p.detach().clone()) for n, p in copies.named_parameters()})

    with fastnorm.Monitor(model, optimizer, updates_every=2) as monitor:
        for i in train(model, optimizer, 5, clip, before_clip):
            last = monitor.last()
            assert last["step"] == i
            expected = {n: gradient for n, (gradient, _) in seen[i].items()}
            assert last["gradient_norm"] == pytest.approx(expected, rel=1e-5)
            assert set(last["nonfinite"].values()) == {0.0}
            total = math.sqrt(sum(x * x for x in expected.values()))
            if name == "infinity norm":
                total = last["total_norm"]
                assert 0 < total < max(expected.values())
            assert last["total_norm"] == pytest.approx(total, rel=1e-5)
            if name in ("none", "torch's"):
                assert last["coefficient"] is last["threshold"] is None and not last["clipped"]
            elif name in ("by layer", "groups"):
                values = list(expected.values())
                largest = max(values) if name == "by layer" else max(math.hypot(*values[:2]), math.hypot(*values[2:]))
                coefficient = min(1.0, 0.2 / (largest + 1e-6))
                assert last["coefficient"] == pytest.approx(coefficient, rel=1e-5)
                assert last["threshold"] == pytest.approx(0.2)
            else:
                threshold = 0.05 if name == "infinity norm" else 0.5
                assert last["threshold"] == pytest.approx(threshold)
                assert last["coefficient"] == pytest.approx(min(1.0, threshold / (total + 1e-6)), rel=1e-5)
                assert last["clipped"] == (total > threshold)
            if i % 2:
                assert last["weight_norm"] == last["update_ratio"] == {}
            else:
                weights = {n: norm(w) for n, (_, w) in seen[i].items()}
                moved = {n: norm(p.detach() - seen[i][n][1]) for n, p in model.named_parameters()}
                assert last["weight_norm"] == pytest.approx(weights, rel=1e-5)
                for n, ratio in last["update_ratio"].items():
                    expected = moved[n] / weights[n] if weights[n] else math.inf
                    assert ratio == pytest.approx(expected, rel=1e-3)
    assert all(total > 0 for total in monitor.to_numpy()["total_norm"])


def count_reads(monkeypatch) -> list[int]:
    """How many tensors the monitor reads itself, at each measurement."""
    from fastnorm.monitor import measurements

    reads, stock = [], measurements._norms
    monkeypatch.setattr(measurements, "_norms", lambda tensors: reads.append(len(tensors)) or stock(tensors))
    return reads


def test_no_gradient_is_read_twice(monkeypatch):
    reads = count_reads(monkeypatch)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    with fastnorm.Monitor(model, optimizer, updates_every=100):
        for clip, expected in (("clip_grad_norm_", []), ("in optimizer", []), ("none", [6]), ("with norm", [6])):
            run = train(model, optimizer, 2, CLIPS[clip])
            next(run)
            reads.clear()
            next(run)
            assert reads == expected, clip
        head = list(model[3].parameters())
        list(train(model, optimizer, 1, lambda *_: fastnorm.clip_grad_norm_(head, 1.0)))
        assert reads[-1] == 4


@pytest.mark.parametrize("zero", [True, False])
def test_a_clip_counts_for_its_own_step_only(zero):
    """The second step has no clip; the third begins with a clip of gradients that are then thrown away."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def clip(model, optimizer):
        if calls[0] == 0:
            fastnorm.clip_grad_norm_(model.parameters(), 0.5)
        if calls[0] == 2:
            fastnorm.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.zero_grad(set_to_none=zero)
            model(torch.ones(2, 6)).sum().backward()
        calls[0] += 1

    calls = [0]
    with fastnorm.Monitor(model, optimizer) as monitor:
        for i in train(model, optimizer, 3, clip, zero=zero):
            assert (monitor.last()["threshold"] is not None) == (i == 0)
            expected = {n: norm(p.grad) for n, p in model.named_parameters()}
            if i:
                assert monitor.last()["gradient_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("in_optimizer", [False, True])
def test_of_two_clips_the_last_counts(in_optimizer):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)

    def clip(model, optimizer):
        for threshold in (0.25, 0.5):
            if in_optimizer:
                totals.append(fastnorm.clip_grad_norm_in_optimizer(optimizer, threshold).item())
            else:
                totals.append(fastnorm.clip_grad_norm_(model.parameters(), threshold).item())

    totals = []
    with fastnorm.Monitor(model, optimizer) as monitor:
        list(train(model, optimizer, 1, clip))
        last = monitor.last()
    assert (last["total_norm"], last["threshold"]) == (pytest.approx(totals[1]), 0.5)
    assert last["coefficient"] == pytest.approx(min(1.0, 0.5 / (totals[1] + 1e-6)))


def test_other_models_clips_are_ignored():
    model, other = small_model(), small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other(torch.ones(2, 6)).sum().backward()
    with fastnorm.Monitor(model, optimizer) as monitor:
        list(train(model, optimizer, 1, lambda *_: fastnorm.clip_grad_norm_(other.parameters(), 1.0)))
        assert monitor.last()["threshold"] is None and len(monitor.last()["gradient_norm"]) == 6
        # one clip of both: the total norm is that of the clip
        both = lambda *_: fastnorm.clip_grad_norm_([*model.parameters(), *other.parameters()], 1.0)  # noqa: E731
        seen = []
        next(train(model, optimizer, 1, both, lambda i: seen.extend(norm(p.grad) for p in model.parameters())))
        assert list(monitor.last()["gradient_norm"].values()) == pytest.approx(seen)
        alone = math.sqrt(sum(x * x for x in monitor.last()["gradient_norm"].values()))
        assert monitor.last()["total_norm"] > 1.01 * alone and monitor.last()["threshold"] == 1.0


@pytest.mark.parametrize("name", ["clip_grad_norm_", "in optimizer", "with norm", "groups"])
def test_other_models_clips_read_none_of_the_gradients(name, monkeypatch):
    """Another thread may write them meanwhile, in its backward pass."""
    model, other = small_model(), small_model()
    optimizer = torch.optim.AdamW(other.parameters(), 0.05, fused=True)
    with fastnorm.Monitor(model):
        monkeypatch.setattr(measurements, "_GRAD", pytest.fail)
        list(train(other, optimizer, 1, CLIPS[name]))


@pytest.mark.parametrize("deferred", [False, True])
def test_clip_policies(deferred):
    """Their thresholds move on the device: AdaGC has a coefficient for each gradient, SpikeSkip skips steps."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=True)
    policy = fastnorm.SpikeSkip(factor=3.0, warmup=2) if deferred else fastnorm.AdaGC(warmup=2, lambda_rel=0.9)
    expected = []

    def clip(model, optimizer):
        before = [norm(p.grad) for p in model.parameters()]
        if deferred:
            fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
        else:
            fastnorm.clip_grad_norm_(model.parameters(), policy)
        after = [norm(p.grad) for p in model.parameters()]
        factors = [b / a for a, b in zip(before, after, strict=True)]
        expected.append((before, min(factors), policy.threshold, policy.skipped))

    with fastnorm.Monitor(model, optimizer) as monitor:
        for i in train(model, optimizer, 6, clip, lambda i: i == 4 and model[0].weight.grad.mul_(1e3)):
            before, smallest, threshold, skipped = expected[i]
            last = monitor.last()
            assert list(last["gradient_norm"].values()) == pytest.approx(before, rel=1e-5)
            assert last["threshold"] == pytest.approx(threshold)
            assert last["coefficient"] == pytest.approx(1.0 if deferred else min(smallest, 1.0), rel=1e-4)
            assert last["skipped"] == (deferred and i == 4) and skipped == (deferred and i >= 4)
        if not deferred:
            assert monitor.to_numpy()["clipped"][2:].all() and monitor.to_numpy()["coefficient"][4] < 0.01


@pytest.mark.parametrize(
    "groups", [lambda name: name.split(".")[0], {"0.weight": "0", "0.bias": "0", "3.bias": "last"}]
)
def test_groups(groups):
    model = small_model()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grads = {}

    def change(i):
        grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model[0].bias.grad[0] = grads["0.bias"][0] = math.inf if i else 1.0

    with fastnorm.Monitor(model, optimizer, groups=groups, updates_every=1) as monitor:
        run = train(model, optimizer, 2, change=change)
        before = copy.deepcopy(model)
        next(run)
        first = monitor.last()
        joined = lambda *names: norm(torch.cat([grads[n].flatten() for n in names]))  # noqa: E731
        assert first["gradient_norm"]["0"] == pytest.approx(joined("0.weight", "0.bias"), rel=1e-5)
        weights = [p.detach().flatten() for p in before[0].parameters()]
        moved = [a.detach().flatten() - b for a, b in zip(model[0].parameters(), weights, strict=True)]
        ratio = norm(torch.cat(moved)) / norm(torch.cat(weights))
        assert first["update_ratio"]["0"] == pytest.approx(ratio, rel=1e-4)
        bias = norm(grads["3.bias"])
        next(run)
        assert monitor.last()["nonfinite"]["0"] == 1.0 and monitor.last()["gradient_norm"]["0"] == math.inf
        assert monitor.last()["spike"] == math.inf
        if callable(groups):
            assert monitor.names == ("0", "1", "3")
            assert first["gradient_norm"]["3"] == pytest.approx(bias, rel=1e-5)
        else:
            assert monitor.names == ("0", "1.weight", "1.bias", "3.weight", "last")
            assert "3.weight" not in first["gradient_norm"] and "3.weight" not in first["weight_norm"]
            assert math.isnan(monitor.to_numpy()["gradient_norm"][0, 3])


def test_groups_know_all_names_of_a_tied_parameter():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    for groups in ({"b.weight": "tied"}, {"a.weight": "tied", "b.weight": "other"}):
        with fastnorm.Monitor(model, groups=groups) as monitor:
            assert monitor.names == ("tied", "a.bias", "b.bias")


def test_frozen_tied_sparse_and_unused_parameters():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4, sparse=True), "a": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model["b"] = nn.Linear(4, 4, bias=False)
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor:
        assert monitor.names == ("embed.weight", "a.weight", "a.bias", "unused.weight", "unused.bias")
        model["b"](model["a"](model["embed"](torch.tensor([1, 1, 4])))).sum().backward()
        optimizer.step()
        last = monitor.last()
        dense = model["embed"].weight.grad.to_dense()
    expected = {"embed.weight": norm(dense), "a.weight": norm(model["a"].weight.grad)}
    assert last["gradient_norm"] == pytest.approx(expected)
    assert set(last["weight_norm"]) == set(monitor.names) - {"a.bias"}
    assert last["update_ratio"]["unused.weight"] == 0


def test_steps_without_gradients_and_empty_monitors():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor:
        assert monitor.last() == {} and monitor.report() == "nothing was recorded yet"
        assert monitor.to_numpy()["gradient_norm"].shape == (0, 6)
        optimizer.step()
        assert monitor.last()["gradient_norm"] == {} and monitor.last()["total_norm"] == 0
        assert "no gradients" in monitor.report()


def test_ring_and_every():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, every=3, keep=4, updates_every=5, first_step=100) as monitor:
        list(train(model, optimizer, 20, CLIPS["clip_grad_norm_"]))
        found = monitor.to_numpy()
        sizes = [len(pickle.dumps(list(monitor._rows)))]
        list(train(model, optimizer, 40, CLIPS["clip_grad_norm_"]))
        assert len({id(part.where) for row in monitor._rows for part in row.parts if len(part.where) > 1}) == 1
        assert len(monitor._rows) == 4 and not monitor._transfer.staged and not monitor._transfer.in_flight
        sizes.append(len(pickle.dumps(list(monitor._rows))))
    assert found["step"].tolist() == [108, 111, 114, 117]
    # updates at 102, 108 and 114: recorded steps, at least five apart
    assert [*map(math.isnan, found["update_ratio"][:, 0])] == [False, True, False, True]
    assert sizes[1] < 1.2 * sizes[0]


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = fastnorm.AddRMSNorm(6), nn.ReLU(inplace=True)
        self.batch = fastnorm.BatchNorm1d(6)

    def forward(self, x):
        y, h = self.norm(x, x)
        return self.batch(input=self.act(y)) + h


def test_inputs_of_norms_and_zeros():
    model = Shortcut()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, updates_every=2, dead_neurons=True) as monitor:
        assert (monitor.norm_names, monitor.layer_names) == (("norm", "batch"), ("act",))
        inputs = [torch.randn(5, 6) * scale for scale in (1, 10)]
        y = [torch.relu(nn.functional.rms_norm(2 * x, (6,), model.norm.weight)).detach() for x in inputs]
        for x in inputs:  # gradient accumulation
            model(x).sum().backward()
        with torch.no_grad():
            model(inputs[0] * 1e6)
        optimizer.step()
        last = monitor.last()
        rms = lambda x: x.double().square().mean().sqrt().item()  # noqa: E731
        expected = {"norm": rms(2 * torch.cat(inputs)), "batch": rms(torch.cat(y))}
        assert last["input_rms"] == pytest.approx(expected, rel=1e-5)
        assert last["zero_share"] == {"act": pytest.approx((torch.cat(y) == 0).double().mean().item())}
        model(inputs[0]).sum().backward()
        optimizer.step()
        assert monitor.last()["input_rms"] == monitor.last()["zero_share"] == {}
        optimizer.step()
        assert monitor.last()["input_rms"] == {}, "nothing ran since"
    assert not any(m._forward_hooks for m in model.modules())


def test_a_plain_loop():
    model = small_model()
    weights = []
    with fastnorm.Monitor(model, updates_every=2) as monitor:
        for i in range(4):
            model.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            fastnorm.clip_grad_norm_(model.parameters(), 0.3)
            weights.append([p.detach().clone() for p in model.parameters()])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            monitor.step()
            assert monitor.last()["step"] == i and monitor.last()["threshold"] == pytest.approx(0.3)
            if i == 2:
                moved = [norm(p.detach() - w) / norm(w) for p, w in zip(model.parameters(), weights[-1], strict=True)]
                assert list(monitor.last()["update_ratio"].values()) == pytest.approx(moved, rel=1e-4)
            else:
                assert monitor.last()["update_ratio"] == {}
            assert set(monitor.last()["input_rms"]) == ({"1"} if i % 2 == 0 else set())


def test_unfreezing_between_two_steps():
    """One layer frozen and one of the same shape unfrozen, as in training layer by layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    with fastnorm.Monitor(model, updates_every=1) as monitor:
        monitor.step()
        model[0].requires_grad_(False)
        model[1].requires_grad_(True)
        monitor.step()
        assert monitor.last()["update_ratio"] == {"0.weight": 0, "0.bias": 0}
        monitor.step()
        assert monitor.last()["update_ratio"] == {"1.weight": 0, "1.bias": 0}


def test_closures_compute_gradients_inside_the_step():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6)).square().mean()
        loss.backward()
        norms.append(fastnorm.clip_grad_norm_(model.parameters(), 0.1).item())
        return loss

    with fastnorm.Monitor(model, optimizer) as monitor:
        for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
            call()
            assert monitor.last()["total_norm"] == pytest.approx(norms[-1]) and monitor.last()["threshold"] is not None


def test_skipped_steps_and_scaled_gradients():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    with fastnorm.Monitor(model, optimizer) as monitor:
        clip, change = CLIPS["in optimizer"], lambda i: i == 1 and model[3].bias.grad.fill_(math.nan)
        skipped = [monitor.last()["skipped"] for _ in train(model, optimizer, 3, clip, change)]
        assert skipped == [False, True, False]
        assert "skipped 1 of 3 steps: 1" in monitor.report()
        # a GradScaler leaves it to the fused step to divide by its scale
        model.zero_grad()
        model(torch.ones(4, 6)).sum().backward()
        expected = {n: norm(p.grad) for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad *= 64
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)
        optimizer.step()
        assert monitor.last()["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def explosion(factor):
    """A training in which one layer's gradient explodes at step 25, and a little of that of the layer before."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def change(i):
        if i == 25:
            model[1][0].weight.grad.mul_(factor**0.9)
            model[2][0].weight.grad.mul_(factor)

    return model, optimizer, train(model, optimizer, 30, CLIPS["clip_grad_norm_"], change)


@pytest.mark.parametrize(
    ("factor", "flag", "number"),
    [(1e6, "exploding", "e+0"), (1e-9, "vanishing", "e-1"), (math.nan, "non-finite", "nan")],
)
def test_report_names_layer_and_step(factor, flag, number):
    spikes = []
    model, optimizer, run = explosion(factor)
    with fastnorm.Monitor(model, optimizer, on_spike=spikes.append) as monitor:
        for i in run:
            assert bool(spikes) == (i >= 25 and flag != "vanishing")
        report = monitor.report()
    line = next(line for line in report.splitlines() if line.startswith(flag))
    assert line.startswith(f"{flag} first at step 25: 2.0.weight (norm ") and number in line, report
    assert "), and 1 more; in " in line
    if flag != "non-finite":  # whose clip makes all weights NaN
        assert "in 1 of 30 steps" in line and "last step: " in report.splitlines()[-1]
    if flag == "exploding":
        assert spikes[0]["step"] == 25 and spikes[0]["spike"] > 100
        assert "1 spike, a total norm above 5 × the median: step 25 (" in report
        assert "update ratios |Δw|/|w| at step 20: from " in report


def test_report_of_a_first_step():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with fastnorm.Monitor(model, optimizer, first_step=7) as monitor:
        list(train(model, optimizer, 1, lambda m, o: fastnorm.clip_grad_norm_(m.parameters(), 1e-4)))
        assert monitor.report().startswith("1 step recorded, step 7: total norm ")
        assert "clipped 1 of 1 steps" in monitor.report() and "safety net" not in monitor.report()


@pytest.mark.parametrize("place", [0, -1])
def test_a_clip_counts_for_the_gradients_that_it_measured(place):
    """One that changed after it, wherever it is in the list, makes the row that of the gradients at the step."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def clip_and_change(model, optimizer):
        fastnorm.clip_grad_norm_(model.parameters(), 1e3)
        list(model.parameters())[place].grad.mul_(100).add_(1)

    with fastnorm.Monitor(model, optimizer) as monitor:
        for _ in train(model, optimizer, 1, clip_and_change):
            expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            assert monitor.last()["total_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_report_of_a_threshold_that_always_clips():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with fastnorm.Monitor(model, optimizer) as monitor:
        list(train(model, optimizer, 12, lambda m, o: fastnorm.clip_grad_norm_(m.parameters(), 1e-4)))
        assert "clipped 12 of 12 steps (100%), the smallest coefficient is " in monitor.report()
        assert "no safety net" in monitor.report() and "last step: healthy" in monitor.report()
    with fastnorm.Monitor(model, optimizer) as monitor:
        list(train(model, optimizer, 2))
        assert "no clip of fastnorm counted" in monitor.report()
        assert "exploding first at step 0: " in monitor.report(exploding_above=1e-3)
        for bounds in ({"vanishing_below": 2.0, "exploding_above": 1.0}, {"ratio_above": 0.5}):
            with pytest.raises(ValueError, match=next(iter(bounds))):
                monitor.report(**bounds)


def test_errors_of_on_spike_come_out_of_the_step():
    model, optimizer, run = explosion(1e6)

    def stop(row):
        raise StopIteration(row["step"])

    with fastnorm.Monitor(model, optimizer, on_spike=stop) as monitor:
        with pytest.raises(RuntimeError, match="generator raised StopIteration"):
            list(run)
        assert monitor.last()["step"] == 25


def test_csv_and_jsonl(tmp_path):
    model, optimizer, run = explosion(math.inf)
    with fastnorm.Monitor(model, optimizer, dead_neurons=(nn.Tanh,)) as monitor:
        for _ in run:
            pass
        monitor.to_csv(tmp_path / "rows.csv")
        monitor.to_jsonl(str(tmp_path / "rows.jsonl"))
        found = monitor.to_numpy()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "rows.jsonl").open()]
    table = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [line["step"] for line in lines] == [int(row["step"]) for row in table] == found["step"].tolist()
    assert lines[25]["gradient_norm"]["2.0.weight"] is None and lines[25]["nonfinite"]["2.0.weight"] == 1
    assert table[25]["gradient_norm/2.0.weight"] == "inf" and table[25]["clipped"] == "1"
    names = {"input_rms": monitor.norm_names, "zero_share": monitor.layer_names}
    for series in ("gradient_norm", "nonfinite", "weight_norm", "update_ratio", "zero_share"):
        for column, name in enumerate(names.get(series, monitor.names)):
            for row in range(25):
                expected = found[series][row, column]
                text, number = table[row][f"{series}/{name}"], lines[row][series].get(name)
                if math.isnan(expected):
                    assert text == "" and number is None
                else:
                    assert float(text) == expected and number == (expected if math.isfinite(expected) else None)
    assert float(table[3]["total_norm"]) == lines[3]["total_norm"] == found["total_norm"][3]
    assert bool(int(table[3]["clipped"])) == lines[3]["clipped"] == found["clipped"][3]


def test_tensorboard_gets_each_row_once():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, number, step):
            self.scalars.append((tag, number, step))

    writer = Writer()
    with fastnorm.Monitor(model, optimizer) as monitor:
        for _ in train(model, optimizer, 3, CLIPS["clip_grad_norm_"]):
            monitor.to_tensorboard(writer, "run/", wait=False)
        monitor.to_tensorboard(writer, "run/")
        totals = [(step, number) for tag, number, step in writer.scalars if tag == "run/total_norm"]
        assert totals == list(zip(range(3), monitor.to_numpy()["total_norm"], strict=True))
        tags = {tag for tag, _, step in writer.scalars if step == 1}
        assert tags == {f"run/{key}" for key in ("total_norm", "coefficient", "threshold", "clipped", "skipped")} | {
            f"run/{series}/{name}" for series in ("gradient_norm", "nonfinite") for name in monitor.names
        }
        other = Writer()
        monitor.to_tensorboard(other)
        assert len(other.scalars) == len(writer.scalars) and other.scalars[0][0] == "fastnorm/total_norm"


def test_any_writer_will_do():
    """One without weak references or a hash, too."""
    model, written = small_model(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    writer = types.SimpleNamespace(add_scalar=lambda tag, number, step: written.append((tag, step)))
    with fastnorm.Monitor(model, optimizer) as monitor:
        for _ in train(model, optimizer, 3):
            monitor.to_tensorboard(writer)
    assert [step for tag, step in written if tag == "fastnorm/total_norm"] == [0, 1, 2]


def test_plot(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    for factor in (1e6, math.nan, 0.0):
        model, optimizer, run = explosion(factor)
        with fastnorm.Monitor(model, optimizer, keep=20) as monitor:
            assert monitor.plot(figure.Figure()).axes
            for _ in run:
                pass
            own = figure.Figure()
            assert monitor.plot(own) is own
        totals, heat, _bar = own.axes
        assert totals.get_yscale() == "log"
        own.canvas.draw()
        (grid,) = heat.collections
        values = grid.get_array()
        assert values.shape == (10, 20) and [t.get_text() for t in heat.get_yticklabels()] == list(monitor.names)
        labels = totals.get_legend_handles_labels()[1]
        assert {"total norm", "threshold", "clipped"} <= set(labels) and ("spike" in labels) == (factor != 0)
        worst = values[monitor.names.index("2.0.weight")]
        assert worst.argmax() == 15 if factor == 1e6 else values.mask[monitor.names.index("2.0.weight"), 15]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Monitor\.plot needs matplotlib"):
        monitor.plot()


class FakeEvent:
    """Stands for a device's event: its copy ends when the test says so."""

    made: ClassVar[list["FakeEvent"]] = []

    def __init__(self, device=None):
        self.is_done, self.waited = False, False
        self.made.append(self)

    def record(self):
        pass

    def query(self):
        return self.is_done

    def synchronize(self):
        self.waited = not self.is_done
        self.is_done = True


@pytest.fixture
def slow_device(monkeypatch):
    """Copies to the host that take their time, of CPU tensors; yields their events."""
    monkeypatch.setattr(FakeEvent, "made", [])

    def start_copy(values):
        assert values.dim() == 1
        return FakeEvent(), values.clone()

    def put(self, row):
        self.staged.append(row)
        if len(self.staged) >= self.flush_every:
            self.flush()

    monkeypatch.setattr(rows, "start_copy", start_copy)
    monkeypatch.setattr(rows.Transfer, "put", put)
    return FakeEvent.made


def test_rows_arrive_when_the_device_gets_there(slow_device):
    spikes = []
    model, optimizer, run = explosion(1e6)
    with fastnorm.Monitor(model, optimizer, flush_every=4, keep=25, on_spike=spikes.append) as monitor:
        expected = []
        for i in run:
            expected.append(monitor._transfer.staged[-1].values.clone() if (i + 1) % 4 else None)
            assert len(slow_device) == (i + 1) // 4
            if i == 10:
                assert monitor.last(wait=False) == {} and not any(event.waited for event in slow_device)
                slow_device[0].is_done = True
                assert monitor.last(wait=False)["step"] == 3
            if i == 27:
                for event in slow_device:
                    event.is_done = True
                assert spikes == [], "it arrives with the next step"
        assert [row["step"] for row in spikes] == [25]
        assert not any(event.waited for event in slow_device), "the steps wait for nothing"
        found = monitor.to_numpy()
        assert len(slow_device) == 8 and slow_device[-1].waited
        assert found["step"].tolist() == list(range(5, 30)) and found["total_norm"].argmax() == 20
        for row in monitor._rows:
            if expected[row.step] is not None:
                assert torch.equal(row.values, expected[row.step])


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_never_waited_for(monkeypatch):
    """With tensors that only claim to lie on a GPU: what would read one raises, and every copy is non-blocking."""
    model = nn.Sequential(nn.Linear(6, 8), fastnorm.RMSNorm(8), nn.ReLU(), nn.Linear(8, 1))
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", [])
    empties, stock = [], torch.empty

    def empty(*args, pin_memory=False, **kwargs):  # there is no GPU to pin it for
        empties.append(pin_memory)
        return stock(*args, **kwargs)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, fastnorm.use(None):
        fake = copy.deepcopy(model)
        for module in fake.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                on_gpu = nn.Parameter(torch.empty(p.shape, device="cuda"))
                setattr(module, name, on_gpu)
        optimizer = torch.optim.AdamW(fake.parameters(), fused=True)
        monitor = fastnorm.Monitor(fake, optimizer, updates_every=2, flush_every=3, dead_neurons=True)
        monkeypatch.setattr(torch, "empty", empty)
        for i in range(7):
            for p in fake.parameters():
                p.grad = torch.ones(p.shape, device="cuda")
            if i == 3:
                optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
            if i == 4:
                del optimizer.grad_scale, optimizer.found_inf
                fastnorm.clip_grad_norm_(fake.parameters(), 1.0)
            with Recorder() as recorder:
                monitor._watch.layers and _forward_hooks(fake)
                monitor._before_step(optimizer, (optimizer,), {})
                monitor._after_step(optimizer, (optimizer,), {})
            for function, args, kwargs in recorder.calls:
                assert function is not torch.ops.aten._local_scalar_dense.default
                if function is torch.ops.aten._to_copy.default:
                    assert kwargs.get("device") in (None, args[0].device)
                if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
                    assert args[0].device.type == "cpu" and args[2] is True
        assert mode is not None and len(FakeEvent.made) == 2 and not any(event.waited for event in FakeEvent.made)
        assert empties.count(True) == 2
        monitor.close()


def _forward_hooks(model):
    """Runs the hooks as a forward pass would: FakeTensors on a missing GPU have no autograd."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            x = torch.ones(4, 8, device="cuda")
            hook(module, (x,), {}, x)


def test_a_captured_step_is_refused(monkeypatch):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor:
        monkeypatch.setattr(package, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="a CUDA graph captures"):
            list(train(model, optimizer, 1))
        assert monitor.last() == {}


def test_close_and_the_end_of_a_block():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = fastnorm.Monitor(model, optimizer, dead_neurons=True)
    assert any(m._forward_hooks for m in model.modules()) and optimizer._optimizer_step_pre_hooks
    list(train(model, optimizer, 2))
    monitor.close()
    monitor.close()
    assert not any(m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert observers._observers == []
    list(train(model, optimizer, 2, CLIPS["clip_grad_norm_"]))
    assert monitor.last()["step"] == 1 and len(monitor.to_numpy()["step"]) == 2
    with pytest.raises(ZeroDivisionError), fastnorm.Monitor(model, optimizer):
        raise ZeroDivisionError
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_that_raises_leaves_no_row():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor:
        handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(train(model, optimizer, 1))
        handle.remove()
        optimizer.step(lambda: model(torch.full((3, 6), 1e3)).sum().backward())
        found = monitor.to_numpy()
        assert found["step"].tolist() == [0] and found["total_norm"][0] == pytest.approx(
            math.sqrt(sum(norm(p.grad) ** 2 for p in model.parameters()))
        )


def test_nothing_is_kept_alive_and_no_copy_of_the_model_reports():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = fastnorm.Monitor(model, optimizer, updates_every=1)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert [hook.watch for hook in other[1]._forward_hooks.values()] == [None]
        other(torch.full((3, 6), 1e6)).sum().backward()
    list(train(model, optimizer, 3))
    assert all(rms < 100 for rms in monitor.last()["input_rms"].values())
    # a training goes on alike from a checkpoint, which knows nothing of the monitor
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert optimizer.state_dict().keys() == torch.optim.SGD(small_model().parameters(), 0.1).state_dict().keys()
    gone = [weakref.ref(x) for x in (model, monitor, optimizer, next(model.parameters()))]
    del model, monitor, optimizer, copied, pickled, other
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_module_with_its_monitor_can_be_copied(copied):
    """As a LightningModule has it. The copy's monitor has the rows, and records nothing."""
    module = nn.Module()
    module.model = model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, dead_neurons=True, on_spike=lambda row: None) as monitor:
        module.monitor = monitor
        list(train(model, optimizer, 3, CLIPS["clip_grad_norm_"]))
        model(torch.ones(2, 6)).sum().backward()
        fastnorm.clip_grad_norm_(model.parameters(), 0.1)
        other = copied(module)
        fastnorm.clip_grad_norm_(other.model.parameters(), 0.1)
        optimizer.step()
        assert other.monitor.last()["step"] == 2 and other.monitor.names == monitor.names
        other.monitor.close()
        list(train(model, optimizer, 1, CLIPS["clip_grad_norm_"]))
        assert monitor.last()["step"] == 4 and monitor.last()["threshold"] == 0.5
        assert other.monitor.report().startswith("3 steps recorded, 0 to 2")


def test_training_is_unchanged():
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), 0.05, fused=True)
        if watched:
            monitor = fastnorm.Monitor(model, optimizer, updates_every=1, dead_neurons=True)
        list(train(model, optimizer, 5, CLIPS["in optimizer"]))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    monitor.close()
    assert torch.equal(*results)


def test_the_default_device_is_ignored():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.device("meta"), fastnorm.Monitor(model, optimizer, dead_neurons=True) as monitor:
        for _ in range(2):
            model(torch.ones(4, 6, device="cpu")).sum().backward()
            fastnorm.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        assert monitor.to_numpy()["update_ratio"][0].min() >= 0 and "last step" in monitor.report()
        assert len(monitor.last()["gradient_norm"]) == 0


def test_bfloat16_and_float64():
    for dtype, tolerance in ((torch.bfloat16, 1e-5), (torch.float64, 1e-12)):
        model = nn.Linear(6, 2, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with fastnorm.Monitor(model, optimizer) as monitor:
            model.weight.grad = torch.randn(2, 6).to(dtype)
            before = model.weight.detach().clone()
            optimizer.step()
            last = monitor.last()
        assert last["gradient_norm"] == {"weight": pytest.approx(norm(model.weight.grad), rel=tolerance)}
        ratio = norm(model.weight.detach().double() - before.double()) / norm(before)
        assert last["update_ratio"]["weight"] == pytest.approx(ratio, rel=max(tolerance, 1e-2 * (dtype.itemsize == 2)))


def test_compiled_models_and_clips(fresh_dynamo):
    """A compiled forward is not measured, and breaks no graph."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer) as monitor:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.randn(4, 6)).sum().backward()
        with fastnorm.use("reference"):
            torch.compile(fastnorm.clip_grad_norm_, backend="eager", fullgraph=True)(list(model.parameters()), 1.0)
        optimizer.step()
        assert monitor.last()["input_rms"] == {} and len(monitor.last()["gradient_norm"]) == 6


def test_compiled_steps(fresh_dynamo):
    """The hooks are not traced: one graph, and all rows."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    counter = CompileCounter()
    step, totals = torch.compile(optimizer.step, backend=counter), []
    with fastnorm.Monitor(model, optimizer, updates_every=2) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            totals.append(fastnorm.clip_grad_norm_(model.parameters(), 0.5).item())
            step()
        found = monitor.to_numpy()
    assert found["total_norm"].tolist() == totals and (found["update_ratio"][::2] > 0).all()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, r"model must be a torch\.nn\.Module, but got int"),
        ({"model": nn.ReLU()}, ValueError, "model: ReLU has no parameters"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer or None, but got int"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)}, ValueError, "optimizer has none of"),
        ({"every": 0}, ValueError, "every must be at least 1, but got 0"),
        ({"keep": 2.5}, TypeError, "keep must be an integer, but got float"),
        ({"updates_every": True}, TypeError, "updates_every must be an integer"),
        ({"flush_every": -1}, ValueError, "flush_every must be at least 1"),
        ({"first_step": -1}, ValueError, "first_step must be at least 0"),
        ({"spike_factor": 1}, ValueError, "spike_factor must be a number above 1, but got 1"),
        ({"spike_factor": "5"}, TypeError, "spike_factor must be a number above 1, but got str"),
        ({"spike_factor": math.nan}, ValueError, "spike_factor must be a number above 1"),
        ({"on_spike": "log"}, TypeError, "on_spike must be a function"),
        ({"groups": 3}, TypeError, "groups must be a dict or a function of names, but got int"),
        ({"groups": {"wait": "w"}}, ValueError, "groups: no parameter is called 'wait'"),
        ({"groups": lambda name: None}, TypeError, "groups must give names, but gave NoneType for '0.weight'"),
        ({"dead_neurons": 3}, TypeError, "dead_neurons must be True, False or a tuple of classes"),
        ({"dead_neurons": (nn.ReLU(),)}, TypeError, "dead_neurons must be True, False or a tuple of classes"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        fastnorm.Monitor(**{"model": model, **arguments})
    assert not any(m._forward_hooks for m in model.modules())


def test_step_is_for_loops_without_an_optimizer():
    model = small_model()
    with (
        fastnorm.Monitor(model, torch.optim.SGD(model.parameters(), 0.1)) as monitor,
        pytest.raises(RuntimeError, match=r"Monitor\.step\(\) is for loops without an optimizer"),
    ):
        monitor.step()


def test_wrapped_optimizers():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = types.SimpleNamespace(optimizer=optimizer)
    with fastnorm.Monitor(model, wrapper) as monitor:
        list(train(model, optimizer, 1))
        assert monitor.last()["step"] == 0
