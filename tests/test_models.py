"""convert on real models: outputs and trainings agree with the original's, whatever torch does with the model.

Every model goes through every condition in `make test-models`; `make test` has timm's models in float32, bfloat16 and
activation checkpointing. nfnet_l0 has no norms: its trainings compare fastnorm's adaptive clipping with timm's.
"""

import contextlib
import copy
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm.convert import adapted, measure
from helpers.model_zoo import DIFFUSERS, MODELS, TIMM, TRANSFORMERS, Case, class_of_transformers, output_of, train
from helpers.processes import in_processes

all_models = pytest.mark.parametrize("name", MODELS)
# timm is among the extras that `make test` installs; transformers and diffusers are not
some_are_slow = pytest.mark.parametrize(
    "name", [*TIMM, *(pytest.param(name, marks=pytest.mark.models) for name in TRANSFORMERS | DIFFUSERS)]
)
slow = pytest.mark.models
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_kernels")]
INDUCTOR = ("resnet18", "vit_tiny", "Llama", "Gemma")
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}  # of losses: 20 steps let the rounding of the first one grow
# of losses and outputs in bfloat16: two roundings of the same network part by a few per cent
COARSE = {"rtol": 5e-2, "atol": 3e-2}


def timm_clip(*args) -> None:
    from timm.utils.agc import adaptive_clip_grad

    adaptive_clip_grad(*args)


CLIPS = timm_clip, fastnorm.adaptive_clip_grad_


def pair(name: str) -> tuple[nn.Module, nn.Module, Case]:
    """The original, its converted copy, and the case."""
    case = MODELS[name]
    original = case.make()
    return original, converted(original, case), case


def converted(original: nn.Module, case: Case) -> nn.Module:
    model = copy.deepcopy(original)
    report = fastnorm.convert(model)
    assert len(report.swapped) == case.norms and not report.left, str(report)
    return model


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    return case.batch(torch.Generator().manual_seed(7))


def outputs_of(model: nn.Module, case: Case) -> torch.Tensor:
    """In evaluation, without a graph."""
    with torch.no_grad():
        return output_of(model.eval(), batch_of(case))


def unchanged(model: nn.Module) -> nn.Module:
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    if hasattr(model, "set_grad_checkpointing"):  # timm's
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@functools.cache
def trained(
    name: str, changed: Callable[[nn.Module], nn.Module] = unchanged, autocast: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's losses, and its outputs afterwards."""
    case = MODELS[name]
    model = changed(case.make())
    losses = train(model, case, CLIPS[0], autocast=autocast)
    assert losses[-1] < 0.9 * losses[0], "it learns"
    return losses, outputs_of(model, case)


def check_training(name: str, changed: Callable[[nn.Module], nn.Module] = unchanged, autocast: bool = False) -> None:
    """The converted model, with something done to it, trains as the original does, and ends where that does."""
    # checkpointing computes each forward twice, which moves running statistics twice, stock's too
    losses, outputs = trained(name, changed if changed is checkpointed else unchanged, autocast)
    _, model, case = pair(name)
    model = changed(model)
    tolerance = COARSE if autocast else TOLERANCE
    torch.testing.assert_close(train(model, case, CLIPS[1], autocast=autocast), losses, **tolerance)
    if not autocast:  # there, what 20 steps have made of the parameters differs too much between two roundings
        torch.testing.assert_close(outputs_of(model, case), outputs, rtol=2e-2, atol=2e-2)


@some_are_slow
def test_float32(name):
    check_training(name)


@some_are_slow
def test_bfloat16_autocast(name):
    original, model, case = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs_of(model, case), outputs_of(original, case), **COARSE)
    check_training(name, autocast=True)


@some_are_slow
def test_activation_checkpointing(name):
    check_training(name, checkpointed)


@some_are_slow
def test_estimates_time_every_norm(name, monkeypatch):
    """But those that a modulated norm computes itself."""
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(measure, "SAMPLE", 0.0)
    case = MODELS[name]
    model, batch = case.make().train(), batch_of(case)
    report = fastnorm.convert(model)
    if not case.norms:
        with pytest.raises(ValueError, match="convert swapped no norm"):
            report.estimate(batch["x"])
        return
    before = copy.deepcopy(model.state_dict())
    found = report.estimate(batch["x"]) if "x" in batch else report.estimate(**batch)
    swapped = {norm.name for norm in report.swapped}
    timed = {name for name in swapped if name.rpartition(".")[0] not in swapped}
    assert sorted(name for norm in found.norms for name in norm.names) == sorted(timed)
    assert all(norm.training is not None for norm in found.norms)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@slow
@all_models
def test_compiled(name):
    """Some by Inductor, whose C++ compiler takes a minute a model; the others up to where Inductor begins."""
    backend = "inductor" if name in INDUCTOR else "aot_eager"
    with fastnorm.use(None):  # as users have it: the formula is traced
        check_training(name, lambda model: torch.compile(model, backend=backend))
    torch._dynamo.reset()


@slow
@all_models
def test_exported(name):
    """In evaluation, and in training mode: the exported program is trained."""
    original, model, case = pair(name)
    batch = batch_of(case)
    with fastnorm.use(None):
        program = export(model.eval(), batch)
        outputs = output_of(program, batch)
        torch.testing.assert_close(outputs, output_of(original.eval(), batch), rtol=1e-3, atol=1e-4)
        losses = train(export(model.train(), batch), case, CLIPS[1])
    torch.testing.assert_close(losses, trained(name)[0], **TOLERANCE)


def export(model: nn.Module, batch: dict[str, torch.Tensor]) -> nn.Module:
    inputs = ((batch["x"],), {}) if "x" in batch else ((), batch)
    return torch.export.export(model, *inputs, strict=False).module()


@slow
@pytest.mark.parametrize("way", ["deepcopy", "save", "state_dict"])
@all_models
def test_copied_saved_and_loaded(name, way):
    """What comes out is equal bit by bit, trains as the original, and can be given its own classes back."""
    original, model, case = pair(name)
    expected = outputs_of(model, case)
    ways = {"deepcopy": copy.deepcopy, "save": reloaded, "state_dict": lambda m: with_state(original, case, m)}
    other = ways[way](model)
    assert torch.equal(outputs_of(other, case), expected)
    check_training(name, lambda _: other.train())
    fastnorm.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in original.modules()]


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_state(original: nn.Module, case: Case, model: nn.Module) -> nn.Module:
    """The state of a converted model in an original, and from there in one that is converted anew."""
    plain = copy.deepcopy(original)
    plain.load_state_dict(model.state_dict())
    new = converted(original, case)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    new.load_state_dict(plain.state_dict())
    return new


@slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_cast_to_bfloat16_after_the_conversion(name):
    """Dtypes between the layers are the original's: a mixture would raise in the next Linear."""
    original, model, case = pair(name)
    outputs = [outputs_of(m.to(torch.bfloat16), case) for m in (model, original)]
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)


@some_are_slow
def test_reverted_after_training(name):
    original, model, case = pair(name)
    train(model, case, CLIPS[1], steps=2)
    expected = outputs_of(model, case)
    assert len(fastnorm.revert(model)) == case.norms
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    torch.testing.assert_close(outputs_of(model, case), expected, rtol=1e-3, atol=1e-3)


LLAMA, ONE_PLUS, ONCE = "RMSNorm(rounding='llama')", "RMSNorm(zero_centered=True)", "RMSNorm"
NORMS_OF_TRANSFORMERS = {
    "llama.LlamaRMSNorm": LLAMA,
    "llama4.Llama4TextRMSNorm": LLAMA,
    "llama4.Llama4TextL2Norm": "UnweightedRMSNorm",
    "mistral.MistralRMSNorm": LLAMA,
    "mixtral.MixtralRMSNorm": LLAMA,
    "qwen2.Qwen2RMSNorm": LLAMA,
    "qwen3.Qwen3RMSNorm": LLAMA,
    "qwen3_moe.Qwen3MoeRMSNorm": LLAMA,
    "qwen3_next.Qwen3NextRMSNorm": ONE_PLUS,
    "gemma.GemmaRMSNorm": ONE_PLUS,
    "gemma2.Gemma2RMSNorm": ONE_PLUS,
    "gemma3.Gemma3RMSNorm": ONE_PLUS,
    "gemma3n.Gemma3nRMSNorm": ONCE,
    "t5.T5LayerNorm": "WeightTypedRMSNorm",
    "phi3.Phi3RMSNorm": LLAMA,  # Phi 1 to 2 have torch.nn.LayerNorm
    "phi4_multimodal.Phi4MultimodalRMSNorm": LLAMA,
    "deepseek_v2.DeepseekV2RMSNorm": LLAMA,
    "deepseek_v3.DeepseekV3RMSNorm": LLAMA,
    "olmo.OlmoLayerNorm": "LayerNorm",
    "olmo2.Olmo2RMSNorm": ONCE,
    "olmo3.Olmo3RMSNorm": ONCE,
    "olmoe.OlmoeRMSNorm": LLAMA,
    "gpt_oss.GptOssRMSNorm": ONCE,
    "granite.GraniteRMSNorm": LLAMA,
    "cohere.CohereLayerNorm": "LayerNorm",
    "nemotron.NemotronLayerNorm1P": "LayerNorm(zero_centered=True)",
    "glm4.Glm4RMSNorm": LLAMA,
    "mamba2.Mamba2RMSNorm": LLAMA,
    "convnext.ConvNextLayerNorm": "LayerNorm",
}
GATE_FIRST, SIGMOID = "GatedRMSNorm(norm_before_gate=False, {}rounding='llama')", "GatedRMSNorm(activation='sigmoid')"
IN_GROUPS = GATE_FIRST.format("group_size=8, ")
# the arguments beside the width of 32, and what becomes of it
GATED_NORMS_OF_TRANSFORMERS = {
    "mamba2.MambaRMSNormGated": ({"group_size": 8}, IN_GROUPS),
    "bamba.BambaRMSNormGated": ({"group_size": 32}, GATE_FIRST.format("")),
    "zamba2.Zamba2RMSNormGated": ({"group_size": 8}, IN_GROUPS),
    "nemotron_h.NemotronHRMSNormGated": ({"group_size": 8}, IN_GROUPS),
    "granitemoehybrid.GraniteMoeHybridRMSNormGated": ({"group_size": 8}, IN_GROUPS),
    "falcon_h1.FalconH1RMSNormGated": (
        {"n_groups": 4, "norm_before_gate": False}, "GatedRMSNorm(norm_before_gate=False, group_size=8)"
    ),
    "qwen3_next.Qwen3NextRMSNormGated": ({}, "GatedRMSNorm(rounding='llama')"),
    "qwen3_5.Qwen3_5RMSNormGated": ({}, "GatedRMSNorm(rounding='llama')"),
    "qwen3_5_moe.Qwen3_5MoeRMSNormGated": ({}, "GatedRMSNorm(rounding='llama')"),
    "qwen4_exp.Qwen4ExpTextRMSNormGated": (
        {"activation": "sigmoid"}, "GatedRMSNorm(activation='sigmoid', rounding='llama')"
    ),
    "olmo_hybrid.OlmoHybridRMSNormGated": ({}, "GatedRMSNorm(rounding='llama')"),
    "kimi_linear.KimiLinearRMSNormGated": ({}, SIGMOID),
    "bailing_hybrid.BailingHybridRMSNormGated": ({}, SIGMOID),
    "glm5_next.Glm5NextTextRMSNormGated": ({}, SIGMOID),
    "lara_mini.LaraMiniRMSNormGated": ({}, "GatedRMSNorm"),
}


NORMS_OF_TIMM = {
    "LayerNorm": "LayerNorm",
    "LayerNorm2d": "LayerNorm2d",
    "RmsNorm": "RMSNorm",
    "RmsNorm2d": "RMSNorm2d(rounding='llama', keeps_layout=True)",
    "GroupNorm1": "GroupNorm",
    "GroupNorm1Act": "GroupNormAct",
    "LayerNormAct": "LayerNormAct",
    "LayerNormAct2d": "LayerNormAct2d",
    "RmsNormAct2d": "RMSNormAct2d(rounding='llama', keeps_layout=True)",
    "BatchNormAct2d": "BatchNormAct2d",
    "FrozenBatchNormAct2d": None,
    "SimpleNorm2d": None,  # no root mean square: the variance
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "name, act", [(n, act) for n in NORMS_OF_TIMM for act in (None, "relu", "silu", "prelu")[: 4 if "Act" in n else 1]]
)
def test_norms_of_timm(name, act, memory_format):
    """With every kind of activation and a dropout, in both modes; values, buffers and strides."""
    layers = pytest.importorskip("timm.layers")
    options = {"act_layer": act, "apply_act": act is not None} if "Act" in name else {}
    if name == "BatchNormAct2d":
        options["drop_layer"] = functools.partial(nn.Dropout2d, 0.3)
    original = getattr(layers, name)(16, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter, 1.0)
    model = copy.deepcopy(original)
    (norm,) = fastnorm.convert(model).norms
    assert norm.replacement == NORMS_OF_TIMM[name], norm.reason
    x = torch.randn(3, 16, 6, 5).contiguous(memory_format=memory_format)
    x = x if "2d" in name or "Group" in name else x.movedim(1, -1)
    for training in (True, False):
        outputs = []
        for m in (model, original):
            torch.manual_seed(1)
            outputs.append(m.train(training)(x.clone(memory_format=torch.preserve_format)))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert outputs[0].stride() == outputs[1].stride()
        torch.testing.assert_close(list(model.buffers()), list(original.buffers()))


NORMS_OF_DIFFUSERS = {
    "FP32LayerNorm": [({}, "LayerNorm"), ({"bias": False}, "LayerNorm"), ({"elementwise_affine": False}, "LayerNorm")],
    "RMSNorm": [
        ({}, "WeightTypedRMSNorm"), ({"elementwise_affine": False}, "UnweightedRMSNorm"), ({"bias": True}, None)
    ],
    "MochiRMSNorm": [({}, "RMSNorm")],
}  # fmt: skip


@slow
@pytest.mark.parametrize(
    "name, options, replacement", [(name, *case) for name, cases in NORMS_OF_DIFFUSERS.items() for case in cases]
)
def test_norms_of_diffusers(name, options, replacement):
    """In float32 and bfloat16, and in mixtures of both: values, gradients and dtypes."""
    module = pytest.importorskip("diffusers.models.normalization", reason="`make test-models` installs it")
    original = getattr(module, name)(32, eps=1e-5, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter, 1.0)
    norm = copy.deepcopy(original)
    (report,) = fastnorm.convert(norm).norms
    assert report.replacement == replacement, report.reason
    for parameters, dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        results = []
        for m in (norm.to(parameters), original.to(parameters)):
            torch.manual_seed(0)
            x = torch.randn(3, 5, 32).to(dtype).requires_grad_()
            y, dy = m(x), torch.randn(3, 5, 32)  # of Σ y² without a weight, the gradient would be rounding alone
            results.append([y, *torch.autograd.grad((y.float() * dy).sum(), [x, *m.parameters()])])
        tolerance = {} if parameters == dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            scale = expected.abs().max()
            torch.testing.assert_close(actual / scale, expected / scale, **tolerance)


EMBEDDINGS = {"AdaLayerNorm": "temb"} | dict.fromkeys(
    ("AdaLayerNormContinuous", "LuminaLayerNormContinuous"), "conditioning_embedding"
)  # else emb
COGVIDEO = {"output_dim": 64, "norm_elementwise_affine": True, "chunk_dim": 1}
BARE, BY_RMS = {"elementwise_affine": False}, {"norm_type": "rms_norm"}
# arguments, options, the shape of the embedding or the number of its rows in a table, what is computed in one kernel
ADAPTIVE_NORMS_OF_DIFFUSERS = {
    "AdaLayerNorm": [((32,), {}, (32,), "layer"), ((32, 10), {}, 10, "layer"), ((8,), COGVIDEO, (2, 8), "layer")],
    "AdaLayerNormZero": [((32,), {}, (2, 32), "layer"), ((32,), {"norm_type": "fp32_layer_norm"}, (2, 32), "layer")],
    "AdaLayerNormZeroSingle": [((32,), {}, (2, 32), "layer"), ((32,), {"bias": False}, (1, 32), "layer")],
    "AdaLayerNormContinuous": [
        ((32, 8), {}, (2, 8), "layer"), ((32, 8), BARE, (2, 8), "layer"), ((32, 8), {"bias": False}, (2, 8), "layer"),
        ((32, 8), BY_RMS, (2, 8), "rms"), ((32, 8), BY_RMS | BARE, (2, 8), "rms"),
    ],
    "SD35AdaLayerNormZeroX": [((32,), {}, (2, 32), "layer")],
    "LuminaRMSNormZero": [((32, 1e-5, True), {}, (2, 32), "rms")],
    "LuminaLayerNormContinuous": [
        ((32, 8), {"out_dim": 6}, (2, 8), "layer"), ((32, 8), BARE, (2, 8), "layer"), ((32, 8), BY_RMS, (2, 8), "rms")
    ],
}  # fmt: skip


@slow
@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast", "autocast of bfloat16"])
@pytest.mark.parametrize(
    "name, arguments, options, embedded, kind",
    [(name, *case) for name, cases in ADAPTIVE_NORMS_OF_DIFFUSERS.items() for case in cases],
)
def test_adaptive_norms_of_diffusers(name, arguments, options, embedded, kind, way):
    """Norm and modulation in one kernel: every output and gradient, and their dtypes."""
    module = pytest.importorskip("diffusers.models.normalization", reason="`make test-models` installs it")
    original = getattr(module, name)(*arguments, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    norm = copy.deepcopy(original)
    report, inner = fastnorm.convert(norm).norms
    assert (report.original, report.replacement) == (f"diffusers.{name}", name), report.reason
    assert inner.name == "norm" and inner.replacement
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    results = []
    for m in (norm.to(dtype), original.to(dtype)):
        torch.manual_seed(0)
        x = (1 + torch.randn(2, 5, 32)).to(torch.bfloat16 if "bfloat16" in way else dtype).requires_grad_()
        if isinstance(embedded, int):
            inputs, leaves = {"timestep": torch.tensor(3)}, [x]
        else:
            embedding = torch.randn(embedded).to(dtype).requires_grad_()
            inputs, leaves = {EMBEDDINGS.get(name, "emb"): embedding}, [x, embedding]
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way), modulations() as calls:
            y = m(x, **inputs)
        assert len(calls) == (m is norm) * (2 if name.startswith("SD35") else 1)
        assert set(calls) <= {f"modulated_{kind}_norm"}
        outputs = y if isinstance(y, tuple) else (y,)
        dys = [torch.randn(output.shape).to(output) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [*leaves, *m.parameters()], dys)])
    tolerance = {} if way == "float32" else {"rtol": 5e-2, "atol": 5e-2}
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        scale = expected.abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, **tolerance)


@contextlib.contextmanager
def modulations() -> Iterator[list[str]]:
    """The modulated norms that converted norms call meanwhile, by their names."""
    calls: list[str] = []

    norm = adapted.modulated_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "modulated_norm", lambda op, *args, **kw: calls.append(op) or norm(op, *args, **kw))
        yield calls


@slow
def test_an_adaptive_norm_keeps_all_but_its_class():
    """Name, children, state, copies; a hook of the norm in it still sees the norm run; an embedding of other shapes."""
    module = pytest.importorskip("diffusers.models.normalization", reason="`make test-models` installs it")
    original, x, emb = module.AdaLayerNormZeroSingle(32), torch.randn(2, 5, 32), torch.randn(2, 32)
    norm = copy.deepcopy(original)
    assert len(fastnorm.convert(norm).swapped) == 2
    assert repr(norm) == "Fast" + repr(original) and isinstance(norm, module.AdaLayerNormZeroSingle)
    assert [*norm.state_dict()] == [*original.state_dict()]
    assert vars(norm).keys() - vars(original).keys() == {"_fastnorm_original"}
    expected = original(x, emb)
    for other in (norm, copy.deepcopy(norm), reloaded(norm)):
        with modulations() as calls:
            torch.testing.assert_close(other(x, emb), expected)
        assert calls
        assert all("already" in report.reason for report in fastnorm.convert(other).norms)
    torch.testing.assert_close(norm(x[:1], emb), original(x[:1], emb))  # broadcast as before
    seen = []
    handle = norm.norm.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(norm(x, emb), expected)
    handle.remove()
    assert seen
    assert fastnorm.revert(norm) == ("", "norm")
    assert [type(m) for m in norm.modules()] == [type(m) for m in original.modules()]
    assert vars(norm).keys() == vars(original).keys()


def _scaled_by_scale(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return self.norm(x) * scale[:, None] + shift[:, None], gate


def _in_another_order(self, x, emb=None):
    scale, shift, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


def _with_another_gate(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate.tanh()


def _with_another_eps(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return nn.functional.layer_norm(x, (32,), eps=1e-5) * (1 + scale[:, None]) + shift[:, None], gate


def _with_other_arguments(self, x, emb, mask=None):
    return _scaled_by_scale(self, x, emb)


@slow
@pytest.mark.parametrize(
    "forward, reason",
    [(_scaled_by_scale, "differs by"), (_in_another_order, "differs by"), (_with_another_gate, "output 2 differs by"),
     (_with_another_eps, "differs by"), (_with_other_arguments, "forward takes (x, emb, mask)")],
)  # fmt: skip
def test_adaptive_norms_that_compute_something_else_are_left(forward, reason):
    module = pytest.importorskip("diffusers.models.normalization", reason="`make test-models` installs it")
    original = type("AdaLayerNormZeroSingle", (module.AdaLayerNormZeroSingle,), {"forward": forward})(32)
    nn.init.zeros_(original.linear.weight)  # as trainings of adaLN-Zero start: no modulation shows
    norm = copy.deepcopy(original)
    report, inner = fastnorm.convert(norm).norms
    assert report.replacement is None and reason in report.reason and inner.replacement == "LayerNorm"
    x, emb = torch.randn(2, 5, 32), torch.randn(2, 32)
    torch.testing.assert_close(norm(x, emb), original(x, emb))
    (without_kind,) = fastnorm.convert(module.AdaLayerNormZeroSingle(32), norms=("rms",)).left[:1]
    assert "'layer' is not among the norms asked for" in without_kind.reason


def test_the_documentation_names_what_is_tested():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith(("| t", "| d"))]
    found = {model.split()[1]: norms for model, norms in rows}
    assert set(found) == set(MODELS)
    assert all(str(case.norms or "none") in found[name] for name, case in MODELS.items())
    paths = (*NORMS_OF_TRANSFORMERS, *GATED_NORMS_OF_TRANSFORMERS)
    for path in (*(path.partition(".")[2] for path in paths), *NORMS_OF_TIMM, *NORMS_OF_DIFFUSERS,
                 *ADAPTIVE_NORMS_OF_DIFFUSERS):  # fmt: skip
        assert path in text


@slow
@pytest.mark.parametrize("path", GATED_NORMS_OF_TRANSFORMERS)
def test_gated_norms_of_transformers(path):
    """Each by order, activation, groups and rounding, in float32 and in bfloat16, by position and by keyword."""
    options, replacement = GATED_NORMS_OF_TRANSFORMERS[path]
    original, x, gate = class_of_transformers(path)(32, **options), torch.randn(3, 5, 32), 3 * torch.randn(3, 5, 32)
    nn.init.normal_(original.weight)
    norm = copy.deepcopy(original)
    (swapped,) = fastnorm.convert(norm).swapped
    assert swapped.replacement == replacement
    for parameters, dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        results = []
        for module in (norm.to(parameters), original.to(parameters)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, gate)]
            y = module(leaves[0], gate=leaves[1])
            assert torch.equal(module(*leaves), y)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), [*leaves, module.weight])])
        tolerance = {} if parameters == dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
        for actual, expected in zip(*results, strict=True):
            scale = expected.abs().max()
            torch.testing.assert_close(actual / scale, expected / scale, **tolerance)


@slow
@pytest.mark.parametrize("path", NORMS_OF_TRANSFORMERS)
def test_norms_of_transformers(path):
    """Each by what it computes: rounding twice or once, 1 + w, no weight, a weight that decides the dtype."""
    cls = class_of_transformers(path)
    norm, x = (cls() if "L2" in path else cls(32)), torch.randn(3, 5, 32)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    expected = norm(x)
    (swapped,) = fastnorm.convert(norm).swapped
    assert swapped.replacement == NORMS_OF_TRANSFORMERS[path]
    torch.testing.assert_close(norm(x), expected)


# gated norms of transformers: the options with which GatedRMSNorm computes the same
MAMBA = {"norm_before_gate": False, "group_size": 16}
GATED_OPTIONS = {
    "qwen3_next.Qwen3NextRMSNormGated": ({}, {}),
    "qwen3_5.Qwen3_5RMSNormGated": ({}, {}),
    "mamba2.MambaRMSNormGated": ({"group_size": 16}, MAMBA),
    "zamba2.Zamba2RMSNormGated": ({"group_size": 8}, MAMBA | {"group_size": 8}),
}


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", GATED_OPTIONS)
def test_gated_rms_norm_against_transformers(path, dtype, device):
    """In value, from their state, with a weight in x's dtype and one in float32; and every gradient."""
    cls = class_of_transformers(path)
    own, options = GATED_OPTIONS[path]
    norm, ours = cls(48, eps=1e-3, **own), fastnorm.GatedRMSNorm(48, 1e-3, rounding="llama", **options)
    nn.init.normal_(norm.weight)
    ours.load_state_dict(norm.state_dict())
    for weight in (torch.float32, dtype):
        results = []
        for module in (norm.to(device, weight), ours.to(device, weight)):
            torch.manual_seed(0)
            x, gate = (torch.randn(3, 5, 48).to(device, dtype).requires_grad_() for _ in range(2))
            y = module(x, gate)
            dy = torch.randn(3, 5, 48).to(y)
            results.append([y, *torch.autograd.grad(y, [x, gate, module.weight], dy)])
        (expected, *gradients), (y, *found) = results
        # with a 16-bit weight, transformers' round once more: the product with it
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=unit, atol=1e-6)
        for actual, right in zip(found, gradients, strict=True):
            assert actual.dtype == right.dtype
            torch.testing.assert_close(actual, right, rtol=0, atol=8 * unit * right.abs().max().item())


@pytest.mark.parametrize("name, node", [("resnet18", "layer1.0.bn1"), ("vit_tiny", "blocks.1.norm2")])
def test_feature_extraction(name, node):
    """torch.fx's tracing, which timm and torchvision take features out with, in training and in evaluation."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    original, model, case = pair(name)
    x = batch_of(case)["x"]
    extractors = [feature_extraction.create_feature_extractor(m, {node: "y"}) for m in (model, original)]
    for training in (True, False):
        torch.testing.assert_close(*(e.train(training)(x)["y"] for e in extractors), rtol=1e-3, atol=1e-4)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What fully_shard is applied to one by one: the blocks or stages, by the names that these models have for them."""
    for name in ("blocks", "stages"):  # timm's transformers, ConvNeXts and NFNets
        if hasattr(model, name):
            return list(getattr(model, name))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        return [model.layer1, model.layer2]
    # diffusers' DiT reads the embedding in its first block outside of that block: the root gathers it
    reads_first = type(getattr(model, "model", None)).__name__ == "DiTTransformer2DModel"
    return list(lists[0])[reads_first:]


def _wrapped(kind: str, model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _in_two_processes(rank: int, kind: str, name: str) -> None:
    original, model, case = pair(name)
    # timm's clip knows no DTensors; DDP trains by the same rule
    stock = _wrapped("ddp" if case.clipped else kind, original)
    expected = train(stock, case, CLIPS[0], rank=rank)
    assert expected[-1] < expected[0]
    wrapped = _wrapped(kind, model)
    torch.testing.assert_close(train(wrapped, case, CLIPS[1], rank=rank), expected, **TOLERANCE)
    torch.testing.assert_close(outputs_of(wrapped, case), outputs_of(stock, case), rtol=2e-2, atol=2e-2)


@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@all_models
def test_two_processes(name, kind, tmp_path, monkeypatch):
    package = "timm" if name in TIMM else "diffusers" if name in DIFFUSERS else "transformers"
    pytest.importorskip(package, reason="`make test-models` installs it")
    # with nothing named, as users have it: an AGC of shards takes kernels and, where ranks share a unit, the formula
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    in_processes(2, _in_two_processes, tmp_path, kind, name)


def test_adaptive_clipping_has_something_to_clip():
    """Else the trainings of nfnet_l0 would agree whatever the clip does."""
    case = MODELS["nfnet_l0"]
    ratios = []

    def clip(parameters: list[nn.Parameter], factor: float) -> None:
        before = sum(p.grad.square().sum() for p in parameters)
        fastnorm.adaptive_clip_grad_(parameters, factor)
        ratios.append(sum(p.grad.square().sum() for p in parameters) / before)

    train(case.make(), case, clip, steps=3)
    assert max(ratios) < 0.9
