"""Gradient health: norms, flags and words for models that are sick in a known way; dead activations."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastnorm
from helpers.drawing import examples
from helpers.syncs import Syncs


def named(**norms):
    """Parameters of four elements with gradients of these norms; None for no gradient."""
    result = []
    for name, norm in norms.items():
        p = nn.Parameter(torch.ones(4))
        p.grad = None if norm is None else torch.full((4,), norm / 2, dtype=torch.float32)
        result.append((name, p))
    return result


def norms_of(health):
    return {p.name: p.norm for p in health.parameters}


@examples(40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.complex64]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_norms_of_any_list(cases):
    pairs = []
    for i, (shape, dtype, has_grad) in enumerate(cases):
        p = nn.Parameter(torch.randn(shape).to(dtype))
        p.grad = torch.randn(shape).to(dtype) if has_grad else None
        pairs.append((f"p{i}", p))
    health = fastnorm.gradient_health(pairs)
    squares = 0.0
    for (name, p), row in zip(pairs, health.parameters, strict=True):
        assert (row.name, row.size) == (name, p.numel())
        if p.grad is None:
            assert row.norm is None and row.flag == "no gradient"
        else:
            wide = p.grad.to(torch.complex128 if p.grad.is_complex() else torch.float64)
            exact = torch.linalg.vector_norm(wide).item()
            assert row.norm == pytest.approx(exact, rel=1e-6)
            squares += exact**2
    assert health.total_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_flags_bounds_and_ratio():
    health = fastnorm.gradient_health(named(a=1e-8, b=0.0, c=2.0, d=2e3, e=math.nan, f=math.inf, g=None))
    assert [p.flag for p in health.parameters] == [
        "vanishing", "vanishing", "", "exploding", "non-finite", "non-finite", "no gradient",
    ]  # fmt: skip
    assert health.vanishing == ("a", "b") and health.exploding == ("d",)
    assert health.nonfinite == ("e", "f") and health.without_gradient == ("g",)
    assert health.ratio == pytest.approx(2e11, rel=1e-6) and health.uneven and not health.healthy
    assert math.isnan(health.total_norm)
    bounds = {"vanishing_below": 1e-9, "exploding_above": 1e4, "ratio_above": 1e12}
    lenient = fastnorm.gradient_health(named(a=1e-8, d=2e3), **bounds)
    assert lenient.healthy and not lenient.uneven and lenient.diagnosis == "healthy"


@pytest.mark.parametrize(
    ("norms", "diagnosis"),
    [
        ({"a": 1.0, "b": 2.0, "c": 0.5}, "healthy"),
        ({"a": 1.0, "b": 2.0, "c": None}, "healthy; 1 of 3 parameters have no gradient"),
        ({"a": None}, r"no gradients: call backward\(\) first"),
        ({}, "no parameters"),
        (
            {"a": 1e-9, "b": 1e-8, "c": 1e-2, "d": 1.0, "e": 1.0, "f": 1.0},
            r"early layers have vanishing gradients \(2 of 6, the first is a\); norms are uneven: .* 1e\+09 times the"
            r" smallest, and norms vanish towards the early layers \(median 5\.5e-09 in the first third, 1\.0e\+00 in",
        ),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}, r"late layers have vanishing gradients \(1 of 4, the first is d\)"),
        ({"a": 1e-9, "b": 1.0, "c": 1e-9}, r"some layers have vanishing gradients \(2 of 3, the first is a\);"),
        ({"a": 1e-9, "b": 1e-9}, "all layers have vanishing"),
        ({"a": 1e6, "b": 1e5, "c": 1.0, "d": 1.0}, r"early layers have exploding gradients .* norms grow towards"),
        ({"a": 1.0, "b": math.nan}, r"late layers have non-finite gradients \(1 of 2, the first is b\)$"),
        ({"a": 1.0, "b": 200.0}, "norms are uneven: the largest is 200 times the smallest$"),
    ],
)
def test_diagnosis(norms, diagnosis):
    import re

    assert re.match(diagnosis, fastnorm.gradient_health(named(**norms)).diagnosis)


def deep_sigmoid_net(layers=12):
    """A net in which the gradient really shrinks by a factor of four a layer."""
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(16, 1))


def test_a_net_whose_gradients_vanish():
    net = deep_sigmoid_net(24)
    net(torch.randn(8, 16)).sum().backward()
    health = fastnorm.gradient_health(net)
    assert "0.0.weight" in health.vanishing and "24.weight" not in health.vanishing
    assert health.diagnosis.startswith("early layers have vanishing gradients")
    printed = str(health)
    assert printed.splitlines()[0].split() == ["parameter", "size", "gradient", "norm", "flag"]
    assert any(line.startswith("0.0.weight") and line.endswith("vanishing") for line in printed.splitlines())
    assert len(printed.splitlines()) == 2 + len(health.parameters) + 2
    assert len({len(line) for line in printed.splitlines()[2:-2] if line.endswith("vanishing")}) == 1


def test_one_host_sync(monkeypatch):
    net = deep_sigmoid_net()
    net(torch.randn(8, 16)).sum().backward()
    lists = []
    stock = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.numel()) or stock(self))
    with Syncs() as calls:
        fastnorm.gradient_health(net)
    assert (calls.count, lists) == (0, [1 + 26])
    with Syncs() as calls:
        fastnorm.dead_neurons(net, torch.randn(8, 16), layers=(nn.Sigmoid,))
    assert (calls.count, lists[1:]) == (0, [12])


def test_sparse_gradients_are_added_up():
    net = nn.Embedding(9, 3, sparse=True)
    net(torch.tensor([1, 1, 4])).sum().backward()
    assert norms_of(fastnorm.gradient_health(net)) == {"weight": pytest.approx(math.sqrt(3 * 2**2 + 3))}


def test_nothing_is_changed():
    pairs = named(a=1.0, b=math.nan)
    before = [p.grad.clone() for _, p in pairs]
    versions = [p.grad._version for _, p in pairs]
    fastnorm.gradient_health(pairs)
    assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for (_, p), g in zip(pairs, before, strict=True))
    assert [p.grad._version for _, p in pairs] == versions


def test_to_dict_is_strict_json():
    health = fastnorm.gradient_health(named(a=1.0, b=math.nan, c=None, d=math.inf))
    loaded = json.loads(json.dumps(health.to_dict(), allow_nan=False))
    assert [(p["name"], p["norm"], p["flag"]) for p in loaded["parameters"]] == [
        ("a", 1.0, ""), ("b", None, "non-finite"), ("c", None, "no gradient"), ("d", None, "non-finite"),
    ]  # fmt: skip
    assert loaded["total_norm"] is None and loaded["healthy"] is False and loaded["ratio"] == 1.0


@pytest.mark.parametrize("norms", [dict(a=1.0, b=math.nan, c=0.0, d=None, e=1e-9, f=1e6), {"a": None}, {}])
def test_plot(norms):
    figure = pytest.importorskip("matplotlib.figure")
    health = fastnorm.gradient_health(named(**norms))
    own = figure.Figure().subplots()
    ax = health.plot(own)
    assert ax is own
    assert ax.get_yscale() == "log" and health.diagnosis in ax.get_title()
    labels = [text.get_text() for text in ax.texts]
    assert sorted(labels) == sorted(p.name for p in health.parameters if p.flag and p.norm is not None)
    heights = [y for points in ax.collections for _, y in points.get_offsets()]
    assert len(heights) == sum(p.norm is not None for p in health.parameters)
    assert all(0 < y < math.inf for y in heights)
    ax.figure.canvas.draw()


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        fastnorm.gradient_health(named(a=1.0)).plot()


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (3, {}, TypeError, "a module or .* but got int"),
        ([nn.Parameter(torch.ones(1))], {}, TypeError, "needs names"),
        ([], {"vanishing_below": 1.0, "exploding_above": 0.5}, ValueError, "below exploding_above"),
        ([], {"ratio_above": math.nan}, ValueError, "ratio_above"),
    ],
)
def test_bad_arguments(given, options, error, message):
    with pytest.raises(error, match=message):
        fastnorm.gradient_health(given, **options)


class Shares(nn.Module):
    """Activations with known shares of zeros, and one ReLU that runs twice."""

    def __init__(self):
        super().__init__()
        self.some, self.all, self.twice = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x, shift=0.0):
        x = self.norm(self.drop(x))
        self.some(x)
        self.all(x - 100)
        self.twice(x + 100)
        self.twice(x - 100)
        return x + shift


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x, 1.0), lambda x: {"x": x, "shift": 1.0}])
def test_dead_neurons(inputs):
    model = Shares()
    model.norm.eval()  # modes differ between modules
    modes = [m.training for m in model.modules()]
    x = torch.tensor([[-1.0, 2.0, -3.0, 4.0]] * 6, requires_grad=True)
    report = fastnorm.dead_neurons(model, inputs(x))
    assert {layer.name: (layer.size, layer.zero_share) for layer in report.layers} == {
        "some": (24, 0.5), "all": (24, 1.0), "twice": (48, 0.5),
    }  # fmt: skip
    assert report.dead == ("all",) and fastnorm.dead_neurons(model, x, threshold=0.4).dead == ("some", "all", "twice")
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled() and x.grad is None
    assert not any(m._forward_hooks for m in model.modules())
    assert model.norm.num_batches_tracked == 0
    assert "1 of 3 layers have more than 90% zeros" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_dead_neurons_cleans_up_after_an_error():
    model = Shares()
    with pytest.raises(RuntimeError):
        fastnorm.dead_neurons(model, torch.ones(6, 3))
    assert not any(m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


def test_dead_neurons_without_a_layer_to_look_at():
    with pytest.raises(ValueError, match="no module of Sequential that ran is one of ReLU, ReLU6"):
        fastnorm.dead_neurons(nn.Sequential(nn.GELU()), torch.ones(2))
    with pytest.raises(ValueError, match="threshold must be from 0 to 1"):
        fastnorm.dead_neurons(nn.ReLU(), torch.ones(2), threshold=1.5)
    assert fastnorm.dead_neurons(nn.ReLU(), torch.ones(2)).layers[0].name == "ReLU"
