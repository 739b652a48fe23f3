"""fastnorm.Monitor's numbers of the forward pass: the inputs of norms, and zeros."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastnorm
from fastnorm import backend
from fastnorm.convert import adapted
from fastnorm.convert.adapted import Modulated
from fastnorm.monitor import watch
from fastnorm.ops import statistics
from helpers import foreign_norms
from helpers.monitored import every_monitor_closed, small_model, train


@pytest.fixture(autouse=True)
def plain(compiled_kernels):
    with every_monitor_closed():
        yield


def rms(x) -> float:
    return x.double().square().mean().sqrt().item()


# What to give to each: the norm, and its inputs of the shape that it takes.
NORMS = {
    "rms_norm": (lambda: fastnorm.RMSNorm(24), (5, 7, 24)),
    "rms_norm, two dimensions": (lambda: fastnorm.RMSNorm((7, 24), eps=0.5), (5, 7, 24)),
    "layer_norm": (lambda: fastnorm.LayerNorm(24), (5, 7, 24)),
    "add_rms_norm": (lambda: fastnorm.AddRMSNorm(24, rounding="llama"), (5, 7, 24)),
    "add_layer_norm": (lambda: fastnorm.AddLayerNorm(24), (5, 7, 24)),
    "gated_rms_norm": (lambda: fastnorm.GatedRMSNorm(24, group_size=8), (5, 7, 24)),
    "gated_layer_norm": (lambda: fastnorm.GatedLayerNorm(24, activation="sigmoid"), (5, 7, 24)),
    "batch_norm": (lambda: fastnorm.BatchNorm2d(6, activation="relu"), (4, 6, 3, 5)),
    "batch_norm of rows": (lambda: fastnorm.BatchNorm1d(24, affine=False), (9, 24)),
    "group_norm": (lambda: fastnorm.GroupNorm(3, 6, activation="silu"), (4, 6, 3, 5)),
}
every_norm = pytest.mark.parametrize("name", NORMS)


class Model(nn.Module):
    """One norm behind a parameter. `given`: what the norm normalised in the last pass."""

    def __init__(self, name, dtype=torch.float32, device=None):
        super().__init__()
        self.first, self.norm = nn.Parameter(torch.ones((), dtype=dtype)), NORMS[name][0]().to(dtype)
        self.to(device)

    def forward(self, x):
        x = x * self.first
        if isinstance(self.norm, (fastnorm.GatedRMSNorm, fastnorm.GatedLayerNorm)):
            found = self.norm(x, torch.ones_like(x)), x
        else:
            found = self.norm(x, x.detach()) if isinstance(self.norm, watch.PAIRS) else (self.norm(x), x)
        self.given = found[1].detach()
        return found[0]


def inputs(name, dtype=torch.float32, device=None, scale=3.0, mean=0.0):
    return (torch.randn(NORMS[name][1]) * scale + mean).to(device, dtype)


def by_python(monkeypatch) -> None:
    """Every call goes the way of an installation without the extension."""
    monkeypatch.setattr(backend, "call_directly", lambda *_: NotImplemented)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_norm
def test_every_steps_input(name, dtype, device):
    """Also where no kernel is: then the input is read, at a step that reads."""
    model = Model(name, dtype, device)
    with fastnorm.Monitor(model, updates_every=3) as monitor:
        for i in range(4):
            model(inputs(name, dtype, device)).sum().backward()
            monitor.step()
            found = monitor.last()["input_rms"]
            if backend._forced == "reference" and i % 3:
                assert found == {}
            else:
                tolerance = 1e-12 if dtype == torch.float64 and i % 3 == 0 else 1e-5
                assert found == {"norm": pytest.approx(rms(model.given), rel=tolerance)}, i


@pytest.mark.parametrize(("scale", "mean"), [(1e-2, 100.0), (1e-4, 0.0), (1e4, 0.0), (0.0, 0.0)])
@every_norm
def test_unusual_inputs(name, scale, mean):
    """A mean far above the deviation; rows near eps and far above it; zeros."""
    model = Model(name)
    with fastnorm.Monitor(model, updates_every=3) as monitor:
        for _ in range(2):
            model(inputs(name, scale=scale, mean=mean)).sum().backward()
            monitor.step()
        # of the square, rounding loses 1e-6 · eps
        eps = 0.5 if "two" in name else 1e-5
        expected = pytest.approx(rms(model.given) ** 2, rel=1e-4, abs=1e-6 * eps)
        assert monitor.last()["input_rms"]["norm"] ** 2 == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_norm
def test_inputs_that_are_not_finite(name, value):
    model = Model(name)
    with fastnorm.Monitor(model, updates_every=3) as monitor:
        for _ in range(2):
            x = inputs(name)
            x.view(-1)[3] = value
            model(x).sum().backward()
            monitor.step()
        found = monitor.to_numpy()["input_rms"][1, 0]
        assert not found < 1e30


@pytest.mark.parametrize("cls", [fastnorm.GatedRMSNorm, fastnorm.GatedLayerNorm])
def test_a_gate_before_the_norm(cls, device):
    """Its statistics are those of x · act(gate), and tell nothing of x, which is read at a step that reads."""
    model = nn.Sequential(nn.Identity(), cls(24, norm_before_gate=False)).to(device)
    x, gate = (torch.randn(5, 24, device=device, requires_grad=True) for _ in range(2))
    with fastnorm.Monitor(model, updates_every=2) as monitor:
        for expected in ({"1": pytest.approx(rms(x.detach()), rel=1e-5)}, {}):
            model[1](x, gate).sum().backward()
            monitor.step()
            assert monitor.last()["input_rms"] == expected


@every_norm
def test_without_the_extension(name, monkeypatch):
    by_python(monkeypatch)
    model = Model(name)
    with fastnorm.Monitor(model, updates_every=3) as monitor:
        for _ in range(2):
            model(inputs(name)).sum().backward()
            monitor.step()
        assert monitor.last()["input_rms"] == {"norm": pytest.approx(rms(model.given), rel=1e-5)}


def test_listening_without_the_extension(monkeypatch):
    monkeypatch.setattr(backend, "_native", None)
    x = torch.ones(2)
    statistics.tell(x, None, x, 0.0)
    assert statistics.heard() is None, "nobody listened"
    statistics.listen()
    statistics.tell(x, None, x, 0.0)
    assert statistics.heard() == (2, None, x, 0.0)
    statistics.tell(x, None, x, 0.0)
    assert statistics.heard() is None
    statistics.listen()
    statistics.tell(x, None, x, 0.0)
    statistics.listen()
    assert statistics.heard() is None, "nothing was told since"


def test_several_passes_of_different_sizes():
    """Each counts by its elements, also those of a norm that misses one pass."""
    model = nn.ModuleDict({"lines": fastnorm.RMSNorm(6), "pictures": fastnorm.GroupNorm(2, 6)})
    given = {"lines": [], "pictures": []}
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        for step in range(2):
            for found in given.values():
                found.clear()
            for i in range(5):
                rows, images = torch.randn(2 + i, 6) * 2**i, torch.randn(2, 6, 1 + i, 3) + i
                for name, x in (("lines", rows), ("pictures", images)):
                    if (name, i) != ("pictures", step + 2):
                        model[name](x).sum().backward()
                        given[name].append(x.flatten())
            monitor.step()
            expected = {name: rms(torch.cat(found)) for name, found in given.items()}
            assert monitor.last()["input_rms"] == pytest.approx(expected, rel=1e-5)


def test_only_one_passes_statistics_are_kept():
    model = small_model()
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        for _ in range(3):
            model(torch.randn(50, 6)).sum().backward()
            kept = [found.rstd.numel() for found in monitor._watch._told.values()]
            assert kept == [50]
        (reduced,) = monitor._watch._inputs.values()
        assert reduced.lengths.numel() == 1
        monitor.step()
        assert not monitor._watch._told and not monitor._watch._inputs


@pytest.mark.parametrize("forward", ["whole", "raises"])
def test_no_graph_and_no_input_is_kept(forward):
    """The norm's output is dropped without a backward; or its forward raises after its statistics are there."""
    model = small_model()
    gone = []

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            gone.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx

    if forward == "raises":
        model[1].forward = lambda x: fastnorm.LayerNorm.forward(model[1], x) / None
    with fastnorm.Monitor(model):
        try:
            model[1](Inside.apply(torch.randn(5, 8, requires_grad=True)))
        except TypeError:
            assert forward == "raises"
        gc.collect()
        assert gone[0]() is None
        assert statistics.heard() is None, "nobody listens any longer"


def test_a_norm_that_computes_no_statistics_is_read():
    """One in evaluation, and one whose input and parameters need no gradients."""
    model = nn.Sequential(fastnorm.LayerNorm(6).requires_grad_(False), nn.Linear(6, 6), fastnorm.BatchNorm1d(6).eval())
    model[2].running_mean += 100
    x, seen = torch.randn(9, 6) + 3, []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with fastnorm.Monitor(model, updates_every=2) as monitor:
        for i in range(3):
            model(x).sum().backward()
            monitor.step()
            found = monitor.last()["input_rms"]
            expected = {"0": rms(x), "2": rms(seen[-1])} if i % 2 == 0 else {}
            assert found == pytest.approx(expected, rel=1e-5)


def test_inputs_by_name():
    """Of norms that are read, too."""
    model = nn.ModuleDict({"rms": fastnorm.RMSNorm(6), "layer": fastnorm.LayerNorm(6)})
    x = torch.randn(4, 6)
    with fastnorm.use("reference"), fastnorm.Monitor(model) as monitor:
        model["rms"](x=x).sum().backward()
        model["layer"](input=x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"rms": rms(x), "layer": rms(x)})


def test_other_hooks_may_change_the_output():
    model = small_model()
    model[1].register_forward_hook(lambda module, args, output: output.detach().clone().requires_grad_())
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        list(train(model, torch.optim.SGD(model.parameters(), 0.1), 1))
        monitor.step()
        model(torch.randn(4, 6)).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"].keys() == {"1"}


def test_calls_of_functions_are_no_module():
    """A norm that is called outside of modules, before a module that the formula serves."""
    model = nn.ModuleDict({"norm": fastnorm.LayerNorm(6)})
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        monitor.step()
        x = torch.randn(4, 6, requires_grad=True)
        fastnorm.functional.layer_norm(x * 100, (6,))
        with fastnorm.use("reference"):
            model["norm"](x)
        monitor.step()
        assert monitor.last()["input_rms"] == {}


def save_all(_, func, *arguments, **options):
    return CheckpointPolicy.MUST_SAVE


CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_all)
    ),
    "offloaded": None,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointing(kind):
    """The forward passes of a checkpoint are of the same input; none is run for the monitor."""
    model, runs = small_model(), []
    model[0].register_forward_hook(lambda module, args, output: runs.append(output.detach()))
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        for _ in range(2):
            seen = []
            for _ in range(2):  # gradients are accumulated
                x = torch.randn(5, 6, requires_grad=True)
                runs.clear()
                if CHECKPOINTS[kind] is None:
                    with torch.autograd.graph.save_on_cpu():
                        y = model(x)
                else:
                    y = CHECKPOINTS[kind](model, x)
                y.sum().backward()
                assert len(runs) == (1 if kind == "offloaded" else 2)
                seen.append(runs[0])
            monitor.step()
            assert monitor.last()["input_rms"] == {"1": pytest.approx(rms(torch.cat(seen)), rel=1e-5)}


def test_passes_without_gradients_are_not_seen():
    model = small_model()
    with fastnorm.Monitor(model) as monitor:
        with torch.no_grad():
            model(torch.randn(5, 6))
        monitor.step()
        assert monitor.last()["input_rms"] == {}


def test_only_recorded_steps_listen():
    model = small_model()
    with fastnorm.Monitor(model, every=3, updates_every=1) as monitor:
        for i in range(4):
            model(torch.full((5, 6), float(i))).sum().backward()
            monitor.step()
        model[0].bias.data.zero_()
        assert monitor.to_numpy()["step"].tolist() == [0, 3]
        model[0].weight.data.zero_()
        assert monitor.last()["input_rms"]["1"] > monitor.to_numpy()["input_rms"][0, 0]


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
        expected = {"norm": rms(2 * torch.cat(inputs)), "batch": rms(torch.cat(y))}
        assert last["input_rms"] == pytest.approx(expected, rel=1e-5)
        assert last["zero_share"] == {"act": pytest.approx((torch.cat(y) == 0).double().mean().item())}
        model(inputs[0]).sum().backward()
        optimizer.step()
        assert set(monitor.last()["input_rms"]) == {"norm", "batch"} and monitor.last()["zero_share"] == {}
        optimizer.step()
        assert monitor.last()["input_rms"] == {}, "nothing ran since"
    assert not any(m._forward_hooks for m in model.modules())


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


def test_two_monitors_hear_the_same():
    model, x = small_model(), torch.randn(4, 6)
    with fastnorm.Monitor(model, updates_every=10) as one, fastnorm.Monitor(model, updates_every=10) as other:
        for _ in range(2):
            model(x).sum().backward()
            one.step()
            other.step()
        assert one.last()["input_rms"] == other.last()["input_rms"] != {}
    assert statistics._slot.listeners == 0 and statistics._slot.told is None


def test_a_norm_of_another_module_within_a_call():
    """A hook calls it, after the listening to the outer norm has begun."""
    model = nn.ModuleDict({"outer": fastnorm.LayerNorm(6), "inner": fastnorm.RMSNorm(6)})
    x = torch.randn(4, 6)
    with fastnorm.Monitor(model, updates_every=10) as monitor:
        monitor.step()
        model["outer"].register_forward_pre_hook(lambda module, args: (100 * model["inner"](args[0]),))
        model["outer"](x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"inner": rms(x)}, rel=1e-5)


def test_hooks_that_were_there_before_may_call_norms():
    model, x = nn.Sequential(fastnorm.LayerNorm(6)), torch.randn(4, 6)
    model[0].register_forward_hook(lambda module, args, output: fastnorm.LayerNorm(6)(100 * output))
    with fastnorm.Monitor(model) as monitor:
        model(x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"0": rms(x)}, rel=1e-5)


def test_hooks_that_were_there_before_may_replace_a_pair():
    norm, x = fastnorm.AddRMSNorm(6), torch.randn(4, 6)
    norm.register_forward_hook(lambda module, args, output: output[0])
    with fastnorm.use("reference"), fastnorm.Monitor(norm) as monitor:
        norm(x, x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"AddRMSNorm": rms(2 * x)}, rel=1e-5)


def test_a_converted_norms_input_by_its_own_name():
    """The input is read where the formula serves the call."""
    model, x = nn.Sequential(foreign_norms.GatedByQwen(6)), torch.randn(4, 6)
    assert fastnorm.convert(model).swapped
    with fastnorm.use("reference"), fastnorm.Monitor(model) as monitor:
        model[0](gate=x, hidden_states=x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"0": rms(x)}, rel=1e-5)


def test_an_adaptive_norms_sum():
    model = nn.ModuleDict({"ada": fastnorm.AdaLayerNorm(6), "out": nn.Linear(6, 1)})
    x, residual, gate = torch.randn(2, 4, 6), torch.randn(2, 4, 6), torch.randn(2, 1, 6)
    scale = torch.randn(2, 1, 6, requires_grad=True)
    for by in (None, "reference"):
        with fastnorm.use(by), fastnorm.Monitor(model) as monitor:
            model["out"](model["ada"](x, scale, None, residual, gate)[0]).sum().backward()
            monitor.step()
            assert monitor.last()["input_rms"] == pytest.approx({"ada": rms(residual + gate * x)}, rel=1e-5)


class Modulating(Modulated):
    """As a converted adaptive norm of diffusers."""

    def __init__(self):
        super().__init__()
        self.norm = fastnorm.LayerNorm(6, elementwise_affine=False)

    def forward(self, x, scale):
        return self.modulated(x, scale, scale)


def test_a_modulated_norm_stays_one_kernel(monkeypatch):
    """Its norm isn't called, so that hooks on the norm would make it a call of its own."""
    fused, calls = adapted.modulated_norm, []
    monkeypatch.setattr(adapted, "modulated_norm", lambda *args, **kw: calls.append(1) or fused(*args, **kw))
    model = nn.ModuleDict({"block": Modulating(), "last": fastnorm.LayerNorm(6)})
    x, scale = torch.randn(2, 4, 6), torch.randn(2, 6, requires_grad=True)
    with fastnorm.Monitor(model) as monitor:
        model["last"](model["block"](x, scale)).sum().backward()
        monitor.step()
        found = monitor.last()["input_rms"]
    assert calls == [1] and set(found) == {"block.norm", "last"}
    assert found["block.norm"] == pytest.approx(rms(x), rel=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad"])
def test_transforms_are_not_seen(transform):
    """Their tensors have no numbers once they have ended."""
    model, x = nn.Sequential(fastnorm.LayerNorm(6), nn.ReLU()), torch.randn(4, 6)
    grad = torch.func.grad(lambda parameters, x: torch.func.functional_call(model, parameters, x).sum())
    parameters = dict(model.named_parameters())
    with fastnorm.Monitor(model, dead_neurons=True) as monitor:
        with fastnorm.use("reference"):
            match transform:
                case "grad":
                    grad(parameters, x)
                case "vmap":
                    torch.vmap(model)(x)
                case _:
                    torch.vmap(grad, in_dims=(None, 0))(parameters, x)
        monitor.step()
        assert monitor.last()["input_rms"] == monitor.last()["zero_share"] == {}
        model(x).sum().backward()
        monitor.step()
        assert monitor.last()["input_rms"] == pytest.approx({"0": rms(x)}, rel=1e-5)
