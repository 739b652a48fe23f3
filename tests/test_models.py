"""convert on real models: outputs and trainings agree with the original's, whatever torch does with the model.

The transformers, and what takes long, are for `make test-models`; the timm models in float32 are in `make test`.
"""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_zoo import MODELS, STEPS, TIMM, TRANSFORMERS, Case, loss_of, output_of, train
from torch import nn

import fastnorm

all_models = pytest.mark.parametrize("name", MODELS)
slow = pytest.mark.models
COMPILED = "native" if fastnorm.backend.statuses()["native"].available else "reference"
TOLERANCE = {"rtol": 2e-3, "atol": 1e-4}  # of losses: 20 steps let the rounding of the first one grow


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Not Triton's interpreter, which takes minutes for a model."""
    with fastnorm.use(COMPILED):
        yield


def pair(name: str) -> tuple[nn.Module, nn.Module, Case]:
    """The original, its converted copy, and the case."""
    case = MODELS[name]
    original = case.make()
    converted = copy.deepcopy(original)
    report = fastnorm.convert(converted)
    assert len(report.swapped) == case.norms and not report.left, str(report)
    return original, converted, case


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    return case.batch(torch.Generator().manual_seed(7))


def gradients(model: nn.Module, case: Case) -> list[torch.Tensor]:
    loss = loss_of(model, batch_of(case))
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]


def assert_same_gradients(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(g.abs().max() for g in expected[1:] if g is not None)
    for ours, right in zip(actual, expected, strict=True):
        if right is not None:
            torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4 * scale.item())


def check_training(name: str, autocast: bool) -> None:
    original, converted, case = pair(name)
    expected = train(original, case, autocast=autocast)
    assert expected[-1] < 0.9 * expected[0], "it learns"
    # in bfloat16, the losses of two roundings of the same network part by a few per cent
    tolerance = {"rtol": 5e-2, "atol": 2e-2} if autocast else TOLERANCE
    torch.testing.assert_close(train(converted, case, autocast=autocast), expected, **tolerance)
    outputs = [output_of(model.eval(), batch_of(case)) for model in (converted, original)]
    if not autocast:
        torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    assert fastnorm.revert(converted)
    torch.testing.assert_close(output_of(converted, batch_of(case)), outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_train_alike(name):
    check_training(name, autocast=False)


@slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_train_alike(name):
    check_training(name, autocast=False)


@slow
@all_models
def test_under_autocast(name):
    check_training(name, autocast=True)


@slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_cast_to_bfloat16_after_the_conversion(name):
    """Dtypes between the layers are the original's: a mixture would raise in the next Linear."""
    original, converted, case = pair(name)
    outputs = [output_of(model.to(torch.bfloat16).eval(), batch_of(case)) for model in (converted, original)]
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)


@slow
@all_models
def test_compiled_with_its_gradients(name):
    original, converted, case = pair(name)
    with fastnorm.use(None):
        compiled = torch.compile(converted, backend="aot_eager")
        assert_same_gradients(gradients(compiled, case), gradients(original, case))
    torch._dynamo.reset()


@slow
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_inductor(name):
    original, converted, case = pair(name)
    expected = train(original, case, steps=5)
    with fastnorm.use(None):
        torch.testing.assert_close(train(torch.compile(converted), case, steps=5), expected, **TOLERANCE)
    torch._dynamo.reset()


@slow
@all_models
def test_exported(name):
    original, converted, case = pair(name)
    batch = batch_of(case)
    if "x" in batch:
        batch.pop("labels")
    expected = output_of(original.eval(), batch)
    with fastnorm.use(None), torch.no_grad():
        program = torch.export.export(converted.eval(), (), batch, strict=False)
    torch.testing.assert_close(output_of(program.module(), batch) if "x" not in batch else program.module()(**batch),
                               expected, rtol=1e-3, atol=1e-4)  # fmt: skip


@slow
@all_models
def test_activation_checkpointing(name):
    original, converted, case = pair(name)
    if hasattr(converted, "gradient_checkpointing_enable"):
        converted.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        converted.set_grad_checkpointing()
    assert_same_gradients(gradients(converted, case), gradients(original, case))


@slow
@all_models
def test_saved_loaded_and_copied(name):
    original, converted, case = pair(name)
    expected = output_of(converted.eval(), batch_of(case))
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    fresh = case.make().eval()
    fresh.load_state_dict(converted.state_dict())
    for model in (copy.deepcopy(converted), torch.load(buffer, weights_only=False)):
        assert torch.equal(output_of(model, batch_of(case)), expected)
        assert len(fastnorm.revert(model)) == case.norms
        torch.testing.assert_close(output_of(model, batch_of(case)), output_of(fresh, batch_of(case)))
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What fully_shard is applied to one by one: the blocks or stages, by the names that these models have for them."""
    for name in ("blocks", "stages"):  # timm's transformers and ConvNeXts
        if hasattr(model, name):
            return list(getattr(model, name))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return list(lists[0]) if lists else [model.layer1, model.layer2]


def _in_two_processes(rank: int, store: str, kind: str, name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    fastnorm.use(COMPILED)  # the process is a new one, and ends here
    losses = []
    for model in pair(name)[:2]:
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for block in _blocks(model):
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        losses.append(train(wrapped, MODELS[name], rank=rank))
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
    dist.destroy_process_group()


@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@all_models
def test_two_processes(name, kind, tmp_path):
    pytest.importorskip("timm" if name in TIMM else "transformers", reason="`make test-models` installs it")
    mp.spawn(_in_two_processes, (str(tmp_path / "store"), kind, name), nprocs=2)


@slow
def test_nfnet_with_adaptive_clipping():
    """timm's own training of it: AGC without the classifier; there is no norm to swap."""
    timm = pytest.importorskip("timm")
    from timm.utils.agc import adaptive_clip_grad

    case = TIMM["vit_tiny"]  # its small images
    torch.manual_seed(0)
    model = timm.create_model("nfnet_l0", num_classes=10)
    assert fastnorm.convert(model).norms == ()
    losses, clipped = [], []
    for clip in (adaptive_clip_grad, fastnorm.adaptive_clip_grad_):
        trained = copy.deepcopy(model)
        without_head = [p for name, p in trained.named_parameters() if not name.startswith("head.")]
        optimizer = torch.optim.SGD(trained.parameters(), 0.02)
        found = []
        for _ in range(STEPS):
            loss = loss_of(trained, batch_of(case))
            optimizer.zero_grad()
            loss.backward()
            before = sum(p.grad.square().sum() for p in without_head)
            clip(without_head, 0.01)
            clipped.append(bool(sum(p.grad.square().sum() for p in without_head) < 0.99 * before))
            optimizer.step()
            found.append(loss.item())
        losses.append(torch.tensor(found))
    assert any(clipped)
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
