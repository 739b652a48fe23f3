"""Lists of gradients as the tests of clipping see them: odd ones, and what torch.nn.utils makes of them."""

import math

import torch
from torch import Tensor, nn

import fastnorm

inf, nan = math.inf, math.nan
HALVES = (torch.float16, torch.bfloat16)


def parameters_with(grads) -> list[nn.Parameter]:
    """Parameters whose gradients are these values, or tensors with these strides; None stays None."""
    parameters = []
    for grad in grads:
        grad = grad if grad is None or isinstance(grad, Tensor) else torch.tensor(grad)
        zeros = torch.zeros(2) if grad is None else torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
        parameter = nn.Parameter(zeros)
        parameter.grad = grad
        parameters.append(parameter)
    return parameters


def give_gradient(parameter: nn.Parameter, grad: Tensor) -> None:
    """A gradient of whatever dtype. Where torch has no grad_dtype yet, it only passes while .data has its dtype."""
    if not hasattr(parameter, "grad_dtype"):
        data, parameter.grad = parameter.data, None
        parameter.data = data.to(grad.dtype)
        parameter.grad = grad
        parameter.data = data
        return
    parameter.grad_dtype = None  # any
    parameter.grad = grad


def copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    if tensor.layout is not torch.strided:
        return tensor.clone()
    storage = tensor.new_empty(0).set_(tensor.untyped_storage().clone())
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def outcome(clip, grads, *args, **kwargs):
    """(the result or the error's type, all gradients afterwards)."""
    parameters = parameters_with([None if g is None else copied(g) for g in grads])
    try:
        result = clip(parameters, *args, **kwargs)
    except Exception as error:  # noqa: BLE001  stock's errors are compared, whatever they are
        result = type(error)
    return result, [p.grad for p in parameters]


def assert_like_stock(grads, *args, **kwargs):
    """Half-precision lists are compared in float32, in which their norms are deliberately kept."""
    total, after = outcome(fastnorm.clip_grad_norm_, grads, *args, **kwargs)
    stock, expected = outcome(nn.utils.clip_grad_norm_, grads, *args, **kwargs)
    halves = any(g is not None and g.dtype in HALVES for g in grads)
    if halves:
        wide = [None if g is None else g.float() if g.dtype in HALVES else g for g in grads]
        stock, expected = outcome(nn.utils.clip_grad_norm_, wide, *args, **kwargs)
    if isinstance(stock, type):
        assert total is stock
        return
    torch.testing.assert_close(total, stock, rtol=1e-5, atol=0, equal_nan=True)
    for grad, value in zip(after, expected, strict=True):
        if grad is None:
            assert value is None
            continue
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(grad.dtype, 1e-5)
        grad, value = (t.to_dense() if t.layout is not torch.strided else t for t in (grad, value))
        torch.testing.assert_close(grad.to(value.dtype), value, rtol=tolerance, atol=1e-7, equal_nan=True)


def odd_lists() -> dict[str, list[Tensor | None]]:
    torch.manual_seed(0)
    shared = torch.randn(4, 5)
    complex_numbers = torch.randn(6, dtype=torch.complex64)
    return {
        "plain": [torch.randn(3, 4), torch.randn(7), torch.randn(2, 3, 4)],
        "one": [torch.randn(5)],
        "zero_dim": [torch.tensor(3.0), torch.randn(())],
        "none": [None, torch.randn(3), None],
        "nothing": [],
        "only_none": [None],
        "zeros": [torch.zeros(3), torch.zeros(2, 2)],
        "some_zeros": [torch.tensor([0.0, 3.0, 0.0]), torch.zeros(2), torch.ones(4)],
        "nan": [torch.tensor([1.0, nan]), torch.ones(3)],
        "inf": [torch.tensor([1.0, inf]), torch.ones(3)],
        "minus_inf_and_nan": [torch.tensor([-inf, nan]), torch.ones(3)],
        "mixed_dtypes": [torch.randn(4), torch.randn(4).double(), torch.randn(4).bfloat16(), torch.randn(4).half()],
        "double": [torch.randn(9, dtype=torch.float64)],
        "bfloat16": [torch.randn(40).bfloat16(), torch.randn(3).bfloat16()],
        "float16": [torch.randn(40).half()],
        "empty_tensor": [torch.zeros(0), torch.randn(3)],
        "only_empty_tensors": [torch.zeros(0), torch.zeros(2, 0)],
        "channels_last": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(3)],
        "transposed": [torch.randn(4, 6).t(), torch.randn(6, 2, 3).permute(1, 2, 0)],
        "gaps": [torch.randn(6, 8)[:, ::2], torch.randn(5)],
        "gaps_in_halves": [torch.randn(6, 8).bfloat16()[:, ::2], torch.randn(5)],
        "expanded": [torch.randn(4), torch.randn(3, 1).expand(3, 5)],
        "offset": [torch.randn(33)[1:], torch.randn(40)[7:30]],
        "duplicates": [shared, torch.randn(3), shared, shared.view(20)[3:9]],
        "complex": [complex_numbers, torch.randn(3)],
        "imaginary_part": [complex_numbers.conj().imag, torch.randn(3)],
        "sign_pending": [torch._neg_view(torch.randn(7)), torch.randn(3)],
        "sparse": [torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse(), torch.randn(3)],
        "sparse_halves": [torch.tensor([[0.0, 2.0], [3.0, 0.0]]).half().to_sparse(), torch.randn(3).bfloat16()],
        "sparse_rows": [torch.tensor([[0.0, 0.0], [3.0, 1.0]]).to_sparse(1)],
        "uncoalesced": [torch.sparse_coo_tensor([[1, 1, 3]], torch.randn(3, 2), (4, 2)), torch.randn(3)],
        "sparse_and_complex": [torch.tensor([[0.0, 2.0], [3j, 0.0]]).to_sparse(), torch.randn(3)],
        "integers": [torch.tensor([1, 2, 3])],
    }


def stock_takes_sparse() -> bool:
    """Whether torch.nn.utils' clips, and so fastnorm's, know norms of sparse tensors: torch 2.9 doesn't."""
    try:
        torch.linalg.vector_norm(torch.ones(1).to_sparse())
    except NotImplementedError:
        return False
    return True
