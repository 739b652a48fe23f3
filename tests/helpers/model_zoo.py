"""Real models from transformers, timm and diffusers in small, random configurations, and how they are trained."""

import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers or diffusers is imported
STEPS = 20
TOKENS = 50
AGC_FACTOR = 0.01


class Case(NamedTuple):
    """batch: of a step; norms: how many it has, which are all to be swapped; clipped: trained with AGC."""

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    norms: int
    clipped: bool = False


def _transformers(name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="`make test-models` installs it")
        architecture = {"Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration", "Gemma3": "Gemma3ForCausalLM"}
        config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
        torch.manual_seed(0)
        model = getattr(transformers, architecture.get(name, f"{name}ForCausalLM"))(
            getattr(transformers, config)(vocab_size=TOKENS, pad_token_id=0, **options)
        )
        # all start as ones or zeros, which would hide a weight that is not applied
        return _varied(model)

    return make


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        return _varied(timm.create_model(name, num_classes=10, **options))

    return make


class Denoised(NamedTuple):
    """Has the names of transformers' results."""

    loss: Tensor
    logits: Tensor


class Denoiser(nn.Module):
    """A model of diffusers, which has no loss of its own, with a squared error."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if hasattr(module, "dropout_prob"):  # DiT's of the labels, which has no argument
                module.dropout_prob = 0.0

    def forward(self, labels: Tensor, **inputs: Tensor) -> Denoised:
        (y,) = self.model(**inputs, return_dict=False)
        return Denoised(F.mse_loss(y.float(), labels), y)

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.model.enable_gradient_checkpointing()


def _diffusers(name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        diffusers = pytest.importorskip("diffusers", reason="`make test-models` installs it")
        torch.manual_seed(0)
        return _varied(Denoiser(getattr(diffusers, f"{name}Transformer2DModel")(**options)))

    return make


def _varied(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def _tokens(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(1, TOKENS, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)}


def _images(size: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "x": torch.randn(8, 3, size, size, generator=generator),
            "labels": torch.randint(10, (8,), generator=generator),
        }

    return batch


def _latents(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.randint(1000, (4,), generator=generator),
        "labels": torch.randn(4, 4, 8, 8, generator=generator),
    }


def _latents_of_classes(generator: torch.Generator) -> dict[str, Tensor]:
    return _latents(generator) | {"class_labels": torch.randint(10, (4,), generator=generator)}


def _prompted(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.randn(4, 6, 32, generator=generator),
        "pooled_projections": torch.randn(4, 16, generator=generator),
    }


def _prompted_latents(generator: torch.Generator) -> dict[str, Tensor]:
    return _latents(generator) | _prompted(generator)


def _prompted_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float()
    return _prompted(generator) | {
        "hidden_states": torch.randn(4, 16, 4, generator=generator),
        "timestep": torch.rand(4, generator=generator),
        "img_ids": positions,
        "txt_ids": torch.zeros(6, 3),
        "labels": torch.randn(4, 16, 4, generator=generator),
    }


_DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}  # fmt: skip
# without experts: which of them a token goes to may change with a rounding
_DEEPSEEK_V3 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 2, "use_cache": False,
}  # fmt: skip
_MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2,
           "chunk_size": 8, "use_cache": False}  # fmt: skip
_ZAMBA2 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8,
    "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 8, "use_cache": False,
}  # fmt: skip
_QWEN3_NEXT = _DECODER | {  # one head: with more, aot_eager can't run the original's backward
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 1,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mlp_only_layers": [0, 1],
}  # fmt: skip
_FALCON_H1 = _DECODER | {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "mamba_rms_norm": True, "mamba_norm_before_gate": True,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "use_cache": False,
       "decoder_start_token_id": 0}  # fmt: skip
_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
_DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
        "num_embeds_ada_norm": 10}  # fmt: skip
_FLUX = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
_SD3 = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
TIMM = {
    "resnet18": Case(_timm("resnet18", channels=(64, 64, 96, 96)), _images(48), 20),
    "convnext_atto": Case(_timm("convnext_atto", depths=(1, 1, 2, 1)), _images(32), 10),
    "vit_tiny": Case(_timm("vit_tiny_patch16_224", img_size=32, depth=4), _images(32), 9),
    # it has no norm at all, and AGC in their place
    "nfnet_l0": Case(_timm("nfnet_l0", depths=(1, 1, 1, 1), channels=(256,) * 4), _images(32), 0, True),
}
TRANSFORMERS = {
    "Llama": Case(_transformers("Llama", **_DECODER), _tokens, 5),
    "Qwen3": Case(_transformers("Qwen3", **_DECODER), _tokens, 9),
    "DeepseekV3": Case(_transformers("DeepseekV3", **_DEEPSEEK_V3), _tokens, 9),
    "Gemma": Case(_transformers("Gemma", **_DECODER), _tokens, 5),
    "Gemma3": Case(_transformers("Gemma3", **_DECODER), _tokens, 13),
    "BERT": Case(_transformers("Bert", **_BERT), _tokens, 6),
    "T5": Case(_transformers("T5", **_T5), _tokens, 12),
    # with norms that have a gate: before it in groups, behind it, behind it in groups
    "Mamba2": Case(_transformers("Mamba2", **_MAMBA2), _tokens, 5),
    "Zamba2": Case(_transformers("Zamba2", **_ZAMBA2), _tokens, 7),
    "Qwen3Next": Case(_transformers("Qwen3Next", **_QWEN3_NEXT), _tokens, 8),
    "FalconH1": Case(_transformers("FalconH1", **_FALCON_H1), _tokens, 7),
}
# norms with an embedding count as two: the one in them is swapped too
DIFFUSERS = {
    "DiT": Case(_diffusers("DiT", **_DIT), _latents_of_classes, 7),
    "FLUX": Case(_diffusers("Flux", **_FLUX), _prompted_tokens, 30),
    "SD3": Case(_diffusers("SD3", **_SD3), _prompted_latents, 23),
}
MODELS = TIMM | TRANSFORMERS | DIFFUSERS


def class_of_transformers(path: str) -> type:
    """By its package and name, such as "llama.LlamaRMSNorm"."""
    pytest.importorskip("transformers", reason="`make test-models` installs it")
    package, _, name = path.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "x" in batch:
        return F.cross_entropy(model(batch["x"]).float(), batch["labels"])
    return model(**batch).loss


def output_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]) if "x" in batch else model(**batch).logits


def train(
    model: nn.Module, case: Case, clip: Callable, steps: int = STEPS, autocast: bool = False, rank: int = 0
) -> Tensor:
    """The losses: (steps,). clip: adaptive_clip_grad_ or timm's, for the cases that are clipped."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1 + rank)
    batch, losses = case.batch(generator), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        if case.clipped:  # all but the classifier, as timm does
            clip([p for name, p in model.named_parameters() if "head.fc." not in name], AGC_FACTOR)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)
