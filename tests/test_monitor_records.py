"""What fastnorm.Monitor makes of its rows: reports, tables, plots; and how they come to the host, without waiting."""

import contextlib
import copy
import csv
import io
import json
import math
import pickle
import sys
import types
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm.monitor import rows, watch
from fastnorm.ops import statistics
from helpers.environment import TORCH
from helpers.monitored import CLIPS, every_monitor_closed, small_model, train


@pytest.fixture(autouse=True)
def plain(compiled_kernels):
    with every_monitor_closed():
        yield


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
    with fastnorm.Monitor(model, optimizer, updates_every=20, on_spike=spikes.append) as monitor:
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    """The gradients of a linear map don't tell."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with fastnorm.Monitor(model, optimizer, updates_every=1) as monitor:
        for i in range(3):
            if i == 1:
                with torch.no_grad():
                    model.weight[0, 0] = value
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        last = monitor.last()
        assert last["weight_norm"]["weight"] == pytest.approx(value, nan_ok=True)
        assert math.isnan(last["update_ratio"]["weight"]) and math.isfinite(last["update_ratio"]["bias"])
        assert "weights not finite first at step 1: weight" in monitor.report().splitlines()


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
        } | {"run/input_rms/1"}
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


@pytest.mark.skipif(TORCH < (2, 11) and not torch.cuda.is_available(), reason="a CUDA leaf asks for the driver")
def test_a_gpu_is_never_waited_for(monkeypatch):
    """With tensors that only claim to lie on a GPU: what would read one raises, and every copy is non-blocking."""
    model = nn.Sequential(nn.Linear(6, 8), fastnorm.RMSNorm(8), nn.ReLU(), fastnorm.LayerNorm(8), nn.Linear(8, 1))
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(watch, "PLAIN", {FakeTensor})
    monkeypatch.setattr(watch, "_disable_current_modes", contextlib.nullcontext)  # FakeTensorMode stands for a GPU
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
                for _ in range(2):  # gradients are accumulated
                    _forward_hooks(fake, has_statistics=i != 2)
                assert len(monitor._watch._inputs) == (2 if i == 2 else 1)
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


def _forward_hooks(model, has_statistics):
    """Runs the hooks as a forward pass would: FakeTensors on a missing GPU have no autograd."""
    for module in model.modules():
        x, mean, rstd = torch.ones(4, 8, device="cuda"), *torch.ones(2, 4, device="cuda")
        for hook in module._forward_pre_hooks.values():
            hook(module, (x,), {})
        if has_statistics:
            statistics.tell(x, mean if isinstance(module, fastnorm.LayerNorm) else None, rstd, 1e-5)
        for hook in module._forward_hooks.values():
            hook(module, (x,), {}, x)
