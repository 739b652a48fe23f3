"""SyncBatchNorm.convert_sync_batchnorm: what it replaces, what it leaves and says so, and what torch's own is told."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from helpers import foreign_norms as foreign

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def test_conversion_keeps_the_tensors():
    inner = {"a": nn.BatchNorm1d(4, affine=False), "b": nn.BatchNorm3d(4, track_running_stats=False)}
    fused = fastnorm.BatchNorm2d(8, activation="relu", momentum=None)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), fused, nn.ModuleDict(inner)).eval()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    keys = list(network.state_dict())
    converted = fastnorm.SyncBatchNorm.convert_sync_batchnorm(network)
    assert converted is network and list(converted.state_dict()) == keys
    assert all(t is tensors[n] for n, t in [*converted.named_parameters(), *converted.named_buffers()])
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(m) for m in norms] == [fastnorm.SyncBatchNorm] * 3 and not any(m.training for m in norms)
    assert norms[0].activation == "relu" and norms[0].momentum is None
    assert isinstance(fastnorm.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)), fastnorm.SyncBatchNorm)


ACTIVATIONS = {
    "SiLU": lambda: foreign.BatchNormAct2d(4, nn.SiLU()),
    "ReLU": lambda: foreign.BatchNormAct2d(4, nn.ReLU(inplace=True)),
    "PReLU": lambda: foreign.BatchNormAct2d(4, nn.PReLU(), nn.Dropout(0.5)),
    "ours": lambda: fastnorm.BatchNorm2d(4, activation="relu"),
    "none": lambda: OtherEps(4),
}


SEEN = []


def see(*_):
    SEEN.append(1)


class OtherEps(nn.BatchNorm2d):
    """Another start, the same computation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=0.1)


@pytest.mark.parametrize("is_swapped", [False, True], ids=["as it is", "after fastnorm.convert"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_conversion_keeps_activations_and_hooks(name, is_swapped):
    network, x = nn.Sequential(ACTIVATIONS[name]()).eval(), torch.randn(3, 4, 5, 5)
    for tensor in (network[0].weight, network[0].bias, network[0].running_mean):
        nn.init.normal_(tensor)
    network[0].register_forward_hook(see)
    keys, expected, children = list(network.state_dict()), network(x), dict(network[0].named_children())
    assert name != "SiLU" or (expected - nn.BatchNorm2d.forward(network[0], x)).abs().max() > 0.1
    SEEN.clear()
    if is_swapped:
        fastnorm.convert(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        network = fastnorm.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert isinstance(module[0], fastnorm.SyncBatchNorm) and list(module.state_dict()) == keys
        torch.testing.assert_close(module(x), expected)
        assert "Sync" in repr(module[0])
    assert dict(network[0].named_children()) == children and len(SEEN) == 3
    assert fastnorm.revert(network) == ()


class Twice(nn.BatchNorm2d):
    """No batch norm, though it is one by type."""

    def forward(self, x):
        return 2 * super().forward(x)


class OursTwice(fastnorm.BatchNorm2d):
    """As above, of ours."""

    def forward(self, x):
        return 2 * super().forward(x)


class Squared(nn.Module):
    def forward(self, weight):
        return weight.square()


def patched():
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: 2 * x
    return norm


def parametrized(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", Squared())
    return norm


LEFT = {
    "a forward of its own": (lambda: Twice(4), "differs by"),
    "a forward of its own, of ours": (lambda: OursTwice(4), "its forward is not fastnorm's"),
    "patched": (patched, "replaced by other code"),
    "parametrized": (lambda: parametrized(nn.BatchNorm2d(4)), "torch has made it a ParametrizedBatchNorm2d"),
    "parametrized, of ours": (lambda: parametrized(fastnorm.BatchNorm2d(4)), "torch has made it"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.BatchNorm2d(4), dim=None), "weight_g, weight_v"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "run the model once before"),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_conversion_leaves_is_named(name):
    make, reason = LEFT[name]
    norm, x = make().eval(), torch.randn(3, 4, 5, 5)
    network = nn.ModuleDict({"stem": nn.Sequential(norm, nn.BatchNorm2d(4))})
    expected = None if name == "lazy" else norm(x)
    with pytest.warns(UserWarning, match=rf"leaves stem\.0 \({type(norm).__name__}\): .*{reason}"):
        fastnorm.SyncBatchNorm.convert_sync_batchnorm(network)
    assert network["stem"][0] is norm and type(network["stem"][1]) is fastnorm.SyncBatchNorm
    assert expected is None or torch.equal(norm(x), expected)


def test_conversion_keeps_sharing_and_the_original():
    shared = nn.BatchNorm2d(4)
    network = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    fastnorm.SyncBatchNorm.convert_sync_batchnorm(network)
    assert network["a"] is network["b"][0] is network["c"] and type(network["a"]) is fastnorm.SyncBatchNorm
    network["a"].weight = None
    assert shared.weight is not None and type(shared) is nn.BatchNorm2d


OTHERS = {
    "convert_sync_batchnorm": lambda bn: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn)),
    "fuse_conv_bn_eval": lambda bn: nn.utils.fuse_conv_bn_eval(nn.Conv2d(4, 4, 1).eval(), bn),
    "fuse_linear_bn_eval": lambda bn: nn.utils.fuse_linear_bn_eval(nn.Linear(4, 4).eval(), bn),
    "by hand": lambda bn: F.batch_norm(torch.ones(2, 4), bn.running_mean, bn.running_var, eps=bn.eps),
}


@pytest.mark.parametrize("name", OTHERS)
def test_functions_that_know_no_activation_are_told_of_it(name):
    """torch's take a norm's attributes, whatever its class, and what they return lacks the activation."""
    with pytest.warns(UserWarning, match=r"fastnorm\.BatchNorm2d\(activation='relu'\).* has no activation"):
        OTHERS[name](fastnorm.BatchNorm2d(4, activation="relu").eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for norm in (fastnorm.BatchNorm2d(4), nn.BatchNorm2d(4)):
            OTHERS[name](norm.eval())


def test_eps_in_compiled_code():
    """Read as it is of torch.nn's, and as it is later."""
    def scaled(x):
        return x * norm.eps

    norm, compiled = fastnorm.BatchNorm2d(4, eps=0.5), torch.compile(scaled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)) == 0.5
    norm.eps = 0.25
    assert compiled(torch.ones(1)) == 0.25


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_nobody_else_hears_of_it():
    norm, x = fastnorm.BatchNorm2d(4, eps=0.5, activation="relu").eval(), torch.randn(2, 4, 3, 3)
    expected = norm(x)
    with warnings.catch_warnings(), fastnorm.use(None):
        warnings.simplefilter("error", UserWarning)
        copies = [pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm), torch.jit.trace(norm, x)]
        copies += [torch.compile(norm, backend="eager", fullgraph=True), torch.export.export(norm, (x,)).module()]
        copies += [torch.fx.symbolic_trace(nn.Sequential(norm)), fastnorm.SyncBatchNorm.convert_sync_batchnorm(norm)]
        inspect.getmembers(norm), norm.reset_parameters()
        assert "eps=0.5" in repr(norm) and vars(norm)["eps"] == 0.5
        for module in copies:
            torch.testing.assert_close(module(x), expected)
        compiled, norm.eps = copies[3], 2.0
        assert not torch.equal(norm(x), expected) and "eps=2.0" in repr(norm)
        torch.testing.assert_close(compiled(x), norm(x))
