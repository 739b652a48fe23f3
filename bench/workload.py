"""The tensors of one case, and what is done with them: evaluated once for the check, run repeatedly for the time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operations import Operation


@dataclass(frozen=True)
class Workload:
    """Inputs and output gradients of `operation` at one shape and dtype: the same tensors for every provider."""

    operation: Operation
    inputs: dict[str, Tensor]
    output_grads: tuple[Tensor, ...]

    @classmethod
    def make(cls, operation: Operation, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> "Workload":
        """Seeded normal tensors; `weight` lies around one, as it does in a trained model."""
        generator = torch.Generator(device).manual_seed(rows * 1_000_003 + cols)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        shapes = operation.shapes(rows, cols)
        inputs = {name: normal(shape) for name, shape in shapes.items()}
        if "weight" in inputs:
            inputs["weight"].mul_(0.1).add_(1)
        outputs = _as_tuple(operation.stock(*(torch.empty(shape, device="meta") for shape in shapes.values())))
        return cls(operation, inputs, tuple(normal(output.shape) for output in outputs))

    @property
    def rows(self) -> int:
        """How many rows the oracle may cut the case into; one where rows depend on each other."""
        row_inputs = self.operation.row_inputs
        return self.inputs[row_inputs[0]].shape[0] if row_inputs else 1

    def part(self, start: int, stop: int, dtype: torch.dtype) -> "Workload":
        """Rows `start` to `stop` of this case, in `dtype`."""
        if not self.operation.row_inputs:
            start, stop = 0, None

        def cut(name: str, tensor: Tensor) -> Tensor:
            return (tensor[start:stop] if name in self.operation.row_inputs else tensor).to(dtype)

        inputs = {name: cut(name, tensor) for name, tensor in self.inputs.items()}
        return Workload(self.operation, inputs, tuple(grad[start:stop].to(dtype) for grad in self.output_grads))

    def runner(self, function: Callable, mode: str) -> Callable[[], object]:
        """What is timed: a call without autograd, or a call and the gradients of all its inputs.

        `torch.autograd.grad` rather than `.backward()`: parameters then get fresh gradients in every iteration, with no
        time spent on accumulating into, or cloning for, `.grad`.
        """
        if mode == "forward":
            inputs = [tensor.detach() for tensor in self.inputs.values()]
            return lambda: function(*inputs)
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs.values()]
        return lambda: torch.autograd.grad(function(*leaves), leaves, self.output_grads)

    def evaluate(self, function: Callable, mode: str) -> dict[str, Tensor]:
        """Outputs by name and, with the backward, the gradient of every input as "d" + its name."""
        backward = mode == "forward_backward"
        leaves = [tensor.detach().requires_grad_(backward) for tensor in self.inputs.values()]
        outputs = _as_tuple(function(*leaves))
        values = dict(zip(self.operation.outputs, (output.detach() for output in outputs), strict=True))
        if backward:
            grads = torch.autograd.grad(outputs, leaves, self.output_grads)
            values |= {f"d{name}": grad for name, grad in zip(self.inputs, grads, strict=True)}
        return values


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
