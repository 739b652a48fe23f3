"""The shapes and dtypes that are benchmarked, as data. A shape is (rows, cols)."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
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
}
