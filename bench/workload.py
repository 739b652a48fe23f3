"""The tensors of one case, and what is done with them: evaluated once for the check, run repeatedly for the time."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operation import LAYOUTS, Operation, Outputs, Shape

AROUND_ONE = ("weight", "weight_k", "weight_kv", "running_var")
KINK_MARGIN = 1e-4  # of |z| in float32: far above what sums in another order make of it


@dataclass(frozen=True)
class Workload:
    """Inputs and output gradients of `operation` at one shape, layout and dtype: the same for every provider."""

    operation: Operation
    inputs: dict[str, Tensor]
    output_grads: tuple[Tensor, ...]

    @classmethod
    def make(
        cls, operation: Operation, shape: Shape, layout: str, dtype: torch.dtype, device: torch.device
    ) -> "Workload":
        """Seeded normal tensors; weights and running variances lie around one, as they do in a trained model."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(repr(shape).encode()))

        def normal(shape: Shape, dtype: torch.dtype) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.ndim == 4 else tensor

        shapes, family = operation.shapes(shape), operation.family
        wide = torch.promote_types(dtype, torch.float32)
        inputs = {name: normal(shape, wide if name in family.float32 else dtype) for name, shape in shapes.items()}
        for name in inputs.keys() & set(AROUND_ONE):
            inputs[name].mul_(0.1).add_(1)
        outputs = _as_tuple(operation.stock(*(torch.empty(shape, device="meta") for shape in shapes.values())))
        workload = cls(operation, inputs, tuple(normal(output.shape, dtype) for output in outputs))
        workload._mask_kink(dtype)
        return workload

    def _mask_kink(self, dtype: torch.dtype) -> None:
        """Let no gradient arrive where z, which the ReLU cuts at zero, lies within rounding of it.

        There either sign is right: stock rounds to 16 bits before and after the residual is added, a fused kernel once
        behind the ReLU, and float64 never. A gradient let through on one side only is no rounding error, and would be
        all that the check sees of dx.
        """
        if self.operation.before_relu is not None:
            wide = torch.promote_types(dtype, torch.float32)
            z = self.operation.before_relu(*(tensor.to(wide) for tensor in self._arguments(False)))
            margin = max(KINK_MARGIN, 8 * torch.finfo(dtype).eps)  # 8: rounding errors of |z| up to 16
            self.output_grads[0].masked_fill_(z.abs() < margin, 0)

    def part(self, start: int, stop: int, dtype: torch.dtype) -> "Workload":
        """Slices `start` to `stop` of this case, in `dtype`."""
        cut = self.operation.family.cut

        def piece(name: str, tensor: Tensor) -> Tensor:
            return (tensor.narrow(cut[name], start, stop - start) if name in cut else tensor).to(dtype)

        grads = zip(self.operation.outputs, self.output_grads, strict=True)
        inputs = {name: piece(name, tensor) for name, tensor in self.inputs.items()}
        return Workload(self.operation, inputs, tuple(piece(name, grad) for name, grad in grads))

    def runner(self, function: Callable[..., Outputs], mode: str) -> Callable[[], object]:
        """What is timed: a call without autograd, or a call and the gradients of all its inputs.

        `torch.autograd.grad` rather than `.backward()`: parameters then get fresh gradients in every iteration, with no
        time spent on accumulating into, or cloning for, `.grad`. Buffers are this runner's own, and are updated by
        every call: they tend to the batch's statistics.
        """
        arguments = self._arguments(mode == "forward_backward")
        if mode == "forward":
            return lambda: function(*arguments)
        leaves = [tensor for tensor in arguments if tensor.requires_grad]
        return lambda: torch.autograd.grad(function(*arguments), leaves, self.output_grads)

    def evaluate(self, function: Callable[..., Outputs], mode: str) -> dict[str, Tensor]:
        """Outputs and, after the call, buffers by name; with the backward, the gradient of each other input as "d" +
        its name."""
        arguments = dict(zip(self.inputs, self._arguments(mode == "forward_backward"), strict=True))
        outputs = _as_tuple(function(*arguments.values()))
        values = dict(zip(self.operation.outputs, (output.detach() for output in outputs), strict=True))
        values |= {name: arguments[name] for name in self.operation.family.buffers}
        if mode == "forward_backward":
            leaves = {name: tensor for name, tensor in arguments.items() if tensor.requires_grad}
            grads = torch.autograd.grad(outputs, list(leaves.values()), self.output_grads)
            values |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return values

    def _arguments(self, requires_grad: bool) -> list[Tensor]:
        """The inputs for calls of one provider: buffers are copies, the rest leaves."""
        buffers = self.operation.family.buffers
        return [
            tensor.clone() if name in buffers else tensor.detach().requires_grad_(requires_grad)
            for name, tensor in self.inputs.items()
        ]


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
