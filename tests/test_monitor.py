"""fastnorm.Monitor: its numbers against plain computations, and that it changes, keeps and leaves nothing."""

import copy
import gc
import math
import pickle
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastnorm
from fastnorm import monitor as package
from fastnorm.clip import observers
from fastnorm.monitor import measurements
from helpers.monitored import CLIPS, every_monitor_closed, norm, small_model, train


@pytest.fixture(autouse=True)
def plain(compiled_kernels):
    with every_monitor_closed():
        yield


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
    reads, stock = [], measurements.norms_of
    monkeypatch.setattr(measurements, "norms_of", lambda tensors: reads.append(len(tensors)) or stock(tensors))
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
            assert set(monitor.last()["input_rms"]) == {"1"}


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


def replaced(model, how):
    state = {name: t.clone() + 1 for name, t in model.state_dict().items()}
    if how == "assign":
        model.load_state_dict(state, assign=True)
    elif how == "modules":
        model[0] = nn.Linear(6, 8)
    else:
        model[3].weight = nn.Parameter(torch.ones(1, 8))


@pytest.mark.parametrize("clip", ["none", "clip_grad_norm_"])
@pytest.mark.parametrize("how", ["assign", "modules", "parameter"])
def test_parameters_that_are_replaced_are_followed(how, clip):
    model = small_model()
    with fastnorm.Monitor(model, updates_every=1) as monitor:
        for i in range(4):
            if i == 2:
                old = list(model.parameters())
                replaced(model, how)
                assert not all(a is b for a, b in zip(old, model.parameters(), strict=True))
            model.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            expected = {name: norm(p.grad) for name, p in model.named_parameters()}
            CLIPS[clip](model, None)
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 1.01)
            monitor.step()
            last = monitor.last()
            assert last["gradient_norm"] == pytest.approx(expected, rel=1e-5)
            assert (last["threshold"] is None) == (clip == "none")
            if i == 2:
                assert last["update_ratio"] == {}, "a load is no update"
        weights = {name: norm(p) / 1.01 for name, p in model.named_parameters()}
        assert last["weight_norm"] == pytest.approx(weights, rel=1e-5)
        assert last["update_ratio"]["0.weight"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", ["none", "clip_grad_norm_"])
def test_an_optimizer_with_parameters_that_were_replaced(clip):
    """It trains nothing any longer, in silence."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, updates_every=1) as monitor:
        list(train(model, optimizer, 1, CLIPS[clip]))
        replaced(model, "assign")
        with pytest.warns(UserWarning, match=r"the optimizer doesn't train '0\.weight' and 5 more") as warned:
            list(train(model, optimizer, 3, CLIPS[clip]))
        assert len(warned) == 1
        last = monitor.last()
        assert all(n > 0 for n in last["gradient_norm"].values()) and len(last["gradient_norm"]) == 6
        assert set(last["update_ratio"].values()) == {0.0}


def test_an_optimizer_that_gets_the_new_parameters():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, updates_every=1) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced(model, "assign")
        optimizer.param_groups[0]["params"] = list(model.parameters())
        list(train(model, optimizer, 2))
        assert monitor.last()["update_ratio"]["0.weight"] > 0


def test_other_parameters_in_the_places_for_a_while():
    """As FSDP2 has whole ones in those of its shards: another type, or none at all."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    class Whole(nn.Parameter):
        pass

    def change(model, optimizer):
        mine = dict(model[0]._parameters)
        model[0]._parameters["weight"] = Whole(torch.ones(8, 6))
        del model[0]._parameters["bias"]
        fastnorm.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        model[0]._parameters.update(mine)

    with fastnorm.Monitor(model, optimizer) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        list(train(model, optimizer, 2, change))
        assert len(monitor.last()["gradient_norm"]) == 6 and monitor.last()["threshold"] == 0.5


def test_weights_that_are_tied_later_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with fastnorm.Monitor(model) as monitor:
        model[1].weight = model[0].weight
        model(torch.randn(2, 4)).sum().backward()
        monitor.step()
        assert set(monitor.last()["gradient_norm"]) == {"0.weight", "0.bias", "1.bias"}


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


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.plot("run.png"), r'figure must be a matplotlib Figure .* got str; .*savefig\("run\.png"\)'),
        (lambda m: m.to_csv(3), "path must be a file's path, a str or a pathlib.Path, but got int"),
        (lambda m: m.to_jsonl(None), "path must be a file's path, a str or a pathlib.Path, but got NoneType"),
        (lambda m: m.to_tensorboard("runs/1"), r"writer must have a method add_scalar\(tag, number, step\), .* str"),
        (lambda m: m.to_tensorboard(types.SimpleNamespace(add_scalar=print), 3), "prefix must be a str, but got int"),
        (lambda m: m.report(vanishing_below="0"), "vanishing_below must be a number, but got str"),
        (lambda m: m.report(ratio_above=None), "ratio_above must be a number, but got NoneType"),
    ],
)
def test_bad_arguments_of_what_reads(call, error):
    with fastnorm.Monitor(small_model()) as monitor, pytest.raises(TypeError, match=error):
        call(monitor)


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
