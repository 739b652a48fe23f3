"""Models that Hugging Face's package `kernels` gives fastnorm's forward: they compute what they did before."""

import copy
import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm.convert import hub
from helpers import foreign_norms as foreign
from helpers.model_zoo import MODELS, class_of_transformers, loss_of, output_of

pytestmark = pytest.mark.usefixtures("compiled_kernels")
models = pytest.mark.models  # `make test-models` installs kernels and transformers
# How many norms transformers has a name of the hub for. Mamba 2's have none, of Qwen3-Next the gated one has one.
NORMS = {"Llama": 5, "Qwen3": 9, "Mamba2": 0, "Qwen3Next": 1, "FalconH1": 5}
COARSE = {"rtol": 5e-2, "atol": 3e-2}  # two roundings of one network to bfloat16


def kernelized(model: nn.Module, mode: str = "TRAINING", device: str = "cpu", mapping: dict | None = None) -> nn.Module:
    """mode: names of kernels.Mode, with a + between them."""
    import kernels

    first, *others = (kernels.Mode[name] for name in mode.split("+"))
    for other in others:
        first = first | other
    with kernels.use_kernel_mapping(mapping or fastnorm.hub_layers(), inherit_mapping=False):
        return kernels.kernelize(model, mode=first, device=device)


def served(model: nn.Module) -> list[nn.Module]:
    """The modules whose last forward was fastnorm's."""
    return [module for module in model.modules() if vars(module).get("_fastnorm_call") is not None]


def named(cls: type, name: str) -> type:
    """A subclass with a layer's name, as the decorator `kernels.use_kernel_forward_from_hub` gives it one."""
    import kernels

    return kernels.use_kernel_forward_from_hub(name)(type(f"Named{cls.__name__}", (cls,), {}))


@pytest.fixture
def names_of_transformers(monkeypatch):
    """Gives classes the names in transformers' sources. It does so itself only beside the version of kernels that it
    asks for, which need not be the installed one."""
    pytest.importorskip("kernels", reason="`make test-models` installs it")

    def give(model: nn.Module) -> nn.Module:
        for cls in {type(module) for module in model.modules() if type(module).__module__.startswith("transformers.")}:
            decorator = re.match(r'@use_kernel_forward_from_hub\("(\w*Norm\w*)"\)', inspect.getsource(cls))
            if decorator and not hasattr(cls, "kernel_layer_name"):
                monkeypatch.setattr(cls, "kernel_layer_name", decorator[1], raising=False)
        return model

    return give


def results(model: nn.Module, batch: dict, autocast: bool = False) -> list[torch.Tensor]:
    """Outputs and the gradient of every parameter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, batch)
        outputs = output_of(model, batch)
    model.zero_grad()
    loss.backward()
    return [outputs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_alike(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        scale = b.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(a / scale, b / scale, **tolerance)


@models
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("name", NORMS)
def test_training(name, autocast, names_of_transformers):
    case = MODELS[name]
    original, batch = case.make(), case.batch(torch.Generator().manual_seed(7))
    model = kernelized(names_of_transformers(copy.deepcopy(original)))
    tolerance = COARSE if autocast else {"rtol": 1e-4, "atol": 1e-4}
    assert_alike(results(model, batch, autocast), results(original, batch, autocast), **tolerance)
    assert len(served(model)) == NORMS[name]
    assert not served(original) and not any("forward" in vars(module) for module in original.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert list(model.state_dict()) == list(original.state_dict())


@models
@pytest.mark.parametrize("mode", ["INFERENCE", "INFERENCE+TORCH_COMPILE"])
def test_inference(mode, names_of_transformers):
    case = MODELS["Qwen3"]
    original, batch = case.make().eval(), case.batch(torch.Generator().manual_seed(7))
    model = kernelized(names_of_transformers(copy.deepcopy(original)), mode)
    with torch.inference_mode():
        torch.testing.assert_close(output_of(model, batch), output_of(original, batch), rtol=1e-4, atol=1e-5)
    assert len(served(model)) == NORMS["Qwen3"]


@models
@pytest.mark.parametrize("name", ["Llama", "Qwen3Next"])
def test_compiled(name, names_of_transformers):
    """Before any eager call: the compiler asks what each norm computes while it traces."""
    case = MODELS[name]
    original, batch = case.make(), case.batch(torch.Generator().manual_seed(7))
    model = kernelized(names_of_transformers(copy.deepcopy(original)), "TRAINING+TORCH_COMPILE")
    with fastnorm.use(None):
        compiled = torch.compile(model, backend="aot_eager")
        assert_alike(results(compiled, batch), results(original, batch), rtol=1e-4, atol=1e-4)
    assert len(served(model)) == NORMS[name]
    torch._dynamo.reset()


LLAMA, ONCE = {"zero_centered": False, "rounding": "llama"}, {"zero_centered": False, "rounding": "torch"}
GATED = {"activation": "silu", "norm_before_gate": True, "group_size": None}
# One name stands for several norms: Llama's and OLMo's, Qwen3-Next's and Kimi Linear's.
CLASSES = {
    "llama.LlamaRMSNorm": ("RMSNorm", LLAMA),
    "olmo2.Olmo2RMSNorm": ("RMSNorm", ONCE),
    "gpt_oss.GptOssRMSNorm": ("RMSNorm", ONCE),
    "nemotron_h.NemotronHRMSNorm": ("RMSNorm", ONCE),
    "deepseek_v3.DeepseekV3RMSNorm": ("RMSNorm", LLAMA),
    "qwen3_5.Qwen3_5RMSNorm": ("RMSNormZeroCentered", {"zero_centered": True, "rounding": "torch"}),
    "qwen3_next.Qwen3NextRMSNormGated": ("RMSNormGated", LLAMA | GATED),
    "olmo_hybrid.OlmoHybridRMSNormGated": ("RMSNormGated", LLAMA | GATED),
    "kimi_linear.KimiLinearRMSNormGated": ("RMSNormGated", ONCE | GATED | {"activation": "sigmoid"}),
}


@models
@pytest.mark.parametrize("path", CLASSES)
def test_classes_of_transformers(path, names_of_transformers):
    """Each by what it computes, in every mixture of dtypes; a model that is cast later stays right."""
    name, options = CLASSES[path]
    original = names_of_transformers(class_of_transformers(path)(32))
    nn.init.normal_(original.weight)
    assert type(original).kernel_layer_name == name
    norm = kernelized(copy.deepcopy(original))
    for parameters in (torch.float32, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for autocast in (False, True):
                rows = []
                for module in (norm.to(parameters), original.to(parameters)):
                    torch.manual_seed(0)
                    inputs = [torch.randn(3, 5, 32).to(dtype).requires_grad_() for _ in range(1 + ("Gated" in name))]
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        y = module(*inputs)
                    rows.append([y, *torch.autograd.grad(y.float().square().sum(), [*inputs, module.weight])])
                exact = parameters == dtype == torch.float32
                assert_alike(*rows, **({"rtol": 1e-5, "atol": 1e-5} if exact else COARSE))
    found = dict(served(norm)[0]._fastnorm_call.options)
    assert found.pop("out_dtype") is None and found == options


@models
def test_gates_that_only_the_original_takes(names_of_transformers):
    original = names_of_transformers(class_of_transformers("qwen3_next.Qwen3NextRMSNormGated")(32))
    norm, x, gate = kernelized(copy.deepcopy(original)), torch.randn(3, 5, 32), torch.randn(5, 1)
    assert torch.equal(norm(x, gate), original(x, gate))  # it broadcasts
    with pytest.raises(AttributeError):  # transformers' own
        norm(x, None)
    torch.testing.assert_close(norm(x, gate=x), original(x, gate=x))
    assert served(norm)


@models
@pytest.mark.parametrize("cls, name", [
    (foreign.Doubled, "RMSNorm"), (foreign.EpsOutside, "RMSNorm"), (foreign.Clamped, "RMSNorm"),
    (foreign.GatedByTanh, "RMSNormGated"), (foreign.WithState, "LayerNorm"), (fastnorm.RMSNorm, "RMSNorm"),
])  # fmt: skip
def test_a_norm_that_is_not_known_keeps_its_forward(cls, name):
    pytest.importorskip("kernels", reason="`make test-models` installs it")
    original = named(cls, name)(16)
    norm = kernelized(copy.deepcopy(original))
    inputs = [1e4 * torch.randn(4, 16) for _ in range(1 + ("Gated" in name))]
    assert torch.equal(norm(*inputs), original(*inputs)) and not served(norm)


@models
def test_layer_norm_of_torch():
    """A name for torch's own class, and one norm with parameters that change after the first forward."""
    pytest.importorskip("kernels", reason="`make test-models` installs it")
    original = named(nn.LayerNorm, "LayerNorm")(16)
    norm, x = kernelized(copy.deepcopy(original)), torch.randn(4, 16)
    for eps in (1e-5, 0.5):
        for module in (norm, original):
            module.eps = eps
            nn.init.constant_(module.weight, 1 + eps)
        torch.testing.assert_close(norm(x), original(x))
    assert served(norm)
    twin = copy.deepcopy(norm)
    nn.init.zeros_(twin.weight)
    assert not twin(x).any() and norm(x).any()  # a copy has its own parameters


@models
def test_another_name_of_eps():
    pytest.importorskip("kernels", reason="`make test-models` installs it")
    original = named(foreign.LlamaLike, "RMSNorm")(16)
    norm, x = kernelized(copy.deepcopy(original)), torch.randn(4, 16)
    torch.testing.assert_close(norm(x), original(x))
    norm.variance_epsilon = original.variance_epsilon = 1.0
    torch.testing.assert_close(norm(x), original(x))
    assert served(norm)


@models
@pytest.mark.parametrize("where", ["checkpoint", "inference", "default device", "autocast"])
def test_first_forward_under(where):
    """What the caller has going on doesn't reach the verification of the first forward."""
    pytest.importorskip("kernels", reason="`make test-models` installs it")
    original = named(nn.RMSNorm, "RMSNorm")(16)
    norm, x = kernelized(copy.deepcopy(original)), torch.randn(4, 16, requires_grad=True)
    hub._known.clear()
    if where == "checkpoint":  # it counts the tensors that are saved
        y = checkpoint(norm, x, use_reentrant=False)
        torch.autograd.grad(y.sum(), x)
    elif where == "inference":
        with torch.inference_mode():
            norm(x)
    elif where == "default device":
        with torch.device("meta"):
            norm(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            norm(x)
    assert served(norm)
    torch.testing.assert_close(norm(x), original(x))


@models
def test_before_the_hubs_layers_on_every_card(monkeypatch):
    """transformers registers its own, from the hub, at each kernelization: the narrower range of cards wins."""
    kernels = pytest.importorskip("kernels", reason="`make test-models` installs it")
    from kernels.layer.repos import _find_capability

    theirs = kernels.LayerRepository("kernels-community/liger-kernels", layer_name="LigerRMSNorm", version=3)
    norm, x = named(nn.RMSNorm, "RMSNorm")(16), torch.randn(4, 16)
    for capability in ((7, 5), (9, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        for device in ("cuda", "rocm"):
            _find_capability.cache_clear()
            with kernels.use_kernel_mapping(fastnorm.hub_layers(), inherit_mapping=False):
                kernels.register_kernel_mapping({"RMSNorm": {device: {kernels.Mode.TRAINING: theirs}}})
                kernels.kernelize(norm, mode=kernels.Mode.TRAINING, device=device)
            assert norm.forward.__func__ is hub.Norm.forward
    _find_capability.cache_clear()
    norm(x)
    kernelized(norm, mapping={"RMSNorm": {}})
    assert norm.forward.__func__ is nn.RMSNorm.forward  # another mapping takes it back


@models
def test_use_kernels_of_transformers(tmp_path):
    """Offline, from a folder, and again at each change of the training mode.

    In a process of its own, where transformers takes the installed version of kernels for the one that it asks for.
    """
    pytest.importorskip("kernels", reason="`make test-models` installs it")
    MODELS["Llama"].make().save_pretrained(tmp_path)
    program = f"""
        import socket, torch, kernels
        from transformers import utils
        utils.is_kernels_available = utils.import_utils.is_kernels_available = lambda *versions: True
        socket.socket.connect = None  # what would download something fails
        import transformers, fastnorm
        from fastnorm.convert import hub
        kernels.register_kernel_mapping(fastnorm.hub_layers())
        own = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, use_kernels=True)
        ids = torch.randint(1, 50, (2, 12))
        for training in (False, True, False):
            model.train(training)
            norms = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", 0) is hub.Norm.forward]
            torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-5)
            print(len(norms), sum(m._fastnorm_call is not None for m in norms))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.stdout.split() == ["5", "5"] * 3, run.stdout + run.stderr


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        fastnorm.hub_layers()
