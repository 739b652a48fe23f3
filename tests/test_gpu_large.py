"""More elements than 31 bits count, in one tensor, on a CUDA device: gigabytes, and one test at a time.

What has gigabytes returns small parts of them: the frames of a failure are kept, and with them their tensors.
"""

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.backend import ROW_NORMS
from helpers import channel_norms
from helpers import norms as row_norms
from helpers.channel_norms import FORMATS, case_of, fused
from helpers.norms import plain_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BF16, DEVICE, MANY = torch.bfloat16, "cuda", 2**31


def needs(gigabytes: int, free: int) -> None:
    if free < gigabytes * 10**9:
        pytest.skip(f"needs {gigabytes} GB of the card's memory, of which {free / 10**9:.0f} are free")


def empty(shape: tuple[int, ...], channels_last: bool) -> Tensor:
    memory_format = FORMATS[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=BF16, device=DEVICE, memory_format=memory_format)


def outputs_and_gradients(case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """By name; of an operation with two outputs, dy is the gradient of both."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = (row_norms if case.op in ROW_NORMS else channel_norms).call(case, leaves)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    elif not case.op.startswith("add_"):
        outputs = outputs[:1]  # the other one is x
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [dy] * len(outputs))
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def ends(t: Tensor) -> Tensor:
    """The first two and the last three rows or samples."""
    return torch.cat([t[:2], t[-3:]])


def ends_of_many(op: str, channels_last: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a call gives for the ends of a tensor, and a call on the ends alone."""
    if op in ROW_NORMS:
        case, few = (plain_case(op, (rows, 4096), BF16) for rows in (MANY // 4096 + 3, 5))
        given = row_norms.inputs(few, DEVICE)
    else:
        case, few = (fused(case_of(op, (n, 64, 32, 32), BF16, groups=4)) for n in (MANY // 2**16 + 3, 5))
        given = channel_norms.inputs(few, DEVICE)
    long = [name for name, t in given.items() if t.shape == few.shape]
    dy = empty(case.shape, channels_last).zero_()  # sums over all rows are those over the ends
    dy[:2].normal_(), dy[-3:].normal_()
    given |= {name: empty(case.shape, channels_last).normal_() for name in long}
    found = outputs_and_gradients(case, given, dy)
    found = {name: ends(t) if t.shape == case.shape else t for name, t in found.items()}
    return found, outputs_and_gradients(few, given | {name: ends(given[name]) for name in long}, ends(dy))


def assert_nearly(name: str, found: Tensor, alone: Tensor) -> None:
    """Sums in another order; what is read from the wrong place is off by as much as the values are large."""
    largest = alone.abs().max().item()
    torch.testing.assert_close(found, alone, rtol=0.02, atol=0.02 * largest, msg=lambda text: f"{name}: {text}")


ROWS_AND_SAMPLES = [*((op, False) for op in (*ROW_NORMS, "group_norm")), ("group_norm", True)]


@pytest.mark.parametrize("op, channels_last", ROWS_AND_SAMPLES)
def test_rows_and_samples(op, channels_last, card_memory):
    """They do not depend on the others, and the last ones lie beyond what 31 bits address."""
    needs(40, card_memory)
    found, alone = ends_of_many(op, channels_last)
    for name, t in found.items():
        if t.shape == alone["output 0"].shape:
            assert torch.equal(t, alone[name]), name
        else:
            assert_nearly(name, t, alone[name])


def one_batch_many_times(training: bool, channels_last: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What batch_norm gives for the last of many copies of a batch, whose statistics are those of one; and for one."""
    shape, times = (4, 64, 32, 32), MANY // 2**18 + 1
    case = case_of("batch_norm", shape, BF16, residual=BF16, activation="relu", running=None)
    if not training:
        case = case_of("batch_norm", shape, BF16, training=False)
    batch = channel_norms.inputs(case.alike(channels_last=channels_last), DEVICE)
    if training:  # whether the ReLU lets a value pass must not hang on the last bits of the statistics
        batch["residual"] = batch["residual"].sign() * 2
        batch["weight"] *= 0.1
        batch["bias"].zero_()

    def copies(t: Tensor) -> Tensor:
        many = empty((times * 4, *shape[1:]), channels_last)
        many.view(times, *shape).copy_(t)
        return many

    dy = torch.randn_like(batch["x"])
    many = batch | {name: copies(t) for name, t in batch.items() if t.shape == shape}
    if not training:
        with torch.no_grad():
            return tuple({"y": channel_norms.call(case, tensors)[-4:].clone()} for tensors in (many, batch))
    found = outputs_and_gradients(case, many, copies(dy))
    last = {name: t[-4:].clone() if t.dim() == 4 else t / times for name, t in found.items()}
    return last, outputs_and_gradients(case, batch, dy)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_batch(training, channels_last, card_memory):
    needs(40, card_memory)
    found, alone = one_batch_many_times(training, channels_last)
    for name, t in found.items():
        assert_nearly(name, t, alone[name])


def clipped_ends() -> tuple[list[list[float]], int]:
    """The first and the last element of a gradient, 3 and 4, after each of the clips, and how many are not zero."""
    parameter = nn.Parameter(torch.zeros(MANY + 17, dtype=BF16, device=DEVICE))
    parameter.grad = torch.zeros_like(parameter)
    parameter.data[0] = 2.0
    found = []
    for clip, limit in (("clip_grad_norm_", 0.5), ("adaptive_clip_grad_", 0.01), ("clip_grad_value_", 1.0)):
        parameter.grad[0], parameter.grad[-1] = 3.0, 4.0
        total = getattr(fastnorm, clip)(parameter, limit)
        assert total is None or total.item() == pytest.approx(5.0)
        found.append([parameter.grad[i].item() for i in (0, -1)])
    return found, (parameter.grad != 0).sum().item()


def test_a_gradient(clip_backend, card_memory):
    """Its last elements count, and are written, as its first are."""
    needs(20, card_memory)
    found, count = clipped_ends()
    assert count == 2
    for pair, factor in zip(found[:2], (0.5 / 5, 0.01 * 2 / 5), strict=True):
        assert pair == pytest.approx([3 * factor, 4 * factor], rel=2**-8)
    assert found[2] == [1.0, 1.0]
