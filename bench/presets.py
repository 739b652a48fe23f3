"""The shapes and dtypes that are benchmarked, as data.

A shape is (rows, cols), (samples, rows, cols), (rows, cols, kv cols), (n, channels, height, width), or (samples,
positions, heads, kv heads, cols).
"""

import torch

from .operation import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# (channels, size) of the images that a model's batch norms get from 224 x 224 pixels
RESNET18 = ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7))
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)
MOBILENETV3_LARGE = (
    *((16, 112), (64, 112), (64, 56), (24, 56), (72, 56), (72, 28), (40, 28), (120, 28), (240, 28)),
    *((240, 14), (80, 14), (200, 14), (184, 14), (480, 14), (112, 14), (672, 14), (672, 7), (160, 7), (960, 7)),
)
# and its layer norms of channels, the last behind the pooling
CONVNEXT_ATTO = ((40, 56), (80, 28), (160, 14), (320, 7), (320, 1))


def _images(samples: int, maps: tuple[tuple[int, int], ...]) -> tuple[Shape, ...]:
    return tuple((samples, channels, size, size) for channels, size in maps)


def _pixels(samples: int, maps: tuple[tuple[int, int], ...]) -> tuple[Shape, ...]:
    return tuple((samples * size * size, channels) for channels, size in maps)


SHAPES: dict[str, tuple[Shape, ...]] = {
    # one sequence of 4096 tokens at the hidden sizes of language models
    "models": tuple((4096, cols) for cols in (768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)),
    # every width that the kernels promise not to pad
    "widths": tuple(
        (4096, cols) for cols in (768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)
    ),
    # normalised queries and keys: rows = tokens x heads, cols = head dimension
    "qk": ((262144, 64), (196608, 96), (131072, 128), (65536, 256)),
    # from one short call to 1/2 GiB of fp32
    "grid": tuple((rows, cols) for rows in (8, 64, 512, 2048, 8192) for cols in (64, 256, 1024, 4096, 16384)),
    "quick": ((512, 768), (1024, 4096)),
    # 2048 tokens: Qwen3-Next's 32 value heads of 128 columns; Mamba 2's inner width at 2.7 B parameters, and at 7 B
    "gated": ((65536, 128), (2048, 5120), (2048, 8192)),
    "gated-quick": ((1024, 4096),),
    # DiT-XL/2 at 256 x 256 pixels, eight images; Stable Diffusion 3 at 1024 x 1024, with guidance; FLUX.1, and text
    "dit": ((8, 256, 1152), (2, 4096, 1536), (1, 4608, 3072)),
    "dit-quick": ((2, 256, 1152),),
    # queries and keys of Qwen3-8B, one long text and several short ones, and of Qwen3-0.6B
    "attention": ((1, 4096, 32, 8, 128), (4, 512, 32, 8, 128), (1, 4096, 16, 8, 128)),
    "attention-quick": ((1, 512, 16, 8, 128),),
    # DeepSeek-V3's latents of 4096 tokens: queries', keys and values'
    "mla": ((4096, 1536, 512),),
    "mla-quick": ((512, 1536, 512),),
    # all that the norms of these models get, each shape once
    "resnet18-8": _images(8, RESNET18),
    "resnet18-32": _images(32, RESNET18),
    "resnet50-8": _images(8, RESNET50),
    "resnet50-32": _images(32, RESNET50),
    "mobilenetv3-8": _images(8, MOBILENETV3_LARGE),
    "convnext-atto-8": _pixels(8, CONVNEXT_ATTO),
    "minilm": ((8 * 128, 384),),  # all-MiniLM-L6, eight texts of 128 tokens
    "vit-tiny-8": ((8 * 197, 192),),  # of 14 x 14 patches and the class token
    "llama-512": ((8 * 256, 512),),  # eight texts of 256 tokens; it doesn't normalise queries and keys
    # of a ResNet-50's, the stem, then each stage's narrow and wide ones
    "resnet50": (
        (32, 64, 112, 112),
        *((32, width, size, size) for width, size in ((64, 56), (256, 56), (128, 28), (512, 28))),
        *((32, width, size, size) for width, size in ((256, 14), (1024, 14), (512, 7), (2048, 7))),
    ),
    "resnet50-quick": ((32, 64, 56, 56),),
    # Stable Diffusion 1.5, 64 x 64 latents, with and without guidance in one batch: the UNet's levels on the way down,
    # then with skip connections concatenated on the way up; last the autoencoder, for a 256 x 256 image
    "unet": (
        *((2, width, size, size) for width, size in ((320, 64), (640, 32), (1280, 16), (1280, 8))),
        *((2, width, size, size) for width, size in ((2560, 8), (2560, 16), (1920, 32), (960, 64))),
        (1, 128, 256, 256),
    ),
    "unet-quick": ((2, 640, 32, 32),),
}
