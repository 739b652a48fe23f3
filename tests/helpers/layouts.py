"""Tensors in the memory layouts that a user may come with."""

import mmap

import torch

LAYOUTS = ["row slice", "column step", "offset", "transposed", "every other row"]


def relaid(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in a memory layout that a user may come with."""
    if layout == "row slice":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    if layout == "column step":
        wide = t.new_full((*t.shape, 2), float("nan"))
        wide[..., 0] = t
        return wide[..., 0]
    if layout == "offset":
        flat = t.new_full((t.numel() + 1,), float("nan"))
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "transposed":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "every other row":
        return torch.stack([t, t.new_full(t.shape, float("nan"))], 1).flatten(0, 1)[::2]
    return t


def far_apart(tensors: int, rows: int, cols: int, stride: int, device: str) -> torch.Tensor:
    """Random bf16 (tensors, rows, cols), rows `stride` elements apart; a CPU's memory between them is never touched."""
    elements = (rows - 1) * stride + tensors * cols
    if device == "cpu":
        pages = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    else:
        memory = torch.empty(elements, dtype=torch.bfloat16, device=device)
    return memory.as_strided((tensors, rows, cols), (cols, stride, 1)).copy_(torch.randn(tensors, rows, cols))
