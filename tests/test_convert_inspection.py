"""What is asked of a converted norm beside its results: print, dir, a new start; and what is said of shards."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnorm
from helpers import foreign_norms as foreign
from helpers.conversion import NORMS, assert_alike, randomised, results

pytestmark = pytest.mark.usefixtures("compiled_kernels")
SHOWN = {
    "Llama": "FastLlamaLike((16,), eps=1e-06, elementwise_affine=True, rounding=llama)",
    "T5": "FastT5Like((16,), eps=1e-06, elementwise_affine=True)",
    "OLMo 2": "FastOlmoLike((16,), eps=1e-06, elementwise_affine=True)",
    "Gemma": "FastGemmaLike((16,), eps=1e-06, elementwise_affine=True, zero_centered=True)",
    "no weight": "FastUnweightedNorm(eps=1e-06)",
    "timm RmsNorm2d": "FastRmsNorm2d((16,), eps=1e-06, elementwise_affine=True, rounding=llama, keeps_layout=True)",
}
EPS = ("eps", "variance_epsilon", "norm_epsilon")


@pytest.mark.parametrize("name", NORMS)
def test_a_converted_norm_can_be_shown(name):
    """As the original can: by print, dir and the attributes that dir names, in copies, and the same when reverted."""
    norm = NORMS[name][0]()
    before, names, keys = repr(norm), dir(norm), list(norm.state_dict())
    kept = [key for key in EPS if key in vars(norm)]
    fastnorm.convert(norm)
    shown = repr(norm)
    assert shown == SHOWN.get(name, shown) and shown.startswith(f"{type(norm).__name__}(")
    assert norm.extra_repr() in shown.replace("\n  ", "") and repr(nn.Sequential(norm)).count("eps=") == 1
    assert set(names) <= set(dir(norm)) and all(hasattr(norm, n) for n in dir(norm) if n != "__abstractmethods__")
    for other in (copy.copy(norm), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert repr(other) == shown and list(other.state_dict()) == keys
        fastnorm.revert(other)
        assert repr(other) == before and dir(other) == names
    for key in kept:
        setattr(norm, key, 0.25)
        assert "eps=0.25" in repr(norm)
    fastnorm.revert(norm)
    assert all(getattr(norm, key) == 0.25 for key in kept)


class Restarting(foreign.LlamaLike):
    """With a start of its own."""

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.25)


class OnePlusRestarting(foreign.OnePlusLayerNorm):
    """As above, derived from torch's."""

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.25)
        nn.init.constant_(self.bias, 0.5)


@pytest.mark.parametrize("make", [Restarting, OnePlusRestarting, foreign.OnePlusLayerNorm])
def test_a_norm_starts_anew_as_the_original_does(make):
    norm = make(8)
    norm.reset_parameters()
    expected = copy.deepcopy(norm.state_dict())
    assert fastnorm.convert(randomised(norm)).swapped
    norm.reset_parameters()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "GroupNorm"])
def test_a_weight_without_a_bias(name):
    make, shape, replacement, _ = NORMS[name]
    norm, x = randomised(make()), torch.randn(shape)
    norm.bias = None
    expected = results(norm, x)
    assert [n.replacement for n in fastnorm.convert(norm).swapped] == [replacement]
    assert_alike(results(norm, x), expected, torch.float32)


SHARDED = [name for name, (make, *_) in NORMS.items() if list(make().parameters())]


@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_left_until_they_are_gathered(name):
    """ZeRO-3 leaves a parameter no elements between the forwards: it tells neither width nor shape."""
    make, shape, replacement, _ = NORMS[name]
    norm, x = randomised(make()), torch.randn(shape)
    expected, before = results(norm, x), type(norm)
    whole = [parameter.data for parameter in norm.parameters()]
    for parameter in norm.parameters():
        parameter.data = parameter.new_empty(0)
    (left,) = fastnorm.convert(norm).left
    assert "is sharded" in left.reason and "before it is wrapped" in left.reason and type(norm) is before
    for parameter, data in zip(norm.parameters(), whole, strict=True):
        parameter.data = data
    assert_alike(results(norm, x), expected, torch.float32)
    assert fastnorm.convert(norm).swapped[0].replacement == replacement


@pytest.mark.parametrize("make", [nn.LayerNorm, foreign.LlamaLike, nn.BatchNorm1d])
def test_weights_that_are_no_parameters_are_left(make):
    """FullyShardedDataParallel's without use_orig_params; at ones, a norm without a weight would look the same."""
    norm = make(8)
    for name, parameter in list(norm.named_parameters()):
        delattr(norm, name)
        setattr(norm, name, parameter.detach())
    model = nn.ModuleDict({"norm": norm, "whole": make(8)})
    report = fastnorm.convert(model)
    assert not [n for n in report.norms if n.name == "norm" and n.replacement]
    assert [n.name for n in report.swapped] == ["whole"] and isinstance(norm.weight, torch.Tensor)
