"""convert and revert: what is swapped, what is left, and that nothing but the class of a norm changes."""

import copy
import inspect
import io
import json
import pickle
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import fastnorm
from helpers import foreign_norms as foreign
from helpers.conversion import FOREIGN, MAPS, NORMS, RELU, arguments_of, assert_alike, inputs_of, randomised, results

NATIVE = fastnorm.backend.statuses()["native"].available
pytestmark = pytest.mark.usefixtures("compiled_kernels")
LEFT = {
    "twice its base": (lambda: foreign.Doubled(16), "differs by"),
    "counts its calls": (lambda: foreign.Counting(16), "changes its attributes"),
    "keeps a log": (lambda: foreign.Logging(16), "changes its attributes"),
    "unbiased deviation": (lambda: foreign.StdNorm(16), "differs by"),
    "eps outside the root": (lambda: foreign.EpsOutside(16), "differs by"),
    "other dimension of maps": (lambda: foreign.FirstOfFour(16), "differs by"),
    "clamps its input": (lambda: foreign.Clamped(16), "differs by"),
    "a gate without which it differs": (lambda: foreign.GatedOtherwise(16), "without a gate [2, 3, 16]"),
    "clamps its gate from below": (lambda: foreign.GatedWithin(16, -5.0, None), "not GatedRMSNorm"),
    "clamps its gate from above": (lambda: foreign.GatedWithin(16, None, 1e3), "not GatedRMSNorm"),
    "the promoted dtype of input and gate": (lambda: foreign.GatedInPromoted(16), "bfloat16 input and float32 gate"),
    "the gate's dtype": (lambda: foreign.GatedInGates(16), "float32 input and bfloat16 gate"),
    "another activation": (lambda: foreign.GatedByTanh(16), "differs by"),
    "an activation module": (lambda: foreign.GatedByModule(16), "forward takes gate beside its input"),
    "a gate by default": (lambda: foreign.GatedByDefault(16), "forward takes (x, gate=1.0)"),
    "a gate by keyword": (lambda: foreign.GatedByKeyword(16), "forward takes (x, gate=None), not"),
    "a gate and more": (lambda: foreign.GatedAndScaled(16), "forward takes (x, gate, scale=1.0)"),
    "a gate and no weight": (lambda: foreign.GatedUnweightedNorm(), "no weight"),
    "a gate of channels": (lambda: foreign.GroupNormWithGate(4, 16), "only row norms"),
    "a residual": (lambda: foreign.AfterResidual(16), "with 'residual' as a gate, not GatedRMSNorm"),
    "a mask": (lambda: foreign.Masked(16), "the original raises"),
    "a mask without a gradient": (lambda: foreign.MaskedSilently(16), "doesn't depend on it"),
    "a time embedding": (lambda: foreign.Timed(16), "with 'time' as a gate, not GatedRMSNorm"),
    "a weight per head": (lambda: foreign.PerHead(2, 16), "its weight has the shape [2, 16], not [16]"),
    "an eps that is nowhere": (lambda: foreign.UnusualEpsNorm(16), "differs by"),
    "two of them": (lambda: foreign.TwoEps(16), "several attributes named eps"),
    "two results": (lambda: foreign.PairNorm(16), "the result is a tuple"),
    "writes into its input": (lambda: foreign.InPlace(16), "raises RuntimeError"),
    "one parameter more": (lambda: foreign.WithState(16), "has no scale"),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(16), "fastnorm has no InstanceNorm2d"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "lazy"),
    "fastnorm's": (lambda: fastnorm.LayerNorm(16), "fastnorm's already"),
    "fastnorm's of a condition": (lambda: fastnorm.AdaLayerNorm(16), "fastnorm's already"),
}


class Holder(nn.Module):
    """A model with the norm in the middle; without `model`, what a norm alone can't show."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"norm": norm})])

    @property
    def norm(self) -> nn.Module:
        return self.layers[0]["norm"]

    def forward(self, *inputs):
        return self.norm(*inputs)


@pytest.mark.parametrize("name", NORMS)
def test_swapped_and_back(name):
    make, shape, replacement, kind = NORMS[name]
    model = Holder(randomised(make()))
    norm, x = model.layers[0]["norm"], torch.randn(shape)
    before, kept, keys = type(norm), dict(vars(norm)), list(model.state_dict())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    expected = results(model, x)
    report = fastnorm.convert(model, norms=(kind,))
    assert [(n.name, n.replacement) for n in report.swapped] == [("layers.0.norm", replacement)], str(report)
    assert not report.left and model.layers[0]["norm"] is norm and isinstance(norm, before)
    assert type(norm).__module__.startswith("fastnorm.") and type(norm) is not before
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    # a ReLU may go either way where its input is next to zero; at these seeds none does
    assert_alike(results(model, x), expected, torch.float32)
    assert fastnorm.revert(model) == ("layers.0.norm",)
    assert type(norm) is before and vars(norm) == kept
    assert fastnorm.revert(model) == ()


@pytest.mark.parametrize("name", [n for n in FOREIGN if FOREIGN[n][3] == "rms"])
def test_dtypes_of_a_model_that_is_cast_later(name):
    """Converted in float32, and right in every mixture with bfloat16, where the kinds of RMS norm differ."""
    make, shape, *_ = FOREIGN[name]
    original = randomised(make())
    converted = copy.deepcopy(original)
    assert fastnorm.convert(converted).swapped
    for parameters in (torch.float32, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for autocast in (False, True):
                x = torch.randn(shape).to(dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    pair = [results(module.to(parameters), x) for module in (converted, original)]
                assert [t.dtype for t in pair[0]] == [t.dtype for t in pair[1]]
                assert_alike(*pair, torch.bfloat16 if torch.bfloat16 in (parameters, dtype) else dtype)


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "GroupNorm", "Llama", "timm LayerNorm2d", "T5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(name, dtype):
    make, shape, replacement, _ = NORMS[name]
    norm, x = randomised(make()).to(dtype), torch.randn(shape).to(dtype)
    expected = results(norm, x)
    assert [n.replacement for n in fastnorm.convert(norm).swapped] == [replacement]
    assert_alike(results(norm, x), expected, dtype)


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    make, reason = LEFT[name]
    model = Holder(make())
    norm = model.layers[0]["norm"]
    before, kept = type(norm), str(vars(norm))
    report = fastnorm.convert(model)
    assert [n.name for n in report.left] == ["layers.0.norm"] and not report.swapped
    assert reason in report.left[0].reason
    assert type(norm) is before and str(vars(norm)) == kept


@pytest.mark.parametrize("name", [name for name in NORMS if NORMS[name][1] == MAPS])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_of_maps(name, memory_format):
    """As the original's, for whoever takes a view of the result."""
    make, shape, *_ = NORMS[name]
    original = randomised(make())
    converted = copy.deepcopy(original)
    assert fastnorm.convert(converted).swapped
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    assert converted(x).stride() == original(x).stride()
    assert_alike(results(converted, x), results(original, x), torch.float32)


def test_other_modules_are_not_reported():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Embedding(3, 4), foreign.UnweightedLike(), nn.Dropout())
    assert fastnorm.convert(model).norms == ()


def test_a_forward_of_the_object_is_left():
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    (left,) = fastnorm.convert(nn.Sequential(norm)).left
    assert "replaced" in left.reason


def test_without_verify_only_types_count():
    model = nn.Sequential(nn.LayerNorm(8), foreign.TimmLayerNorm(8), foreign.LlamaLike(8), nn.SyncBatchNorm(8))
    report = fastnorm.convert(model, verify=False)
    assert [n.name for n in report.swapped] == ["0", "3"]
    assert all("verify=False" in n.reason for n in report.left)


def test_kinds():
    model = nn.Sequential(nn.LayerNorm(8), foreign.LlamaLike(8), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    for position, kind in enumerate(("layer", "rms", "batch", "group")):
        report = fastnorm.convert(model, norms=[kind])
        assert [n.name for n in report.swapped] == [str(position)] and len(report.left) == 3
        fastnorm.revert(model)


@pytest.mark.parametrize(
    "arguments, error",
    [(((lambda x: x),), TypeError), ((None,), TypeError), ((nn.LayerNorm(4), {"norms": "layer"}), TypeError),
     ((nn.LayerNorm(4), {"norms": ("layer", "instance")}), ValueError)],
)  # fmt: skip
def test_bad_input(arguments, error):
    model, options = arguments[0], arguments[1] if len(arguments) > 1 else {}
    with pytest.raises(error, match="convert"):
        fastnorm.convert(model, **options)
    if not isinstance(model, nn.Module):
        with pytest.raises(TypeError, match=r"revert takes a torch\.nn\.Module"):
            fastnorm.revert(model)


def test_verify_leaves_no_trace():
    model = nn.Sequential(
        nn.BatchNorm2d(16), foreign.BatchNormAct2d(16, RELU(), nn.Dropout2d(0.5)), nn.GroupNorm(4, 16).eval(),
        foreign.LayerNorm2d(16), foreign.Logging(16), foreign.GemmaLike(16),
    )  # fmt: skip
    model[0].weight.grad = torch.ones(16)
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("forward"))
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.no_grad(), torch.device("meta"):
        report = fastnorm.convert(model)
    assert len(report.swapped) == 5 and model[4].seen == [] and model[4].calls == 0
    assert torch.equal(torch.get_rng_state(), generator) and calls == []
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)


def test_verify_is_silent():
    """What the trials warn of, such as a dtype that the model may never see, is not the user's affair."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert fastnorm.convert(foreign.Loud(16)).swapped
    assert not [str(w.message) for w in seen if "halves" in str(w.message)]


def test_hooks_and_sharing():
    shared = nn.LayerNorm(8)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared, foreign.LlamaLike(8))})
    seen = []
    shared.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    shared.weight.requires_grad_(False)
    shared.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}extra": None}))
    keys = list(model.state_dict())
    report = fastnorm.convert(model)
    assert [(n.name, n.aliases) for n in report.norms] == [("first", ("second.0",)), ("second.1", ())]
    assert model["first"] is model["second"][0] is shared and not shared.weight.requires_grad
    model["second"](torch.randn(2, 8))
    assert seen == [fastnorm.LayerNorm] and list(model.state_dict()) == keys
    assert "first = second.0" in str(report)


def test_hooks_of_an_activation_fire():
    norm, x = foreign.BatchNormAct2d(4), torch.randn(2, 4, 3, 3)
    fastnorm.convert(norm)
    assert norm.activation == "relu"
    expected, seen = norm(x), []
    norm.act.register_forward_hook(lambda *_: seen.append(1))
    assert norm.activation is None
    torch.testing.assert_close(norm(x), expected)
    assert seen == [1]
    norm.act = nn.Identity()
    torch.testing.assert_close(norm(x).relu(), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "Llama", "other names", "T5", "BatchNorm + ReLU", "no weight"])
def test_copies_and_pickles(name):
    make, shape, *_ = NORMS[name]
    model = Holder(randomised(make()))
    original, x = type(model.layers[0]["norm"]), torch.randn(shape)
    fastnorm.convert(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = Holder(make())
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), copy.copy(model)):
        assert type(other.layers[0]["norm"]) is type(model.layers[0]["norm"])
        assert_alike(results(other, x), results(fresh, x), torch.float32)
        if other.layers is not model.layers:
            assert fastnorm.revert(other) == ("layers.0.norm",)
            assert type(other.layers[0]["norm"]) is original
            assert_alike(results(other, x), results(fresh, x), torch.float32)
    assert type(model.layers[0]["norm"]) is not original


def test_what_was_trained_in_between_stays():
    norm, x = foreign.GemmaLike(8), torch.randn(4, 8)
    optimizer = torch.optim.Adam(norm.parameters(), 0.1)
    fastnorm.convert(norm)
    norm(x).square().sum().backward()
    optimizer.step()
    weight = norm.weight
    expected = norm(x)
    assert weight.abs().min() > 0
    fastnorm.revert(norm)
    assert norm.weight is weight
    torch.testing.assert_close(norm(x), expected)


def test_attributes_that_both_classes_have():
    norm = foreign.LlamaLike(8)
    norm.rounding, norm.eps = "the user's", 3
    kept = dict(vars(norm))
    assert fastnorm.convert(norm).swapped and (norm.rounding, norm.eps) == ("llama", 1e-6)
    fastnorm.revert(norm)
    assert vars(norm) == kept


@pytest.mark.parametrize("name", FOREIGN)
def test_calls_by_keyword_and_a_later_eps(name):
    """The input has the original's name, and eps counts under the original's, also in a copy."""
    make, shape, *_ = FOREIGN[name]
    original = randomised(make())
    model = copy.deepcopy(original)
    assert fastnorm.convert(model).swapped
    model = pickle.loads(pickle.dumps(model))
    arguments = arguments_of(original)
    assert list(inspect.signature(model.forward).parameters) == arguments
    for key in [key for key in vars(original) if "eps" in key]:
        setattr(original, key, 0.5)
        setattr(model, key, 0.5)
    inputs = inputs_of(original, torch.randn(shape))
    torch.testing.assert_close(model(**dict(zip(arguments, inputs, strict=True))), original(*inputs))


GATED = [name for name, (make, *_) in FOREIGN.items() if len(arguments_of(make())) == 2]


@pytest.mark.parametrize("name", GATED)
def test_without_a_gate(name):
    """As the original: the norm alone where the gate is optional, or an error where it isn't."""
    make, shape, *_ = FOREIGN[name]
    original, x = randomised(make()), torch.randn(shape)
    model = copy.deepcopy(original)
    assert fastnorm.convert(model).swapped
    if name in ("gate behind", "Qwen3-Next"):
        for norm in (original, model):
            with pytest.raises(TypeError, match=r"missing 1 required positional argument: '(z|gate)'"):
                norm(x)
    else:
        for absent in ((), (None,)):
            torch.testing.assert_close(model(x, *absent), original(x, *absent))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])  # a group of one column would have a gradient of rounding alone
def test_groups_and_orders(before, groups):
    norm, x = randomised(foreign.GatedGroups(16, groups, before)), torch.randn(2, 5, 16)
    expected = results(norm, x)
    (swapped,) = fastnorm.convert(norm).swapped
    assert (norm.group_size, norm.norm_before_gate) == (16 // groups if groups > 1 else None, before)
    assert ("group_size" in swapped.replacement) == (groups > 1)
    assert_alike(results(norm, x), expected, torch.float32)
    norm.norm_before_gate = not before
    changed = results(norm, x)
    fastnorm.revert(norm)
    assert norm.norm_before_gate is not before and not hasattr(norm, "group_size")
    assert_alike(changed, results(norm, x), torch.float32)


@pytest.mark.parametrize("make, rounding", [(foreign.GatedByQwen, "llama"), (foreign.GatedBehind, "torch")])
def test_the_rounding_of_a_narrow_norm(make, rounding):
    """Verification tells the roundings apart by what few elements there are."""
    norm = make(4)
    assert fastnorm.convert(norm).swapped and norm.rounding == rounding


def test_what_is_no_gate_is_run_once():
    norm, calls, x_hat = foreign.AfterResidual(16), [], foreign.AfterResidual.x_hat
    with mock.patch.object(foreign.AfterResidual, "x_hat", lambda *args: calls.append(1) or x_hat(*args)):
        assert fastnorm.convert(norm).left
    assert len(calls) == 1


def test_a_norm_alone_and_twice():
    norm = nn.LayerNorm(8)
    (swapped,) = fastnorm.convert(norm).swapped
    assert swapped.name == "" and type(norm) is fastnorm.LayerNorm
    (left,) = fastnorm.convert(norm).left
    assert "already" in left.reason
    fastnorm.revert(norm)
    assert type(norm) is nn.LayerNorm


def test_meta_and_inference_mode():
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8), foreign.LlamaLike(8))
    with torch.inference_mode():
        assert len(fastnorm.convert(model).swapped) == 2
    assert all(p.is_meta for p in model.parameters())


def test_report():
    model = nn.Sequential(nn.LayerNorm(8), nn.InstanceNorm2d(8), foreign.LlamaLike(8))
    with fastnorm.use("reference"):
        report = fastnorm.convert(model)
    assert str(report).splitlines() == [
        "name  from                     to (fastnorm)              backend    reason when left",
        "----  -----------------------  -------------------------  ---------  ------------------------------",
        "0     torch.nn.LayerNorm       LayerNorm                  reference",
        "1     torch.nn.InstanceNorm2d  –                          –          fastnorm has no InstanceNorm2d",
        "2     helpers.LlamaLike        RMSNorm(rounding='llama')  reference",
        "2 norms swapped, 1 left",
    ]
    document = json.loads(json.dumps(report.to_dict()))
    assert document["swapped"] == 2 and document["left"] == 1 and document["norms"][2]["backend"] == "reference"


def test_a_backend_that_cannot_serve_is_reported():
    if not NATIVE:
        pytest.skip("needs a second backend that is there")
    with mock.patch.multiple(fastnorm.backend, _native_devices=(), _served=None), fastnorm.use("native"):
        (left,) = fastnorm.convert(nn.Sequential(nn.GroupNorm(2, 8))).left
    assert "names a backend that can't serve this call: not built for cpu" in left.reason
