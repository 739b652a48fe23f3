"""The benchmark's shapes of models are those that the models' norms get."""

import math

import pytest
import torch
from torch import nn

from bench.models import MODELS
from bench.presets import SHAPES
from fastnorm.convert.recognise import is_norm

pytestmark = [pytest.mark.models, pytest.mark.slow]
TIMM = {"resnet18": "resnet18", "resnet50": "resnet50", "mobilenetv3": "mobilenetv3_large_100",
        "convnext-atto": "convnext_atto", "vit-tiny": "vit_tiny_patch16_224"}  # fmt: skip


def shapes_of(model: nn.Module, batch: torch.Tensor) -> set[tuple[int, ...]]:
    """What its norms get: images where they are batch norms, else rows of what they normalise over."""
    found = set()

    def note(norm: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        shape = tuple(arguments[0].shape)
        if not isinstance(norm, nn.BatchNorm2d):
            cols = shape[1] if type(norm).__name__ == "LayerNorm2d" else shape[-1]
            shape = (math.prod(shape) // cols, cols)
        found.add(shape)

    for module in model.modules():
        if is_norm(module):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(batch)
    return found


@pytest.mark.parametrize(
    "preset",
    ["resnet18-8", "resnet18-32", "resnet50-8", "resnet50-32", "mobilenetv3-8", "convnext-atto-8", "vit-tiny-8"],
)
def test_shapes_of_timms_models(preset):
    timm = pytest.importorskip("timm")
    name, _, samples = preset.rpartition("-")
    with torch.device("meta"):
        found = shapes_of(timm.create_model(TIMM[name]), torch.empty(int(samples), 3, 224, 224))
    assert len(SHAPES[preset]) == len(found) and set(SHAPES[preset]) == found


def test_shapes_of_minilm():
    transformers = pytest.importorskip("transformers", reason="`make test-models` installs it")
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**sizes))
        assert shapes_of(model, torch.zeros(8, 128, dtype=torch.long)) == set(SHAPES["minilm"])


def test_shapes_of_a_llama():
    pytest.importorskip("transformers", reason="`make test-models` installs it")
    batch = torch.zeros(8, 256, dtype=torch.long)  # not on the meta device: its masks depend on values
    assert shapes_of(MODELS["Llama 512"].make(), batch) == set(SHAPES["llama-512"])
