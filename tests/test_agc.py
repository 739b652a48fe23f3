"""Adaptive gradient clipping: timm's numbers and the paper's, in every layout, and what may be left out."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastnorm
from helpers.backends import backend_parameters
from helpers.clipping import give_gradient
from helpers.drawing import examples
from helpers.processes import in_processes, needs_gloo

SHAPES = ((), (1,), (7,), (5, 3), (1, 6), (6, 1), (4, 3, 2), (4, 3, 3, 3), (5, 1, 1, 1), (3, 2, 2, 2, 2), (2, 259))


def timm_formula(param, grad, clip_factor=0.01, eps=1e-3, norm_type=2.0):
    """timm's rule, in the tensors' dtype."""
    dims = tuple(range(1, grad.ndim)) or None
    norm = torch.linalg.vector_norm(grad, norm_type, dims, keepdim=True)
    bound = torch.linalg.vector_norm(param, norm_type, dims, keepdim=True).clamp(min=eps) * clip_factor
    return torch.where(norm < bound, grad, grad * (bound / norm.clamp(min=1e-6)))


def paper_formula(param, grad, clip_factor=0.01, eps=1e-3):
    """DeepMind's rule, computed in DeepMind's layouts, whose last dimension is the output's."""

    def unitwise_norm(x):
        if x.squeeze().ndim <= 1:
            return x.square().sum().sqrt()
        return x.square().sum(dim=tuple(range(x.ndim - 1)), keepdim=True).sqrt()

    def to_theirs(x):
        return x.movedim((0, 1), (-1, -2)) if x.ndim > 1 else x

    theirs, g = to_theirs(param), to_theirs(grad)
    bound, norm = unitwise_norm(theirs).clamp(min=eps) * clip_factor, unitwise_norm(g)
    clipped = torch.where(norm < bound, g, g * (bound / norm.clamp(min=1e-6)))
    return clipped.movedim((-1, -2), (0, 1)) if grad.ndim > 1 else clipped


def parameters(shapes=SHAPES, device="cpu", dtype=torch.float32):
    """Parameters whose gradients are large in some units and small in others."""
    result = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64).to(device, dtype))
        spread = 10.0 ** torch.randint(-4, 1, shape[:1] + (1,) * (len(shape) - 1))
        p.grad = (torch.randn(shape, dtype=torch.float64) * spread).to(device, dtype)
        result.append(p)
    return result


def assert_clipped(params, before, formula, tolerance=1e-6):
    for p, grad in zip(params, before, strict=True):
        subnormal = torch.finfo(p.grad.dtype).smallest_normal * torch.finfo(p.grad.dtype).eps
        expected = formula(p.detach().double().cpu(), grad.double().cpu())
        torch.testing.assert_close(p.grad.double().cpu(), expected, rtol=tolerance, atol=subnormal)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 0.5, "2"])
def test_timm_numbers(clip_device, norm_type):
    params = parameters(device=clip_device)
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params, norm_type=norm_type)
    assert_clipped(params, before, lambda p, g: timm_formula(p, g, norm_type=float(norm_type)))
    assert any(not torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_paper_numbers(clip_device):
    params = parameters(device=clip_device)
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params, unit_dims="nfnets")
    assert_clipped(params, before, paper_formula)
    # where the two rules differ: one unit against six
    column, grad = params[SHAPES.index((6, 1))], before[SHAPES.index((6, 1))]
    assert not torch.allclose(column.grad, timm_formula(column.detach(), grad))


def test_tensors_whole(clip_device):
    params = parameters(device=clip_device)
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params, 0.05, 1e-2, unit_dims="tensor")
    assert_clipped(params, before, lambda p, g: timm_formula(p.flatten(), g.flatten(), 0.05, 1e-2).view_as(g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_once(clip_device, dtype):
    params = parameters(device=clip_device, dtype=dtype)
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params)
    # half a unit in the last place, and a little for the float32 in which the scale is computed
    assert_clipped(params, before, timm_formula, 1e-12 if dtype == torch.float64 else 0.501 * torch.finfo(dtype).eps)


def test_powers_of_long_16_bit_units(clip_device):
    """Too long to be held by the threads of a program that takes logarithms in float64."""
    params = parameters([(3, 12000), (2, 6000)], device=clip_device, dtype=torch.bfloat16)
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params, norm_type=3.0)
    tolerance = 0.501 * torch.finfo(torch.bfloat16).eps
    assert_clipped(params, before, lambda p, g: timm_formula(p, g, norm_type=3.0), tolerance)
    assert all(not torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_gradients_of_another_dtype_than_the_parameters(clip_device):
    params = parameters(device=clip_device, dtype=torch.bfloat16)
    for p in params:
        give_gradient(p, p.grad.float())
    before = [p.grad.clone() for p in params]
    fastnorm.adaptive_clip_grad_(params)
    assert_clipped(params, before, timm_formula)


def test_small_units_are_not_written(clip_device):
    param = parameters([(4, 8)], clip_device)[0]
    param.grad = param.detach().clone()  # norms equal: clipped by 0.01
    param.grad[1:3] *= 1e-3
    before = param.grad.clone()
    fastnorm.adaptive_clip_grad_(param)
    assert torch.equal(param.grad[1:3], before[1:3])
    torch.testing.assert_close(param.grad[::3], 0.01 * before[::3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["grad", "param"])
def test_a_bad_row_spoils_only_itself(clip_device, bad, where):
    params = parameters([(6, 33), (5,)], clip_device)
    reference = [(p.detach().clone(), p.grad.clone()) for p in params]
    tensor = params[0].grad if where == "grad" else params[0].data
    tensor[2, 7] = bad
    spoiled = params[0].detach().cpu().clone(), params[0].grad.cpu().clone()
    fastnorm.adaptive_clip_grad_(params)
    expected = timm_formula(*spoiled)
    torch.testing.assert_close(params[0].grad.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert expected[2].isnan().any() == (bad != math.inf or where == "grad")  # no gradient reaches an infinite bound
    for p, (param, grad) in zip(params, reference, strict=True):
        others = [0, 1, 3, 4, 5] if p.ndim == 2 else slice(None)
        torch.testing.assert_close(p.grad[others].cpu(), timm_formula(param, grad)[others].cpu(), rtol=1e-6, atol=0)


LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "grad_transposed")


def lay_out(x, layout, is_grad):
    if layout == "channels_last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if x.ndim >= 2 and (layout == "transposed" or (layout == "grad_transposed" and is_grad)):
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided" and x.ndim and is_grad:
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x


@examples(60)
@given(
    cases=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=4),
            st.sampled_from(LAYOUTS),
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        ),
        max_size=6,
    ),
    unit_dims=st.sampled_from(["timm", "nfnets", "tensor"]),
)
def test_any_list(cases, unit_dims):
    params = parameters([tuple(shape) for shape, _, _ in cases])
    for i, (p, (_, layout, dtype)) in enumerate(zip(params, cases, strict=True)):
        params[i] = nn.Parameter(lay_out(p.detach().to(dtype), layout, False))
        params[i].grad = lay_out(p.grad.to(dtype), layout, True)
    before = [p.grad.clone() for p in params]
    strides = [p.grad.stride() for p in params]
    fastnorm.adaptive_clip_grad_(params, unit_dims=unit_dims)
    assert [p.grad.stride() for p in params] == strides
    for p, grad in zip(params, before, strict=True):
        if grad.numel() == 0:
            continue
        param, grad = p.detach().double(), grad.double()
        expected = {
            "timm": timm_formula,
            "nfnets": paper_formula,
            "tensor": lambda p, g: timm_formula(p.flatten(), g.flatten()).view_as(g),
        }[unit_dims](param, grad)
        torch.testing.assert_close(p.grad.double(), expected, rtol=max(1e-6, torch.finfo(p.dtype).eps), atol=1e-40)


def test_channels_last_goes_to_the_kernels_as_it_lies(monkeypatch):
    taken = []
    monkeypatch.setattr(fastnorm.reference, "multi_tensor_agc_", lambda grads, params, units, *_: taken.append(units))
    conv = parameters([(6, 4, 3, 3)])[0]
    conv.data = conv.data.to(memory_format=torch.channels_last)
    with fastnorm.use("reference"):
        conv.grad = conv.grad.to(memory_format=torch.channels_last)
        fastnorm.adaptive_clip_grad_(conv)
        assert taken.pop() == [6]
        conv.grad = conv.grad.contiguous()  # another order than the parameter's
        fastnorm.adaptive_clip_grad_(conv)
        assert taken == []


@pytest.mark.parametrize("clip_device", backend_parameters("native", "triton"), indirect=True)
def test_a_named_backend_refuses_what_it_cannot_read(clip_device):
    conv = parameters([(6, 4, 3, 3)], clip_device)[0]
    conv.grad = conv.grad.to(memory_format=torch.channels_last)
    before = conv.grad.clone()
    with pytest.raises(RuntimeError, match=r"adaptive_clip_grad: fastnorm\.use.*strides .* differ"):
        fastnorm.adaptive_clip_grad_(conv)
    assert torch.equal(conv.grad, before)


def test_complex_gradients_as_timm():
    param = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
    param.grad = torch.randn_like(param) * 10.0 ** torch.arange(-4.0, 0)[:, None]
    expected = timm_formula(param.detach(), param.grad)
    fastnorm.adaptive_clip_grad_(param)
    torch.testing.assert_close(param.grad, expected, rtol=1e-6, atol=0)


def model():
    result = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result.head = nn.Linear(3, 2)
    result.head2 = nn.Linear(2, 2)
    for p in result.parameters():
        p.grad = torch.ones_like(p)
    return result


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ((), set()),
        ("head", {"head.weight", "head.bias"}),
        (["head.bias", "0"], {"head.bias", "0.weight", "0.bias"}),
        (lambda m: m.head, {"head.weight", "head.bias"}),
        (lambda m: m.head.weight, {"head.weight"}),
        (lambda m: (m[0], m.head.bias, "2.weight"), {"0.weight", "0.bias", "head.bias", "2.weight"}),
    ],
)
@pytest.mark.parametrize("given", ["module", "pairs", "generator"])
def test_exclude(exclude, kept, given):
    m = model()
    m[2].bias.grad = None
    params = {"module": m, "pairs": list(m.named_parameters()), "generator": m.named_parameters()}[given]
    fastnorm.adaptive_clip_grad_(params, exclude=exclude(m) if callable(exclude) else exclude)
    assert m[2].bias.grad is None
    for name, p in m.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, torch.ones_like(p)) == (name in kept), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clip_factor": -0.1}, ValueError, "clip_factor must be a finite number of at least 0, but got -0.1"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number"),
        ({"norm_type": math.nan}, ValueError, "norm_type"),
        ({"unit_dims": "rows"}, ValueError, "unit_dims must be one of timm, nfnets, tensor, but got 'rows'"),
        ({"exclude": "tail"}, ValueError, "'tail' fits none of the parameters"),
        ({"exclude": ["head", "hea"]}, ValueError, "'hea' fits none"),
        ({"exclude": nn.Linear(2, 2)}, ValueError, "the Linear fits none"),
        ({"exclude": torch.ones(1)}, ValueError, "the Tensor fits none"),
        ({"exclude": [3]}, TypeError, "exclude takes names, predicates on names, parameters and modules, but got int"),
        ({"parameters": lambda m: m.parameters(), "exclude": "head"}, ValueError, "parameters have no names"),
        ({"parameters": lambda m: [*m.parameters(), "head"]}, TypeError, "but got str"),
    ],
)
def test_bad_arguments_leave_the_gradients_alone(change, error, message):
    m = model()
    arguments = {"parameters": lambda m: m, **change}
    with pytest.raises(error, match=message):
        fastnorm.adaptive_clip_grad_(arguments.pop("parameters")(m), **arguments)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in m.parameters())


def test_gradients_that_cannot_be_written():
    m = model()
    m.head2.bias.grad = torch.ones(1).expand(2)
    with pytest.raises(RuntimeError, match="elements share memory"):
        fastnorm.adaptive_clip_grad_(m)
    m.head2.bias.grad = None
    m.embedding = nn.Embedding(9, 3, sparse=True)
    m.embedding(torch.tensor([1, 1, 4])).sum().backward()
    with pytest.raises(RuntimeError, match=r"layout torch\.sparse_coo: exclude them"):
        fastnorm.adaptive_clip_grad_(m)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in m.head.parameters())
    fastnorm.adaptive_clip_grad_(m, exclude=m.embedding)
    assert not torch.equal(m.head.weight.grad, torch.ones_like(m.head.weight))


def test_nothing_to_do():
    fastnorm.adaptive_clip_grad_([])
    fastnorm.adaptive_clip_grad_(nn.ReLU())
    fastnorm.adaptive_clip_grad_(nn.Parameter(torch.ones(3)))
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0,), (0, 4), (4, 0))]
    for p in empty:
        p.grad = torch.empty_like(p)
    fastnorm.adaptive_clip_grad_(empty, norm_type=math.inf)


def test_a_tied_weight_is_clipped_once():
    once, twice = parameters([(5, 4)])[0], nn.Parameter(torch.empty(0))
    twice = nn.Parameter(once.detach().clone())
    twice.grad = once.grad.clone()
    fastnorm.adaptive_clip_grad_(once)
    fastnorm.adaptive_clip_grad_([twice, twice])
    assert torch.equal(once.grad, twice.grad)


def _clip_shards(rank, ranks):
    """Runs in every process: shards of each kind against the whole tensor, then a model under fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    for unit_dims in ("timm", "nfnets", "tensor"):
        for whole in parameters([(5, 6), (7,), (1, 6), (4, 3, 3, 3), (6, 1)]):  # uneven and empty shards among them
            for place in (Replicate(), *map(Shard, range(min(whole.ndim, 2)))):
                sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [place]))
                sharded.grad = distribute_tensor(whole.grad, mesh, [place])
                expected = nn.Parameter(whole.detach().clone())
                expected.grad = whole.grad.clone()
                fastnorm.adaptive_clip_grad_(sharded, unit_dims=unit_dims)
                fastnorm.adaptive_clip_grad_(expected, unit_dims=unit_dims)
                assert sharded.grad.placements == (place,)
                torch.testing.assert_close(sharded.grad.full_tensor(), expected.grad, rtol=1e-6, atol=0)
    whole = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    sharded = fully_shard(copy.deepcopy(whole))
    x = torch.randn(4, 6)
    for model in (whole, sharded):
        (100 * model(x).square().sum()).backward()
        fastnorm.adaptive_clip_grad_(model, exclude="2")
    health = fastnorm.gradient_health(sharded), fastnorm.gradient_health(whole)
    assert health[0].total_norm == pytest.approx(health[1].total_norm, rel=1e-5)
    assert [p.norm for p in health[0].parameters] == pytest.approx([p.norm for p in health[1].parameters], rel=1e-5)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@needs_gloo
def test_shards_are_clipped_as_the_tensors_that_they_are_of(tmp_path):
    in_processes(2, _clip_shards, tmp_path, 2)
